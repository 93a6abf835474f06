#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <string>

#include "error.h"

namespace mixloader {
namespace {

__extension__ using Wide = unsigned __int128;

}  // namespace

std::vector<std::int64_t> apportion(std::int64_t total,
                                    std::span<const std::int64_t> parts) {
  const auto whole = static_cast<std::uint64_t>(
      std::accumulate(parts.begin(), parts.end(), std::int64_t{0}));
  std::vector<std::int64_t> shares(parts.size());
  std::vector<std::uint64_t> remainders(parts.size());
  std::int64_t missing = total;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == 0) continue;
    const Wide scaled = Wide(static_cast<std::uint64_t>(parts[i])) *
                        static_cast<std::uint64_t>(total);
    shares[i] = static_cast<std::int64_t>(scaled / whole);
    remainders[i] = static_cast<std::uint64_t>(scaled % whole);
    missing -= shares[i];
  }
  if (missing == 0) return shares;
  // Fewer are missing than have a remainder.
  std::vector<std::uint32_t> by_remainder(parts.size());
  std::iota(by_remainder.begin(), by_remainder.end(), 0);
  const auto greater = [&](std::uint32_t a, std::uint32_t b) {
    return remainders[a] != remainders[b] ? remainders[a] > remainders[b]
                                          : a < b;
  };
  const auto end = by_remainder.begin() + missing;
  std::nth_element(by_remainder.begin(), end, by_remainder.end(), greater);
  std::for_each(by_remainder.begin(), end,
                [&](std::uint32_t i) { ++shares[i]; });
  return shares;
}

std::vector<std::int64_t> quantize(std::span<const double> weights) {
  double greatest = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (!(std::isfinite(weights[i]) && weights[i] >= 0)) {
      throw WeightsError("weight " + std::to_string(i) + " is " +
                         std::to_string(weights[i]) +
                         "; expected a finite number >= 0");
    }
    greatest = std::max(greatest, weights[i]);
  }
  if (greatest == 0) {
    throw WeightsError("all weights are zero; one or more must be above zero");
  }
  // With parts of at most 2^33, integer weights made into fractions come back
  // as the same integers.
  std::vector<std::int64_t> parts(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    parts[i] =
        static_cast<std::int64_t>(std::rint(weights[i] / greatest * 0x1p33));
  }
  return apportion(kWeightOne, parts);
}

}  // namespace mixloader
