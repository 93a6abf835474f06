// The steps of one stream: where it stands, which weights hold when, and the
// steps planned ahead. Not thread-safe: the streamer's lock guards it. A plan
// is drawn in three parts, so that the long one needs no lock.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "planner.h"

namespace mixloader {

// How the rows of a plan step are dealt out: row r of micro-batch m on rank k
// is row (m * world_size + k) * batch_size + r of the step.
struct Layout {
  std::uint64_t batch_size;
  std::uint64_t micro_batches;  // gradient accumulation steps
  std::uint64_t world_size;
  std::uint64_t rank;

  std::uint64_t step_rows() const {
    return batch_size * micro_batches * world_size;
  }
};

// Integer weights from some step on, until the next change.
struct Weights {
  std::uint64_t version;
  std::shared_ptr<const std::vector<std::int64_t>> units;
};

// Where a stream stands: what was consumed, not what was read ahead.
struct StreamState {
  PlanState plan;             // as it was before the step that is under way
  std::uint64_t rows = 0;     // rows of that step consumed, over all ranks
  std::uint64_t version = 0;  // weight changes asked for so far
  // By step: those that the last step drawn had, in force now, and to come.
  std::map<std::uint64_t, Weights> weights;
};

using PlannedRows = std::shared_ptr<const std::vector<PlannedRow>>;

// One step's plan: what it needs, and what comes of it.
struct StepPlan {
  std::uint64_t generation;  // of the timeline that it was begun for
  std::shared_ptr<const PlanState> before;
  Weights weights;
  std::shared_ptr<const PlanState> after;  // null: the stream ends before it
  PlannedRows rows;
};

class Timeline {
 public:
  struct Place {
    std::uint64_t step;
    std::uint64_t micro_batch;
  };

  Timeline(std::uint64_t seed, PlanRules rules, Layout layout,
           std::size_t domains, std::vector<std::int64_t> units);

  const Layout& layout() const { return layout_; }

  // Where the i-th micro-batch from now on belongs.
  Place place(std::size_t i) const;
  // The first step of which no micro-batch was consumed.
  std::uint64_t first_open_step() const;
  // State before the step under way.
  const std::shared_ptr<const PlanState>& here() const;
  // Throws WeightsError for a step that has passed.
  const Weights& weights_at(std::uint64_t step) const;

  // Those of them that the step under way began with: see effective_units.
  std::vector<std::int64_t> effective_units() const;

  // The plan of `step`, at or after the one under way; null: not drawn yet.
  const StepPlan* planned(std::uint64_t step) const;
  // Whether it is known that the stream ends before `step`.
  bool ended(std::uint64_t step) const;

  // Draws the plan of the first step that has none: begin, run (thread-safe),
  // and finish, which does nothing if the timeline changed in between.
  StepPlan begin_plan() const;
  void run_plan(StepPlan& plan) const;
  void finish_plan(StepPlan plan);

  // The next micro-batch was consumed.
  void advance();
  // Changes the mixture from `step` on; the plans from there on are dropped.
  // Throws WeightsError if it has begun.
  void set_weights(std::vector<std::int64_t> units, std::uint64_t step);
  // Passes over up to n steps, fewer where the stream ends. Throws StateError
  // inside a step.
  void skip(std::uint64_t n);

  StreamState state() const;
  void load_state(StreamState state);

 private:
  const Weights& weights_in_force(std::uint64_t step) const;
  void forget_plans_from(std::uint64_t step);
  void forget_past_weights();

  const std::uint64_t seed_;
  const PlanRules rules_;
  const Layout layout_;

  std::uint64_t step_ = 0;         // of the next micro-batch
  std::uint64_t micro_batch_ = 0;  // of the next micro-batch
  std::uint64_t version_ = 0;
  std::map<std::uint64_t, Weights> weights_;
  std::deque<StepPlan> planned_;                // step_, step_ + 1, ...
  std::shared_ptr<const PlanState> unplanned_;  // before the first step after
  bool ended_ = false;  // that step is past the end of the stream
  std::uint64_t generation_ =
      0;  // goes up when unplanned_ or its weights change
};

}  // namespace mixloader
