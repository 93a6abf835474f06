#include "streamer.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace mixloader {

Streamer::Streamer(std::unique_ptr<const Corpus> corpus, std::uint64_t seed,
                   Shuffle shuffle, PlanRules rules, Layout layout,
                   std::vector<std::int64_t> units, Threads threads)
    : corpus_(std::move(corpus)),
      layout_(layout),
      most_threads_(threads.most),
      pace_(corpus_->options().seq_len),
      read_ahead_(*corpus_, orders_, layout_),
      timeline_(seed, std::move(rules), layout, corpus_->domains(),
                std::move(units)) {
  for (std::uint32_t domain = 0; domain < corpus_->domains(); ++domain) {
    orders_.emplace_back(seed, corpus_->key(domain),
                         corpus_->window_ends(domain), shuffle);
  }
  for (unsigned i = 0; i < threads.first; ++i) {
    threads_.emplace_back([this] { work(); });
  }
}

Streamer::~Streamer() { stop(); }

void Streamer::stop() {
  std::vector<std::jthread> threads;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    work_ready_.ring();
    batch_ready_.ring();
    threads.swap(threads_);
  }
  corpus_->locations().stop();
  work_ready_.wake_all();
  batch_ready_.wake_all();
  // The threads are joined here, without the lock.
}

void Streamer::submit(BatchBuffers buffers) {
  Lock lock(mutex_);
  slots_.emplace_back().buffers = buffers;
  const bool wake = work_ready_.ring() && worth_waking();
  lock.unlock();
  if (wake) work_ready_.wake_one();
}

std::optional<Batch> Streamer::next(std::chrono::milliseconds timeout) {
  Lock lock(mutex_);
  const auto deadline = Clock::now() + timeout;
  bool waited = false;
  while (true) {
    if (stopped_) throw std::runtime_error("the loader is closed");
    if (slots_.empty()) throw std::logic_error("next() without buffers");
    Slot& slot = slots_.front();
    if (slot.fill == Slot::Fill::kReady) break;
    if (slot.fill == Slot::Fill::kEnd) return Batch{.end = true};
    if (slot.fill == Slot::Fill::kFailed) {
      if (slot.error) std::rethrow_exception(std::exchange(slot.error, {}));
      slot.fill = Slot::Fill::kEmpty;  // thrown before: try again
    }
    if (Clock::now() >= deadline) return std::nullopt;
    if (!std::exchange(waited, true)) {
      if (pace_.slow()) add_threads();
      wake_one();
    }
    if (help(lock, deadline)) continue;
    // What threads are at is a matter of microseconds, unless storage is slow.
    if (!pace_.ahead() && batch_ready_.watch(lock)) continue;
    if (!stopped_) batch_ready_.sleep_until(lock, deadline);
  }
  const Slot& slot = slots_.front();
  const auto [step, micro_batch] = timeline_.place(0);
  Batch batch{false, step, micro_batch, slot.version, slot.number};
  while (batch.ready + 1 < slots_.size() &&
         slots_[batch.ready + 1].fill == Slot::Fill::kReady) {
    ++batch.ready;
  }
  return batch;
}

bool Streamer::take(std::uint64_t fill) {
  const std::lock_guard lock(mutex_);
  if (slots_.empty() || slots_.front().fill != Slot::Fill::kReady ||
      slots_.front().number != fill) {
    return false;
  }
  slots_.pop_front();
  timeline_.advance();
  return true;
}

std::pair<std::uint64_t, std::uint64_t> Streamer::position() const {
  const std::lock_guard lock(mutex_);
  const auto [step, micro_batch] = timeline_.place(0);
  return {step, micro_batch};
}

std::optional<std::uint64_t> Streamer::peek() const {
  const std::lock_guard lock(mutex_);
  if (slots_.empty() || slots_.front().fill != Slot::Fill::kReady) return {};
  return slots_.front().number;
}

std::uint64_t Streamer::set_weights(std::vector<std::int64_t> units,
                                    std::optional<std::uint64_t> step) {
  const std::lock_guard lock(mutex_);
  const auto effect = step.value_or(timeline_.first_open_step());
  timeline_.set_weights(std::move(units), effect);
  refill_from(effect);
  return effect;
}

std::uint64_t Streamer::skip(std::uint64_t n) {
  const std::lock_guard lock(mutex_);
  timeline_.skip(n);
  refill_from(0);
  return timeline_.first_open_step();
}

std::uint64_t Streamer::step() const {
  const std::lock_guard lock(mutex_);
  return timeline_.first_open_step();
}

std::vector<std::int64_t> Streamer::weights_at(std::uint64_t step) const {
  const std::lock_guard lock(mutex_);
  return *timeline_.weights_at(step).units;
}

StreamState Streamer::state() const {
  const std::lock_guard lock(mutex_);
  return timeline_.state();
}

void Streamer::load_state(StreamState state) {
  const std::lock_guard lock(mutex_);
  timeline_.load_state(std::move(state));
  refill_from(0);
}

std::vector<ShardAhead> Streamer::upcoming(std::uint64_t limit) const {
  std::shared_ptr<const PlanState> here;
  std::vector<std::int64_t> weights;
  {
    const std::lock_guard lock(mutex_);
    here = timeline_.here();
    weights = timeline_.effective_units();
  }
  const Locations& locations = corpus_->locations();
  std::vector<ShardAhead> result;
  for (std::uint32_t domain = 0; domain < orders_.size(); ++domain) {
    const auto units = static_cast<double>(weights[domain]);
    WindowOrder::Cache cache;
    for (const auto& [draws, shard] :
         orders_[domain].upcoming(here->cursors[domain], limit, cache)) {
      const std::uint32_t number = corpus_->first_shard(domain) + shard;
      if (!locations.fetched(number)) continue;
      const double rows = units > 0
                              ? static_cast<double>(draws) * kWeightOne / units
                              : std::numeric_limits<double>::infinity();
      result.push_back({rows, number});
    }
  }
  std::stable_sort(
      result.begin(), result.end(),
      [](const auto& a, const auto& b) { return a.rows < b.rows; });
  if (result.size() > limit) result.resize(limit);
  return result;
}

// One piece of work on a slot, if there is any: its step's plan, or some of its
// rows.
bool Streamer::work_on(Slot& slot, std::size_t index, Lock& lock,
                       Workspace& workspace) {
  if (slot.fill == Slot::Fill::kEmpty) {
    const auto [step, micro_batch] = timeline_.place(index);
    const StepPlan* plan = timeline_.planned(step);
    if (plan) {
      begin_fill(slot, *plan, micro_batch);
    } else if (timeline_.ended(step)) {
      slot.fill = Slot::Fill::kEnd;
      tell_callers();
    } else if (planning_) {
      return false;
    } else {
      plan_for(slot, lock);
    }
    return true;
  }
  if (!unclaimed(slot)) return false;
  write_some(slot, lock, workspace);
  return true;
}

// The caller, who would only wait, works on the oldest slot. It may not be kept
// from its signals: shards that must be fetched are for threads, if there are
// any, to wait for.
bool Streamer::help(Lock& lock, Clock::time_point deadline) {
  Locations& locations = corpus_->locations();
  if (helping_ || (locations.any_fetched() && !threads_.empty())) return false;
  struct Helping {
    Streamer& self;
    Lock& lock;
    ~Helping() {
      if (!lock.owns_lock()) lock.lock();
      self.helping_ = false;
    }
  } const helping{*this, lock};
  helping_ = true;
  Slot& slot = slots_.front();
  if (locations.any_fetched() && unclaimed(slot) && slot.rows) {
    const PlannedRows rows = slot.rows;
    const std::uint64_t first = first_row(slot);
    const Claim claim = next_claim(slot);
    lock.unlock();
    for (std::uint64_t i = 0; i < claim.count; ++i) {
      const auto left =
          std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      const auto shard =
          shard_of((*rows)[first + claim.first + i], caller_workspace_);
      if (!locations.wait_for(shard, left)) return false;
    }
    lock.lock();
    if (slot.rows != rows) return true;  // refilled in between
  }
  return work_on(slot, 0, lock, caller_workspace_);
}

void Streamer::plan_for(Slot& slot, Lock& lock) {
  planning_ = true;
  StepPlan plan = timeline_.begin_plan();
  const bool ahead = pace_.ahead();
  const std::uint64_t queue =
      slots_.size() * layout_.batch_size * layout_.world_size;
  lock.unlock();
  std::exception_ptr error;
  try {
    timeline_.run_plan(plan);
    if (ahead && plan.after) read_ahead_.ask(plan, queue);
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  planning_ = false;
  if (error) {
    slot.fill = Slot::Fill::kFailed;
    slot.error = error;
  } else {
    timeline_.finish_plan(std::move(plan));
  }
  tell_callers();
}

void Streamer::begin_fill(Slot& slot, const StepPlan& plan,
                          std::uint64_t micro_batch) {
  slot.fill = Slot::Fill::kFilling;
  slot.number = ++fills_;
  slot.version = plan.weights.version;
  slot.micro_batch = micro_batch;
  slot.rows = plan.rows;
  slot.claimed = slot.written = 0;
}

std::uint64_t Streamer::first_row(const Slot& slot) const {
  return (slot.micro_batch * layout_.world_size + layout_.rank) *
         layout_.batch_size;
}

Streamer::Claim Streamer::next_claim(const Slot& slot) const {
  return {slot.claimed,
          std::min(pace_.chunk(), layout_.batch_size - slot.claimed)};
}

void Streamer::write_some(Slot& slot, Lock& lock, Workspace& workspace) {
  const Claim claim = next_claim(slot);
  slot.claimed += claim.count;
  ++slot.writers;
  const PlannedRows rows = slot.rows;
  const std::uint64_t first = first_row(slot);
  const BatchBuffers buffers = slot.buffers;
  wake_one();  // who wakes the next in turn, while there is work
  lock.unlock();
  std::exception_ptr error;
  const auto start = Clock::now();
  try {
    write_rows(*rows, first, claim, buffers, workspace);
  } catch (...) {
    error = std::current_exception();
  }
  const auto time = Clock::now() - start;
  lock.lock();
  pace_.record(time, claim.count);
  finish(slot, claim, std::move(error));
}

void Streamer::finish(Slot& slot, Claim claim, std::exception_ptr error) {
  --slot.writers;
  slot.written += claim.count;
  // Rows are claimed in order and none after an error, so the first of a batch
  // is among those that come.
  if (error && (!slot.error || claim.first < slot.error_row)) {
    slot.error = std::move(error);
    slot.error_row = claim.first;
  }
  if (slot.writers == 0 && slot.stale) {
    empty(slot);
  } else if (slot.writers == 0 && slot.error) {
    slot.fill = Slot::Fill::kFailed;
  } else if (!slot.error && slot.written == layout_.batch_size) {
    slot.fill = Slot::Fill::kReady;
  }
  if (slot.fill != Slot::Fill::kFilling) tell_callers();
}

// What was filled, or is being filled, for `step` and after is filled anew.
void Streamer::refill_from(std::uint64_t step) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (timeline_.place(i).step < step) continue;
    if (slot.writers > 0) {
      slot.stale = true;
    } else {
      empty(slot);
    }
  }
  wake_one();
}

void Streamer::empty(Slot& slot) {
  slot.fill = Slot::Fill::kEmpty;
  slot.stale = false;
  slot.rows = nullptr;
  slot.error = nullptr;
}

bool Streamer::unclaimed(const Slot& slot) const {
  if (slot.fill == Slot::Fill::kEmpty) return true;
  return slot.fill == Slot::Fill::kFilling && !slot.stale && !slot.error &&
         slot.claimed < layout_.batch_size;
}

// To wake a thread costs the caller more than all else. While storage keeps up
// it is done for several batches at once.
bool Streamer::worth_waking() const {
  const auto work =
      std::count_if(slots_.begin(), slots_.end(),
                    [this](const Slot& slot) { return unclaimed(slot); });
  return pace_.ahead() ? work > 0
                       : 2 * static_cast<std::size_t>(work) >= slots_.size();
}

void Streamer::wake_one() {
  if (std::any_of(slots_.begin(), slots_.end(),
                  [this](const Slot& slot) { return unclaimed(slot); }) &&
      work_ready_.ring()) {
    work_ready_.wake_one();
  }
}

void Streamer::tell_callers() {
  batch_ready_.ring();
  batch_ready_.wake_all();
}

void Streamer::add_threads() {
  const std::size_t rows = slots_.size() * layout_.batch_size;
  const std::size_t wanted =
      std::min({2 * threads_.size(), std::size_t{most_threads_}, rows});
  try {
    while (threads_.size() < wanted) {
      threads_.emplace_back([this] { work(); });
    }
  } catch (const std::system_error&) {
    // The machine allows no more; those that there are do.
  }
}

// `briefly`: whether the wait before was so short that the next is worth a
// watch. A consumer that trains takes milliseconds, and is slept for.
void Streamer::wait_for_work(Lock& lock, bool& briefly) {
  constexpr std::chrono::microseconds kBrief{100};
  const auto begin = Clock::now();
  if (briefly && work_ready_.watch(lock)) return;
  if (!stopped_) work_ready_.sleep(lock);
  briefly = Clock::now() - begin < kBrief;
}

void Streamer::work() {
  Workspace workspace;
  bool briefly = false;
  Lock lock(mutex_);
  while (!stopped_) {
    bool worked = false;
    for (std::size_t i = 0; i < slots_.size() && !worked; ++i) {
      worked = work_on(slots_[i], i, lock, workspace);
    }
    if (!worked) wait_for_work(lock, briefly);
  }
}

std::uint64_t Streamer::window_of(const PlannedRow& row,
                                  Workspace& workspace) const {
  workspace.orders.resize(corpus_->domains());
  return orders_[row.domain].window(row.draw, workspace.orders[row.domain]);
}

std::uint32_t Streamer::shard_of(const PlannedRow& row,
                                 Workspace& workspace) const {
  const std::uint64_t window = window_of(row, workspace);
  return corpus_->first_shard(row.domain) +
         corpus_->locate(row.domain, window).shard;
}

// workspace.rows = those of the plan from `first` on, without buffers.
void Streamer::find_windows(const std::vector<PlannedRow>& rows,
                            std::uint64_t first, std::uint64_t count,
                            Workspace& workspace) const {
  workspace.orders.resize(corpus_->domains());
  workspace.rows.clear();
  workspace.tasks.clear();
  for (std::uint64_t i = first; i < first + count; ++i) {
    const auto [domain, draw] = rows[i];
    auto& cache = workspace.orders[domain];
    if (auto task = orders_[domain].task(draw, cache)) {
      workspace.tasks.push_back(*task);
      workspace.rows.push_back({domain, 0, {}});
    } else {
      workspace.rows.push_back(
          {domain, orders_[domain].window(draw, cache), {}});
    }
  }
  Permutation::run(workspace.tasks);
  // All orders shuffle alike: there is a task for each row, or for none.
  for (std::size_t i = 0; i < workspace.tasks.size(); ++i) {
    workspace.rows[i].window = workspace.tasks[i].index;
  }
}

void Streamer::write_rows(const std::vector<PlannedRow>& rows,
                          std::uint64_t first, Claim claim,
                          const BatchBuffers& buffers,
                          Workspace& workspace) const {
  const std::uint64_t rows_here = layout_.batch_size;
  const auto part = [rows_here](auto span, std::uint64_t i) {
    return span.empty() ? nullptr : span.data() + i * (span.size() / rows_here);
  };
  find_windows(rows, first + claim.first, claim.count, workspace);
  for (std::uint64_t i = claim.first; i < claim.first + claim.count; ++i) {
    RowRequest& request = workspace.rows[i - claim.first];
    request.buffers = {part(buffers.inputs, i), part(buffers.targets, i),
                       part(buffers.positions, i), part(buffers.documents, i)};
    buffers.domains[i] = request.domain;
  }
  corpus_->read_rows(workspace.rows, workspace.corpus);
}

}  // namespace mixloader
