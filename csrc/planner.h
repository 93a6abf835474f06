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

#include "mixture.h"

namespace mixloader {

// What the plan carries from one step to the next, O(domains).
struct PlanState {
  std::uint64_t step = 0;
  // Windows drawn of each domain so far.
  std::vector<std::uint64_t> cursors;
  // Rows owed to each domain, in units of 1 / kWeightOne row; they sum to zero.
  // So cursor + residual is what its weights asked for, in every sampling.
  std::vector<std::int64_t> residuals;
};

// How rows are given to domains. kQuota: error diffusion, in varied company.
// kMultinomial: each row by chance. kExact: Megatron's greedy blend, in order.
enum class Sampling { kQuota, kMultinomial, kExact };

inline constexpr std::uint64_t kNoLimit =
    std::numeric_limits<std::uint64_t>::max();

// Rows of one step: with these, quotas and residuals stay below 2^62.
inline constexpr std::uint64_t kMaxRows = std::uint64_t{1} << 31;

// What holds for all steps of a stream.
struct PlanRules {
  Sampling sampling = Sampling::kQuota;
  // Draws that each domain may give in all, kNoLimit for any number; empty:
  // none has a limit.
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

// Plans the `rows` rows of state.step and advances the state. `units` are
// integer weights that sum to kWeightOne; a domain of weight zero is never
// drawn and keeps its residual. Quotas follow effective_units(). nullopt, with
// the state as it was: the stream has ended, because a limit was reached.
//
// kQuota: let e = quota - count of a domain, summed over all steps so far, in
// rows. While no weight is zero, -2 < e <= 2 (H_D - 1), where H_D = 1 + 1/2 +
// ... + 1/D, and e < 2 (D - 1) once limits are reached; with weights switched
// to and from zero at will, |e| <= D - 1 without limits. (Proof in
// reference.py.)
//
// Throws std::invalid_argument for more than kMaxRows rows.
std::optional<std::vector<PlannedRow>> plan_step(
    std::uint64_t seed, std::uint64_t rows, std::span<const std::int64_t> units,
    const PlanRules& rules, PlanState& state);

// The weights that a step at these cursors begins with: `units`, or, where
// domains are at their limits and the others take their rows, these in
// proportion over the others. All zero: no domain with a weight may be drawn.
std::vector<std::int64_t> effective_units(
    std::span<const std::int64_t> units, const PlanRules& rules,
    std::span<const std::uint64_t> cursors);

}  // namespace mixloader
