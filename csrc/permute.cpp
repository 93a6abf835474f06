#include "permute.h"

#include <cmath>

#include "philox.h"

namespace mixloader {
namespace {

// Keeps the stream of round keys apart from the planner's, which uses the seed
// itself as the Philox key.
constexpr std::uint64_t kRoundKeyStream = 0x9E3779B97F4A7C15;

std::uint64_t ceil_sqrt(std::uint64_t n) {
  auto root =
      static_cast<std::uint64_t>(std::sqrt(static_cast<long double>(n)));
  while (root * root >= n && root > 0) --root;
  while (root * root < n) ++root;
  return root;
}

// The finalizer of splitmix64 over (key, value), of which 32 bits are kept.
std::uint32_t mix(std::uint32_t key, std::uint64_t value) {
  std::uint64_t z = (std::uint64_t{key} << 32) ^ value;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return static_cast<std::uint32_t>((z ^ (z >> 31)) >> 32);
}

}  // namespace

Permutation::Permutation(std::uint64_t seed, std::uint64_t domain_key,
                         std::uint64_t epoch, std::uint64_t n)
    : epoch_(epoch), n_(n), a_(ceil_sqrt(n)), b_((n + a_ - 1) / a_) {
  for (std::uint32_t block = 0; block < kRounds / 4; ++block) {
    const auto words =
        philox(seed ^ kRoundKeyStream, {low(epoch), (high(epoch) << 8) | block,
                                        low(domain_key), high(domain_key)});
    for (std::uint32_t i = 0; i < 4; ++i) keys_[4 * block + i] = words[i];
  }
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  std::uint64_t x = index;
  do {
    std::uint64_t left = x / b_;
    std::uint64_t right = x % b_;
    for (int round = 0; round < kRounds; round += 2) {
      left += scale(mix(keys_[round], right), a_);
      if (left >= a_) left -= a_;
      right += scale(mix(keys_[round + 1], left), b_);
      if (right >= b_) right -= b_;
    }
    x = left * b_ + right;
  } while (x >= n_);
  return x;
}

}  // namespace mixloader
