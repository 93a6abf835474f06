#include "timeline.h"

#include <iterator>
#include <string>
#include <utility>

#include "error.h"

namespace mixloader {
namespace {

auto shared_units(std::vector<std::int64_t> units) {
  return std::make_shared<const std::vector<std::int64_t>>(std::move(units));
}

}  // namespace

Timeline::Timeline(std::uint64_t seed, PlanRules rules, Layout layout,
                   std::size_t domains, std::vector<std::int64_t> units)
    : seed_(seed), rules_(std::move(rules)), layout_(layout) {
  PlanState start;
  start.cursors.assign(domains, 0);
  start.residuals.assign(domains, 0);
  unplanned_ = std::make_shared<const PlanState>(std::move(start));
  weights_.emplace(0, Weights{0, shared_units(std::move(units))});
}

Timeline::Place Timeline::place(std::size_t i) const {
  const std::uint64_t micro_batch = micro_batch_ + i;
  return {step_ + micro_batch / layout_.micro_batches,
          micro_batch % layout_.micro_batches};
}

std::uint64_t Timeline::first_open_step() const {
  return step_ + (micro_batch_ > 0 ? 1 : 0);
}

const std::shared_ptr<const PlanState>& Timeline::here() const {
  return planned_.empty() ? unplanned_ : planned_.front().before;
}

const Weights& Timeline::weights_at(std::uint64_t step) const {
  if (step < step_) {
    throw WeightsError("step " + std::to_string(step) +
                       " has passed; the weights of past steps are in the run "
                       "record");
  }
  return weights_in_force(step);
}

std::vector<std::int64_t> Timeline::effective_units() const {
  return mixloader::effective_units(*weights_in_force(step_).units, rules_,
                                    here()->cursors);
}

const StepPlan* Timeline::planned(std::uint64_t step) const {
  return step - step_ < planned_.size() ? &planned_[step - step_] : nullptr;
}

bool Timeline::ended(std::uint64_t step) const {
  return ended_ && step >= unplanned_->step;
}

StepPlan Timeline::begin_plan() const {
  return {generation_, unplanned_, weights_in_force(unplanned_->step), {}, {}};
}

void Timeline::run_plan(StepPlan& plan) const {
  PlanState state = *plan.before;
  auto rows =
      plan_step(seed_, layout_.step_rows(), *plan.weights.units, rules_, state);
  if (!rows) return;
  plan.after = std::make_shared<const PlanState>(std::move(state));
  plan.rows = std::make_shared<const std::vector<PlannedRow>>(std::move(*rows));
}

void Timeline::finish_plan(StepPlan plan) {
  if (plan.generation != generation_) return;
  ++generation_;
  if (!plan.after) {
    ended_ = true;
    return;
  }
  unplanned_ = plan.after;
  planned_.push_back(std::move(plan));
}

void Timeline::advance() {
  if (++micro_batch_ < layout_.micro_batches) return;
  micro_batch_ = 0;
  ++step_;
  planned_.pop_front();
  forget_past_weights();
}

void Timeline::set_weights(std::vector<std::int64_t> units,
                           std::uint64_t step) {
  if (step < first_open_step()) {
    throw WeightsError("step " + std::to_string(step) +
                       " has begun; weights can change from step " +
                       std::to_string(first_open_step()) + " on");
  }
  forget_plans_from(step);
  weights_.insert_or_assign(
      step, Weights{++version_, shared_units(std::move(units))});
}

void Timeline::skip(std::uint64_t n) {
  if (micro_batch_ > 0) {
    throw StateError("skip() inside step " + std::to_string(step_) +
                     ", of which " + std::to_string(micro_batch_) + " of " +
                     std::to_string(layout_.micro_batches) +
                     " micro-batches were drawn; draw the others first");
  }
  forget_plans_from(step_);
  PlanState state = *unplanned_;
  const std::uint64_t rows = layout_.step_rows();
  for (std::uint64_t i = 0; i < n; ++i) {
    const auto& units = *weights_in_force(state.step).units;
    if (!plan_step(seed_, rows, units, rules_, state)) break;
  }
  step_ = state.step;
  unplanned_ = std::make_shared<const PlanState>(std::move(state));
  forget_past_weights();
}

StreamState Timeline::state() const {
  return {*here(), micro_batch_ * layout_.world_size * layout_.batch_size,
          version_, weights_};
}

void Timeline::load_state(StreamState state) {
  const std::uint64_t rows = layout_.world_size * layout_.batch_size;
  if (state.rows % rows != 0) {
    throw StateError(
        "the state was saved " + std::to_string(state.rows) +
        " rows into a step, which is no whole number of micro-batches of " +
        std::to_string(rows) +
        " rows over all ranks; resume with the layout of the run that saved "
        "it, or save between steps");
  }
  forget_plans_from(0);
  step_ = state.plan.step;
  micro_batch_ = state.rows / rows;
  version_ = state.version;
  weights_ = std::move(state.weights);
  unplanned_ = std::make_shared<const PlanState>(std::move(state.plan));
}

const Weights& Timeline::weights_in_force(std::uint64_t step) const {
  return std::prev(weights_.upper_bound(step))->second;
}

void Timeline::forget_plans_from(std::uint64_t step) {
  if (step > unplanned_->step) return;
  while (!planned_.empty() && planned_.back().before->step >= step) {
    unplanned_ = std::move(planned_.back().before);
    planned_.pop_back();
  }
  ended_ = false;
  ++generation_;
}

void Timeline::forget_past_weights() {
  while (weights_.size() > 1 && std::next(weights_.begin())->first < step_) {
    weights_.erase(weights_.begin());
  }
}

}  // namespace mixloader
