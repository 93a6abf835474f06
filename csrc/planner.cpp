#include "planner.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "philox.h"

namespace mixloader {
namespace {

// The last word of a Philox counter says what its numbers are for.
enum Purpose : std::uint32_t { kDither = 1, kOrder = 2, kChance = 3 };

using Units = std::vector<std::int64_t>;

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

// A step under way, on copies of the state: one that cannot be filled leaves
// no trace.
struct Step {
  std::uint64_t seed;
  std::uint64_t number;
  std::uint64_t rows;
  // The weights of the domains that still take part; of the others zero.
  Units open;
  // Draws that each domain may give in this step.
  std::vector<std::uint64_t> left;
  std::vector<std::int64_t> residuals;
};

Units renormalise(Units open) {
  std::int64_t sum = 0;
  for (const std::int64_t part : open) sum += part;
  return sum == 0 || sum == kWeightOne ? open : apportion(kWeightOne, open);
}

bool any(const Units& units) {
  return std::any_of(units.begin(), units.end(),
                     [](std::int64_t part) { return part > 0; });
}

// Hands what closed domains are owed to those that take part.
void pass_on(Step& step, std::int64_t owed) {
  if (owed == 0) return;
  const Units shares = apportion(owed, step.open);
  for (std::size_t i = 0; i < shares.size(); ++i) {
    step.residuals[i] += shares[i];
  }
}

// Takes back what is owed to a domain, which from here on takes no part.
std::int64_t close(Step& step, std::uint32_t domain) {
  step.open[domain] = 0;
  const std::int64_t owed = std::max<std::int64_t>(0, step.residuals[domain]);
  step.residuals[domain] -= owed;
  return owed;
}

std::uint64_t draws_left(const PlanRules& rules, std::size_t domain,
                         std::uint64_t cursor) {
  if (rules.limits.empty()) return kNoLimit - cursor;
  return rules.limits[domain] - std::min(rules.limits[domain], cursor);
}

// nullopt: no domain with a weight may be drawn.
std::optional<Step> begin(std::uint64_t seed, std::uint64_t rows,
                          std::span<const std::int64_t> units,
                          const PlanRules& rules, const PlanState& state) {
  Step step{seed, state.step,     rows, {units.begin(), units.end()},
            {},   state.residuals};
  step.left.assign(units.size(), kNoLimit);
  if (rules.stop_at_limit) return step;  // plan_step looks at the limits
  std::int64_t owed = 0;
  for (std::uint32_t domain = 0; domain < units.size(); ++domain) {
    step.left[domain] = draws_left(rules, domain, state.cursors[domain]);
    if (units[domain] > 0 && step.left[domain] == 0) {
      owed += close(step, domain);
    }
  }
  if (!any(step.open)) return std::nullopt;
  pass_on(step, owed);
  return step;
}

// The claims of a step. The dither, up to one row, is keyed by the step: it
// keeps domains of related weights from meeting in the same company for ever.
std::vector<Claim> make_claims(const Step& step) {
  std::vector<Claim> claims;
  claims.reserve(step.open.size());
  PhiloxCounter words{};
  for (std::uint32_t domain = 0; domain < step.open.size(); ++domain) {
    if (domain % 4 == 0) {
      words = philox(step.seed, {low(step.number), high(step.number),
                                 domain / 4, kDither});
    }
    if (step.open[domain] > 0) {
      claims.push_back(
          {step.residuals[domain] + std::int64_t{words[domain % 4] >> 2},
           domain});
    }
  }
  return claims;
}

// Rows that a claim gives before it is below `level` + one row.
std::int64_t rows_above(const Claim& claim, std::int64_t level) {
  return claim.owed > level ? (claim.owed - level) / kWeightOne : 0;
}

// A level, in whole rows, above which no more than `rows` rows are claimed.
// Newton's method from below: raising it by one row saves one row a claim.
std::int64_t find_level(const std::vector<Claim>& claims, std::int64_t rows) {
  std::int64_t level = 0;
  while (true) {
    std::int64_t claimed = 0, claimants = 0;
    for (const Claim& claim : claims) {
      const std::int64_t own = rows_above(claim, level);
      claimed += own;
      claimants += own > 0;
    }
    if (claimed <= rows) return level;
    level += (claimed - rows + claimants - 1) / claimants * kWeightOne;
  }
}

// `rows` times, gives the greatest claim a row, for which it pays kWeightOne.
// That is to give the `rows` greatest of all (claim, claim - 1, claim - 2 ...),
// so whole rows go first, and the rest to the greatest of what remains.
std::vector<std::uint64_t> give_to_greatest(std::vector<Claim> claims,
                                            std::uint64_t rows,
                                            std::size_t domains) {
  std::vector<std::uint64_t> counts(domains, 0);
  const std::int64_t level =
      find_level(claims, static_cast<std::int64_t>(rows));
  for (Claim& claim : claims) {
    const std::int64_t own = rows_above(claim, level);
    claim.owed -= own * kWeightOne;
    counts[claim.domain] = static_cast<std::uint64_t>(own);
    rows -= static_cast<std::uint64_t>(own);
  }
  if (rows < claims.size()) {  // the others get none
    const auto end = claims.begin() + static_cast<std::ptrdiff_t>(rows);
    std::nth_element(claims.begin(), end, claims.end(),
                     [](const Claim& a, const Claim& b) { return b < a; });
    claims.erase(end, claims.end());
  }
  std::make_heap(claims.begin(), claims.end());
  for (; rows > 0; --rows) {
    std::pop_heap(claims.begin(), claims.end());
    claims.back().owed -= kWeightOne;
    ++counts[claims.back().domain];
    std::push_heap(claims.begin(), claims.end());
  }
  return counts;
}

// The same one by one: a claim whose domain has no draw left is closed, and
// what it is owed passes on. nullopt: none is left.
std::optional<std::vector<std::uint64_t>> give_within_limits(Step& step) {
  std::vector<std::uint64_t> counts(step.open.size(), 0);
  std::vector<Claim> claims = make_claims(step);
  std::make_heap(claims.begin(), claims.end());
  for (std::uint64_t given = 0; given < step.rows;) {
    std::pop_heap(claims.begin(), claims.end());
    const std::uint32_t domain = claims.back().domain;
    if (counts[domain] == step.left[domain]) {
      const std::int64_t owed = close(step, domain);
      if (!any(step.open)) return std::nullopt;
      pass_on(step, owed);
      claims = make_claims(step);
      std::make_heap(claims.begin(), claims.end());
      continue;
    }
    claims.back().owed -= kWeightOne;
    std::push_heap(claims.begin(), claims.end());
    step.residuals[domain] -= kWeightOne;
    ++counts[domain];
    ++given;
  }
  return counts;
}

// The domains of a step's rows, in order; each sampling books them on the
// residuals.
using Domains = std::optional<std::vector<std::uint32_t>>;

void add_quotas(Step& step, std::uint64_t rows, const Units& effective) {
  for (std::size_t i = 0; i < effective.size(); ++i) {
    step.residuals[i] += static_cast<std::int64_t>(rows) * effective[i];
  }
}

Domains by_quota(Step& step) {
  add_quotas(step, step.rows, renormalise(step.open));
  std::optional counts =
      give_to_greatest(make_claims(step), step.rows, step.open.size());
  bool within = true;
  for (std::size_t i = 0; i < counts->size(); ++i) {
    within = within && (*counts)[i] <= step.left[i];
  }
  if (within) {
    for (std::size_t i = 0; i < counts->size(); ++i) {
      step.residuals[i] -= static_cast<std::int64_t>((*counts)[i]) * kWeightOne;
    }
  } else {
    counts = give_within_limits(step);
    if (!counts) return std::nullopt;
  }
  std::vector<std::uint32_t> domains;
  domains.reserve(step.rows);
  for (std::uint32_t domain = 0; domain < counts->size(); ++domain) {
    domains.insert(domains.end(), (*counts)[domain], domain);
  }
  return domains;
}

Domains by_chance(Step& step) {
  add_quotas(step, step.rows, renormalise(step.open));
  std::vector<std::int64_t> ends(step.open.size());
  const auto add_up = [&] {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < ends.size(); ++i) ends[i] = sum += step.open[i];
    return sum > 0;
  };
  bool drawable = add_up();
  std::vector<std::uint32_t> domains;
  domains.reserve(step.rows);
  PhiloxCounter words{};
  for (std::uint64_t row = 0; row < step.rows; ++row) {
    if (!drawable) return std::nullopt;
    if (row % 4 == 0) {
      words = philox(step.seed, {low(step.number), high(step.number),
                                 static_cast<std::uint32_t>(row / 4), kChance});
    }
    const auto point = static_cast<std::int64_t>(
        scale(words[row % 4], static_cast<std::uint64_t>(ends.back())));
    const auto domain = static_cast<std::uint32_t>(
        std::upper_bound(ends.begin(), ends.end(), point) - ends.begin());
    domains.push_back(domain);
    step.residuals[domain] -= kWeightOne;
    if (--step.left[domain] == 0) {
      step.open[domain] = 0;
      drawable = add_up();
    }
  }
  return domains;
}

Domains greedily(Step& step) {
  Units effective = renormalise(step.open);
  std::vector<std::uint32_t> domains;
  domains.reserve(step.rows);
  while (domains.size() < step.rows) {
    // Megatron's argmax of w max(i, 1) - n: the first row of all is chosen as
    // if its quota had been added.
    const bool first = step.number == 0 && domains.empty();
    std::optional<std::uint32_t> best;
    std::int64_t most = 0;
    for (std::uint32_t i = 0; i < effective.size(); ++i) {
      const std::int64_t owed = step.residuals[i] + (first ? effective[i] : 0);
      if (effective[i] > 0 && (!best || owed > most)) best = i, most = owed;
    }
    if (step.left[*best] == 0) {
      const std::int64_t owed = close(step, *best);
      if (!any(step.open)) return std::nullopt;
      pass_on(step, owed);
      effective = renormalise(step.open);
      continue;
    }
    add_quotas(step, 1, effective);
    step.residuals[*best] -= kWeightOne;
    --step.left[*best];
    domains.push_back(*best);
  }
  return domains;
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
    const PlanRules& rules, PlanState& state) {
  if (rows > kMaxRows) {
    throw std::invalid_argument("a step of " + std::to_string(rows) +
                                " rows; at most " + std::to_string(kMaxRows) +
                                " can be planned");
  }
  std::optional step = begin(seed, rows, units, rules, state);
  if (!step) return std::nullopt;
  const Domains domains = rules.sampling == Sampling::kQuota ? by_quota(*step)
                          : rules.sampling == Sampling::kMultinomial
                              ? by_chance(*step)
                              : greedily(*step);
  if (!domains) return std::nullopt;

  std::vector<std::uint64_t> cursors = state.cursors;
  std::vector<PlannedRow> planned;
  planned.reserve(rows);
  for (const std::uint32_t domain : *domains) {
    if (draws_left(rules, domain, cursors[domain]) == 0) return std::nullopt;
    planned.push_back({domain, cursors[domain]++});
  }
  if (rules.sampling == Sampling::kQuota) {
    shuffle_rows(seed, state.step, planned);
  }
  state.cursors = std::move(cursors);
  state.residuals = std::move(step->residuals);
  ++state.step;
  return planned;
}

std::vector<std::int64_t> effective_units(
    std::span<const std::int64_t> units, const PlanRules& rules,
    std::span<const std::uint64_t> cursors) {
  Units open(units.begin(), units.end());
  for (std::size_t i = 0; i < open.size() && !rules.stop_at_limit; ++i) {
    if (draws_left(rules, i, cursors[i]) == 0) open[i] = 0;
  }
  return renormalise(std::move(open));
}

}  // namespace mixloader
