// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011): a random function of a key and a counter, with no state to save.
// Checked against the Random123 known-answer vectors in tests/test_plan.py.
#pragma once

#include <array>
#include <cstdint>

namespace mixloader {

using PhiloxCounter = std::array<std::uint32_t, 4>;

inline PhiloxCounter philox(std::uint64_t key, PhiloxCounter c) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0,
         static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1,
         static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// Low and high halves of a 64-bit number, for building counters.
constexpr std::uint32_t low(std::uint64_t x) {
  return static_cast<std::uint32_t>(x);
}
constexpr std::uint32_t high(std::uint64_t x) {
  return static_cast<std::uint32_t>(x >> 32);
}

// A random word scaled to [0, n), n <= 2^32. The bias is below n / 2^32.
constexpr std::uint64_t scale(std::uint32_t word, std::uint64_t n) {
  return (word * n) >> 32;
}

}  // namespace mixloader
