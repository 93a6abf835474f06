// The global plan: which window of which domain stands in each row of a plan
// step. A pure function of seed, step, cursors, residuals and integer weights;
// every rank computes the same one without talking. mixloader/reference.py is
// its specification.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace mixloader {

// What integer weights sum to; the same number as WEIGHT_ONE in mixture.py.
inline constexpr std::int64_t kWeightOne = std::int64_t{1} << 30;

// What the plan carries from one step to the next, O(domains).
struct PlanState {
  std::uint64_t step = 0;
  // Windows drawn of each domain so far.
  std::vector<std::uint64_t> cursors;
  // Rows owed to each domain, in units of 1 / kWeightOne row; they sum to zero.
  std::vector<std::int64_t> residuals;
};

// How rows are given to domains. kQuota: error diffusion, in varied company.
// kMultinomial: each row by chance. kExact: Megatron's greedy blend, in order.
enum class Sampling { kQuota, kMultinomial, kExact };

inline constexpr std::uint64_t kNoLimit =
    std::numeric_limits<std::uint64_t>::max();

// What holds for all steps of a stream.
struct PlanRules {
  Sampling sampling = Sampling::kQuota;
  // Draws that each domain may give in all, kNoLimit for any number.
  std::vector<std::uint64_t> limits;
  // When a domain with a weight reaches its limit: end the stream, or give its
  // rows to the others.
  bool stop_at_limit = false;
};

// One row: the draw-th window that its domain gives (epochs counted through).
struct PlannedRow {
  std::uint32_t domain;
  std::uint64_t draw;
};

// Gives each domain its quota of the `rows` rows of state.step by error
// diffusion, puts the rows into an order keyed by the step, and advances the
// state. `units` are integer weights that sum to kWeightOne; a domain of weight
// zero is never drawn and keeps its residual. nullopt, with the state as it
// was: the stream has ended, because a limit was reached.
//
// Let e = quota - count of a domain, summed over all steps so far, in rows.
// While no weight is zero, -2 < e <= 2 (H_D - 1), where H_D = 1 + 1/2 + ... +
// 1/D; with weights switched to and from zero at will, |e| <= D - 1. (Proof in
// reference.py.)
std::optional<std::vector<PlannedRow>> plan_step(
    std::uint64_t seed, std::uint64_t rows, std::span<const std::int64_t> units,
    const PlanRules& rules, PlanState& state);

}  // namespace mixloader
