// Threads that fill the caller's buffers with the micro-batches of one rank, in
// order, ahead of the consumer; the mixture may change at any step not begun.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "bell.h"
#include "corpus.h"
#include "order.h"
#include "pace.h"
#include "read_ahead.h"
#include "timeline.h"

namespace mixloader {

// Buffers of one micro-batch of B rows of T tokens. inputs [B, T], or [B, T +
// 1] if inputs and targets share it; targets [B, T]; domains [B]; positions and
// documents [B, T], where asked for.
struct BatchBuffers {
  std::span<std::byte> inputs;
  std::span<std::byte> targets;
  std::span<std::int64_t> domains;
  std::span<std::int64_t> positions;
  std::span<std::int32_t> documents;
};

// A batch handed over.
struct Batch {
  bool end = false;  // the stream has ended: there is no batch
  std::uint64_t step = 0;
  std::uint64_t micro_batch = 0;
  std::uint64_t weights_version = 0;
  std::uint64_t fill = 0;   // see peek()
  std::uint64_t ready = 0;  // batches behind it that are ready, too
};

// Threads that read. `most` above `first`: more are started when the consumer
// waits for storage. 0: batches are filled by the thread that calls next().
struct Threads {
  unsigned first;
  unsigned most;
};

// A shard that will be needed, and how many rows (of all ranks) ahead; infinite
// for a domain that has no weight.
struct ShardAhead {
  double rows;
  std::uint32_t shard;
};

class Streamer {
 public:
  Streamer(std::unique_ptr<const Corpus> corpus, std::uint64_t seed,
           Shuffle shuffle, PlanRules rules, Layout layout,
           std::vector<std::int64_t> units, Threads threads);
  ~Streamer();
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;

  // Queues buffers behind those already queued. They are written to until the
  // next() that returns them, or until destruction.
  void submit(BatchBuffers buffers);

  // Waits up to `timeout` for the batch in the oldest buffers, unless the
  // stream has ended. Nothing is consumed until take(). An error that hit this
  // batch is thrown here; the batch stays next, and the following call reads it
  // anew. nullopt: not ready yet. With a timeout of zero it only looks, and
  // reads nothing.
  std::optional<Batch> next(std::chrono::milliseconds timeout);

  // Consumes the batch in the oldest buffers, and gives them up, if `fill` is
  // the number of their fill; says whether it is.
  bool take(std::uint64_t fill);

  // The next batch: its step, and its micro-batch.
  std::pair<std::uint64_t, std::uint64_t> position() const;

  // The number of the fill in the oldest buffers, if they are ready. No two
  // fills have the same: if the next() that follows returns another, a change
  // of weights or of state had the buffers filled anew.
  std::optional<std::uint64_t> peek() const;

  // Changes the mixture from `step` on, or from the first step not begun.
  // Returns that step. Throws WeightsError if `step` has begun.
  std::uint64_t set_weights(std::vector<std::int64_t> units,
                            std::optional<std::uint64_t> step);

  // Passes over n steps unread, fewer where the stream ends; returns the step
  // that is next. Throws StateError inside a step.
  std::uint64_t skip(std::uint64_t n);

  // The first step not begun, and the weights of any step from there on.
  std::uint64_t step() const;
  std::vector<std::int64_t> weights_at(std::uint64_t step) const;

  StreamState state() const;
  void load_state(StreamState state);

  // The shards to fetch that the stream needs next, `limit` at most, as things
  // stand: soonest first.
  std::vector<ShardAhead> upcoming(std::uint64_t limit) const;

  const Corpus& corpus() const { return *corpus_; }

  // Ends and joins the threads; a next() that waits, and any later one, throws.
  void stop();

 private:
  using Clock = Bell::Clock;

  // Buffers, and how far they are filled. Rows are claimed in order, some at a
  // time, by whichever threads are free.
  struct Slot {
    enum class Fill { kEmpty, kFilling, kReady, kFailed, kEnd };
    BatchBuffers buffers;
    Fill fill = Fill::kEmpty;
    std::uint64_t number = 0;  // of this fill
    std::uint64_t version = 0;
    std::uint64_t micro_batch = 0;
    PlannedRows rows;  // of the step
    std::uint64_t claimed = 0;
    std::uint64_t written = 0;
    unsigned writers = 0;  // threads at work on it
    bool stale = false;    // planned with old weights: empty when they are done
    std::uint64_t error_row = 0;
    std::exception_ptr error;  // of the first row that has one
  };
  // A thread's own: orders in use and what reads need.
  struct Workspace {
    std::vector<WindowOrder::Cache> orders;
    std::vector<RowRequest> rows;
    std::vector<Permutation::Task> tasks;
    Corpus::Workspace corpus;
  };
  struct Claim {
    std::uint64_t first;
    std::uint64_t count;
  };
  using Lock = Bell::Lock;

  // All below are called with the lock held; those that take it let go of it
  // while they plan, read or wait.
  bool work_on(Slot& slot, std::size_t index, Lock& lock, Workspace& workspace);
  bool help(Lock& lock, Clock::time_point deadline);
  void plan_for(Slot& slot, Lock& lock);
  void begin_fill(Slot& slot, const StepPlan& plan, std::uint64_t micro_batch);
  std::uint64_t first_row(const Slot& slot) const;  // within its step
  Claim next_claim(const Slot& slot) const;
  void write_some(Slot& slot, Lock& lock, Workspace& workspace);
  void finish(Slot& slot, Claim claim, std::exception_ptr error);
  void refill_from(std::uint64_t step);
  void empty(Slot& slot);
  bool unclaimed(const Slot& slot) const;
  bool worth_waking() const;
  void wake_one();
  void tell_callers();
  void wait_for_work(Lock& lock, bool& briefly);
  void add_threads();
  void work();

  // Without the lock.
  std::uint64_t window_of(const PlannedRow& row, Workspace& workspace) const;
  std::uint32_t shard_of(const PlannedRow& row, Workspace& workspace) const;
  void find_windows(const std::vector<PlannedRow>& rows, std::uint64_t first,
                    std::uint64_t count, Workspace& workspace) const;
  void write_rows(const std::vector<PlannedRow>& rows, std::uint64_t first,
                  Claim claim, const BatchBuffers& buffers,
                  Workspace& workspace) const;

  const std::unique_ptr<const Corpus> corpus_;
  const Layout layout_;
  const unsigned most_threads_;
  std::vector<WindowOrder> orders_;

  mutable std::mutex mutex_;
  Bell work_ready_;   // for threads_
  Bell batch_ready_;  // for callers of next()
  bool stopped_ = false;
  bool planning_ = false;  // some thread draws the next plan
  bool helping_ = false;   // some caller has caller_workspace_
  std::uint64_t fills_ = 0;
  Pace pace_;
  ReadAhead read_ahead_;  // used while planning_
  Timeline timeline_;
  std::deque<Slot> slots_;  // oldest first; references outlive push and pop
  Workspace caller_workspace_;
  std::vector<std::jthread> threads_;  // last: they use all of the above
};

}  // namespace mixloader
