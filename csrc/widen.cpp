#include "widen.h"

#include <algorithm>
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

template <typename Id, typename Out>
[[gnu::always_inline]] inline void widen_loop(const std::byte* ids,
                                              std::size_t n, std::byte* out) {
  if constexpr (sizeof(Id) == sizeof(Out)) {
    std::memcpy(out, ids, n * sizeof(Id));
  } else {
    const auto* __restrict from =
        reinterpret_cast<const typename Anywhere<Id>::type*>(ids);
    auto* __restrict to = reinterpret_cast<typename Anywhere<Out>::type*>(out);
    for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<Out>(from[i]);
  }
}

template <typename Id>
[[gnu::always_inline]] inline std::uint64_t largest_loop(const std::byte* ids,
                                                         std::size_t n) {
  const auto* from = reinterpret_cast<const typename Anywhere<Id>::type*>(ids);
  Id largest = 0;
  for (std::size_t i = 0; i < n; ++i) largest = std::max<Id>(largest, from[i]);
  return largest;
}

// Each loop is compiled twice where the choice can be made at run time: AVX2
// widens in half the time of the x86-64 baseline.
template <typename Id, typename Out>
void widen_base(const std::byte* ids, std::size_t n, std::byte* out) {
  widen_loop<Id, Out>(ids, n, out);
}

template <typename Id>
std::uint64_t largest_base(const std::byte* ids, std::size_t n) {
  return largest_loop<Id>(ids, n);
}

#ifdef __x86_64__
template <typename Id, typename Out>
[[gnu::target("avx2")]] void widen_avx2(const std::byte* ids, std::size_t n,
                                        std::byte* out) {
  widen_loop<Id, Out>(ids, n, out);
}

template <typename Id>
[[gnu::target("avx2")]] std::uint64_t largest_avx2(const std::byte* ids,
                                                   std::size_t n) {
  return largest_loop<Id>(ids, n);
}

bool has_avx2() { return __builtin_cpu_supports("avx2"); }
template <typename Id, typename Out>
Widen pick_widen() {
  return has_avx2() ? widen_avx2<Id, Out> : widen_base<Id, Out>;
}
template <typename Id>
Largest pick_largest() {
  return has_avx2() ? largest_avx2<Id> : largest_base<Id>;
}
#else
template <typename Id, typename Out>
Widen pick_widen() {
  return widen_base<Id, Out>;
}
template <typename Id>
Largest pick_largest() {
  return largest_base<Id>;
}
#endif

// Calls `use` with a value of the unsigned type of `width` bytes.
template <typename Use>
auto with_id_type(std::size_t width, Use use) {
  switch (width) {
    case 1:
      return use(std::uint8_t());
    case 2:
      return use(std::uint16_t());
    case 4:
      return use(std::uint32_t());
    case 8:
      return use(std::uint64_t());
    default:
      throw std::invalid_argument("a token has " + std::to_string(width) +
                                  " bytes; expected 1, 2, 4 or 8");
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
  return with_id_type(width, [type](auto id) -> Widen {
    using Id = decltype(id);
    switch (type) {
      case TokenType::kInt64:
        return pick_widen<Id, std::uint64_t>();
      case TokenType::kInt32:
        return pick_widen<Id, std::uint32_t>();
      default:
        return pick_widen<Id, std::uint16_t>();
    }
  });
}

Largest largest_from(std::size_t width) {
  return with_id_type(
      width, [](auto id) -> Largest { return pick_largest<decltype(id)>(); });
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
