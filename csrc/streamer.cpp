#include "streamer.h"

#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"

namespace mixloader {

Streamer::Streamer(std::unique_ptr<const Corpus> corpus, std::uint64_t seed,
                   Shuffle shuffle, PlanRules rules, Layout layout,
                   std::vector<std::int64_t> units, unsigned threads)
    : corpus_(std::move(corpus)),
      seed_(seed),
      rules_(std::move(rules)),
      layout_(layout) {
  for (std::uint32_t domain = 0; domain < corpus_->domains(); ++domain) {
    orders_.emplace_back(seed_, corpus_->key(domain),
                         corpus_->window_ends(domain), shuffle);
  }
  unplanned_.cursors.assign(corpus_->domains(), 0);
  unplanned_.residuals.assign(corpus_->domains(), 0);
  weights_.emplace(0, Weights{0, std::move(units)});
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([this](std::stop_token stop) { work(stop); });
  }
}

Streamer::~Streamer() { stop(); }

void Streamer::stop() {
  std::vector<std::jthread> threads;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    threads.swap(threads_);
  }
  corpus_->locations().stop();
  batch_ready_.notify_all();
  // The jthreads stop and join here, without the mutex.
}

void Streamer::submit(BatchBuffers buffers) {
  {
    const std::lock_guard lock(mutex_);
    slots_.push_back(std::make_shared<Slot>(Slot{buffers, {}, {}, {}}));
  }
  work_ready_.notify_one();
}

std::optional<BatchPosition> Streamer::next(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  if (slots_.empty()) throw std::logic_error("next() without buffers");
  const auto done = [this] {
    const Fill fill = slots_.front()->fill;
    return stopped_ || fill == Fill::kReady || fill == Fill::kFailed;
  };
  Slot& slot = *slots_.front();
  if (slot.fill == Fill::kFailed && !slot.error) {  // thrown before: try again
    slot.fill = Fill::kEmpty;
    work_ready_.notify_one();
  }
  if (threads_.empty() && !done()) fill_slot(lock, 0, own_workspace_);
  if (!batch_ready_.wait_for(lock, timeout, done)) return std::nullopt;
  if (stopped_) throw std::runtime_error("the loader is closed");

  if (slot.fill == Fill::kFailed) {
    std::rethrow_exception(std::exchange(slot.error, nullptr));
  }
  BatchPosition result = position(0);
  result.weights_version = planned(result.step).weights_version;
  slots_.pop_front();
  if (++head_micro_batch_ == layout_.micro_batches) {
    head_micro_batch_ = 0;
    ++head_step_;
    planned_.pop_front();
    while (weights_.size() > 1 &&
           std::next(weights_.begin())->first < head_step_) {
      weights_.erase(weights_.begin());
    }
  }
  return result;
}

std::uint64_t Streamer::set_weights(std::vector<std::int64_t> units,
                                    std::optional<std::uint64_t> step) {
  std::uint64_t effect;
  {
    const std::lock_guard lock(mutex_);
    effect = step.value_or(first_open_step());
    if (effect < first_open_step()) {
      throw WeightsError("step " + std::to_string(effect) +
                         " has begun; weights can change from step " +
                         std::to_string(first_open_step()) + " on");
    }
    forget_plans_from(effect);
    weights_.insert_or_assign(effect, Weights{++version_, std::move(units)});
  }
  work_ready_.notify_all();
  return effect;
}

std::uint64_t Streamer::step() const {
  const std::lock_guard lock(mutex_);
  return first_open_step();
}

std::vector<std::int64_t> Streamer::weights_at(std::uint64_t step) const {
  const std::lock_guard lock(mutex_);
  if (step < head_step_) {
    throw WeightsError("step " + std::to_string(step) +
                       " has passed; the weights of past steps are in the run "
                       "record");
  }
  return weights_in_force(step).units;
}

StreamState Streamer::state() const {
  const std::lock_guard lock(mutex_);
  return {planned_.empty() ? unplanned_ : planned_.front().before,
          head_micro_batch_ * layout_.world_size * layout_.batch_size, version_,
          weights_};
}

void Streamer::load_state(StreamState state) {
  const std::uint64_t rows = layout_.world_size * layout_.batch_size;
  if (state.rows % rows != 0) {
    throw StateError(
        "the state was saved " + std::to_string(state.rows) +
        " rows into a step, which is no whole number of micro-batches of " +
        std::to_string(rows) +
        " rows over all ranks; resume with the layout of the run that saved "
        "it, or save between steps");
  }
  {
    const std::lock_guard lock(mutex_);
    forget_plans_from(0);
    head_step_ = state.plan.step;
    head_micro_batch_ = state.rows / rows;
    version_ = state.version;
    weights_ = std::move(state.weights);
    unplanned_ = std::move(state.plan);
  }
  work_ready_.notify_all();
}

BatchPosition Streamer::position(std::size_t slot_index) const {
  const std::uint64_t micro_batch = head_micro_batch_ + slot_index;
  return {false, head_step_ + micro_batch / layout_.micro_batches,
          micro_batch % layout_.micro_batches, 0};
}

const Streamer::PlannedStep& Streamer::planned(std::uint64_t step) {
  while (head_step_ + planned_.size() <= step) {
    const Weights& weights = weights_in_force(unplanned_.step);
    PlanState before = unplanned_;
    auto rows = plan_step(seed_, layout_.step_rows(), weights.units, rules_,
                          unplanned_);
    planned_.push_back(
        {std::move(before),
         std::make_shared<const std::vector<PlannedRow>>(std::move(*rows)),
         weights.version});
  }
  return planned_[step - head_step_];
}

const Weights& Streamer::weights_in_force(std::uint64_t step) const {
  return std::prev(weights_.upper_bound(step))->second;
}

std::uint64_t Streamer::first_open_step() const {
  return head_step_ + (head_micro_batch_ > 0 ? 1 : 0);
}

// What was planned, filled or being filled for `step` and after is done again.
void Streamer::forget_plans_from(std::uint64_t step) {
  while (!planned_.empty() && planned_.back().before.step >= step) {
    unplanned_ = std::move(planned_.back().before);
    planned_.pop_back();
  }
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = *slots_[i];
    if (position(i).step < step) continue;
    if (slot.fill == Fill::kFilling) {
      slot.stale = true;
    } else {
      slot.fill = Fill::kEmpty;
    }
  }
}

void Streamer::fill_slot(std::unique_lock<std::mutex>& lock,
                         std::size_t slot_index, Workspace& workspace) {
  const std::shared_ptr<Slot> slot = slots_[slot_index];
  const BatchPosition where = position(slot_index);
  slot->fill = Fill::kFilling;
  std::exception_ptr error;
  try {
    const auto rows = planned(where.step).rows;
    lock.unlock();
    write_batch(*rows, where.micro_batch, slot->buffers, workspace);
  } catch (...) {
    error = std::current_exception();
  }
  if (!lock.owns_lock()) lock.lock();
  if (std::exchange(slot->stale, false)) {
    slot->fill = Fill::kEmpty;
  } else {
    slot->fill = error ? Fill::kFailed : Fill::kReady;
    slot->error = std::move(error);
  }
}

void Streamer::write_batch(const std::vector<PlannedRow>& rows,
                           std::uint64_t micro_batch,
                           const BatchBuffers& buffers,
                           Workspace& workspace) const {
  workspace.orders.resize(corpus_->domains());
  const std::uint64_t first =
      (micro_batch * layout_.world_size + layout_.rank) * layout_.batch_size;
  const std::uint64_t rows_here = layout_.batch_size;
  const auto part = [rows_here](auto span, std::uint64_t i) {
    return span.empty() ? nullptr : span.data() + i * (span.size() / rows_here);
  };
  workspace.rows.clear();
  for (std::uint64_t i = 0; i < rows_here; ++i) {
    const auto [domain, draw] = rows[first + i];
    workspace.rows.push_back(
        {domain,
         orders_[domain].window(draw, workspace.orders[domain]),
         {part(buffers.inputs, i), part(buffers.targets, i),
          part(buffers.positions, i), part(buffers.documents, i)}});
    buffers.domains[i] = domain;
  }
  corpus_->read_rows(workspace.rows, workspace.corpus);
}

void Streamer::work(std::stop_token stop) {
  Workspace workspace;
  std::unique_lock lock(mutex_);
  while (true) {
    std::size_t next_empty = 0;
    work_ready_.wait(lock, stop, [&] {
      next_empty = 0;
      while (next_empty < slots_.size() &&
             slots_[next_empty]->fill != Fill::kEmpty) {
        ++next_empty;
      }
      return next_empty < slots_.size();
    });
    if (stop.stop_requested()) return;
    fill_slot(lock, next_empty, workspace);
    batch_ready_.notify_one();
  }
}

}  // namespace mixloader
