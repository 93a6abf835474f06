// Integer weights: what a mixture is made of once it has entered.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mixloader {

// What integer weights sum to; the same number as WEIGHT_ONE in mixture.py.
inline constexpr std::int64_t kWeightOne = std::int64_t{1} << 30;

// Splits `total` in proportion to `parts`, of which one or more is positive and
// none negative, by largest remainder; equal remainders go to the lower index.
// The parts of the result sum to `total`; where a part is zero, so is its
// share.
std::vector<std::int64_t> apportion(std::int64_t total,
                                    std::span<const std::int64_t> parts);

// Finite weights >= 0, of which one or more is positive, as integers that sum
// to kWeightOne. Throws WeightsError for other weights.
std::vector<std::int64_t> quantize(std::span<const double> weights);

}  // namespace mixloader
