#include "planner.h"

#include <algorithm>
#include <utility>

#include "philox.h"

namespace mixloader {
namespace {

// The last word of a Philox counter says what its numbers are for.
enum Purpose : std::uint32_t { kDither = 1, kOrder = 2 };

// A domain that may be drawn, with the rows it is owed plus its dither.
struct Claim {
  std::int64_t owed;
  std::uint32_t domain;

  // std::*_heap keeps the greatest claim first; equal ones go to the lower
  // domain.
  bool operator<(const Claim& other) const {
    return owed != other.owed ? owed < other.owed : domain > other.domain;
  }
};

// The claims of one step. The dither, up to one row, is keyed by the step: it
// keeps domains of related weights from meeting in the same company for ever.
std::vector<Claim> make_claims(std::uint64_t seed, const PlanState& state,
                               std::span<const std::int64_t> units) {
  std::vector<Claim> claims;
  claims.reserve(units.size());
  PhiloxCounter words{};
  for (std::uint32_t domain = 0; domain < units.size(); ++domain) {
    if (domain % 4 == 0) {
      words = philox(seed,
                     {low(state.step), high(state.step), domain / 4, kDither});
    }
    if (units[domain] > 0) {
      claims.push_back(
          {state.residuals[domain] + std::int64_t{words[domain % 4] >> 2},
           domain});
    }
  }
  return claims;
}

// Fisher-Yates, keyed by the step.
void shuffle_rows(std::uint64_t seed, std::uint64_t step,
                  std::vector<PlannedRow>& rows) {
  PhiloxCounter words{};
  const std::uint64_t draws = rows.empty() ? 0 : rows.size() - 1;
  for (std::uint64_t i = 0; i < draws; ++i) {
    if (i % 4 == 0) {
      words = philox(seed, {low(step), high(step),
                            static_cast<std::uint32_t>(i / 4), kOrder});
    }
    const std::uint64_t last = draws - i;
    std::swap(rows[last], rows[scale(words[i % 4], last + 1)]);
  }
}

}  // namespace

std::optional<std::vector<PlannedRow>> plan_step(
    std::uint64_t seed, std::uint64_t rows, std::span<const std::int64_t> units,
    [[maybe_unused]] const PlanRules& rules, PlanState& state) {
  for (std::size_t domain = 0; domain < units.size(); ++domain) {
    state.residuals[domain] += static_cast<std::int64_t>(rows) * units[domain];
  }
  auto claims = make_claims(seed, state, units);
  std::make_heap(claims.begin(), claims.end());
  std::vector<std::uint64_t> counts(units.size(), 0);
  for (std::uint64_t row = 0; row < rows; ++row) {
    std::pop_heap(claims.begin(), claims.end());
    claims.back().owed -= kWeightOne;
    ++counts[claims.back().domain];
    std::push_heap(claims.begin(), claims.end());
  }

  std::vector<PlannedRow> planned;
  planned.reserve(rows);
  for (std::uint32_t domain = 0; domain < units.size(); ++domain) {
    for (std::uint64_t i = 0; i < counts[domain]; ++i) {
      planned.push_back({domain, state.cursors[domain]++});
    }
    state.residuals[domain] -=
        static_cast<std::int64_t>(counts[domain]) * kWeightOne;
  }
  shuffle_rows(seed, state.step, planned);
  ++state.step;
  return planned;
}

}  // namespace mixloader
