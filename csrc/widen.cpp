#include "widen.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mixloader {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tokens on disk are little-endian and are not swapped");

// An integer at any address, that may alias anything.
template <typename T>
struct Anywhere {
  typedef T type [[gnu::aligned(1), gnu::may_alias]];
};

// What is asked for line by line arrives while the lines before are widened;
// asked for all at once, it fills the processor's queue of misses and waits.
constexpr std::size_t kCacheLine = 64;

template <typename Id, typename Out>
[[gnu::always_inline]] inline std::uint64_t widen_loop(const std::byte* ids,
                                                       std::size_t n,
                                                       std::byte* out,
                                                       const std::byte* next) {
  const auto* __restrict from =
      reinterpret_cast<const typename Anywhere<Id>::type*>(ids);
  auto* __restrict to = reinterpret_cast<typename Anywhere<Out>::type*>(out);
  constexpr std::size_t kIds = kCacheLine / sizeof(Id);
  std::array<Id, kIds> most{};  // of each place in a line
  std::size_t done = 0;
  for (; done + kIds <= n; done += kIds) {
    if (next != nullptr) __builtin_prefetch(next + done * sizeof(Id));
    for (std::size_t i = 0; i < kIds; ++i) {
      const Id id = from[done + i];
      most[i] = std::max(most[i], id);
      to[done + i] = static_cast<Out>(id);
    }
  }
  Id largest = *std::max_element(most.begin(), most.end());
  for (; done < n; ++done) {
    const Id id = from[done];
    largest = std::max(largest, id);
    to[done] = static_cast<Out>(id);
  }
  return largest;
}

// Each loop is compiled twice where the choice can be made at run time: AVX2
// widens in half the time of the x86-64 baseline.
template <typename Id, typename Out>
std::uint64_t widen_base(const std::byte* ids, std::size_t n, std::byte* out,
                         const std::byte* next) {
  return widen_loop<Id, Out>(ids, n, out, next);
}

#ifdef __x86_64__
template <typename Id, typename Out>
[[gnu::target("avx2")]] std::uint64_t widen_avx2(const std::byte* ids,
                                                 std::size_t n, std::byte* out,
                                                 const std::byte* next) {
  return widen_loop<Id, Out>(ids, n, out, next);
}

template <typename Id, typename Out>
Widen pick() {
  return __builtin_cpu_supports("avx2") ? widen_avx2<Id, Out>
                                        : widen_base<Id, Out>;
}
#else
template <typename Id, typename Out>
Widen pick() {
  return widen_base<Id, Out>;
}
#endif

template <typename Id>
Widen pick(TokenType type) {
  switch (type) {
    case TokenType::kInt64:
      return pick<Id, std::uint64_t>();
    case TokenType::kInt32:
      return pick<Id, std::uint32_t>();
    default:
      return pick<Id, std::uint16_t>();
  }
}

}  // namespace

std::size_t width_of(TokenType type) {
  switch (type) {
    case TokenType::kInt64:
      return 8;
    case TokenType::kInt32:
      return 4;
    default:
      return 2;
  }
}

std::uint64_t capacity_of(TokenType type) {
  switch (type) {
    case TokenType::kInt64:
      return std::uint64_t{1} << 63;
    case TokenType::kInt32:
      return std::uint64_t{1} << 31;
    default:
      return std::uint64_t{1} << 16;
  }
}

Widen widen_from(std::size_t width, TokenType type) {
  switch (width) {
    case 1:
      return pick<std::uint8_t>(type);
    case 2:
      return pick<std::uint16_t>(type);
    case 4:
      return pick<std::uint32_t>(type);
    case 8:
      return pick<std::uint64_t>(type);
    default:
      throw std::invalid_argument("a token has " + std::to_string(width) +
                                  " bytes; expected 1, 2, 4 or 8");
  }
}

std::uint64_t id_at(const std::byte* ids, std::size_t width, std::size_t i) {
  std::uint64_t id = 0;
  std::memcpy(&id, ids + i * width, width);
  return id;
}

void store(TokenType type, std::byte* out, std::size_t i, std::int64_t value) {
  const std::size_t width = width_of(type);
  std::memcpy(out + i * width, &value, width);  // little-endian
}

}  // namespace mixloader
