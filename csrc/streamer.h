// Threads that fill the caller's buffers with the micro-batches of one rank, in
// order, ahead of the consumer; the mixture may change at any step not begun.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "corpus.h"
#include "order.h"
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

struct BatchPosition {
  bool end = false;  // the stream has ended: there is no batch
  std::uint64_t step = 0;
  std::uint64_t micro_batch = 0;
  std::uint64_t weights_version = 0;
};

// Integer weights from some step on, until the next change.
struct Weights {
  std::uint64_t version;
  std::vector<std::int64_t> units;
};

// Where a stream stands: what was consumed, not what was read ahead.
struct StreamState {
  PlanState plan;             // as it was before the step that is under way
  std::uint64_t rows = 0;     // rows of that step consumed, over all ranks
  std::uint64_t version = 0;  // weight changes asked for so far
  // By step: those that the last step drawn had, in force now, and to come.
  std::map<std::uint64_t, Weights> weights;
};

class Streamer {
 public:
  // threads 0: batches are filled by the thread that calls next().
  Streamer(std::unique_ptr<const Corpus> corpus, std::uint64_t seed,
           Shuffle shuffle, PlanRules rules, Layout layout,
           std::vector<std::int64_t> units, unsigned threads);
  ~Streamer();
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;

  // Queues buffers behind those already queued. They are written to until the
  // next() that returns them, or until destruction.
  void submit(BatchBuffers buffers);

  // Waits up to `timeout` for the batch in the oldest buffers, and gives them
  // up. An error that hit this batch is thrown here; the batch stays next, and
  // the following call reads it anew. nullopt: not ready yet.
  std::optional<BatchPosition> next(std::chrono::milliseconds timeout);

  // Changes the mixture from `step` on, or from the first step not begun.
  // Returns that step. Throws WeightsError if `step` has begun.
  std::uint64_t set_weights(std::vector<std::int64_t> units,
                            std::optional<std::uint64_t> step);

  // The first step not begun, and the weights of any step from there on.
  std::uint64_t step() const;
  std::vector<std::int64_t> weights_at(std::uint64_t step) const;

  StreamState state() const;
  void load_state(StreamState state);

  const Corpus& corpus() const { return *corpus_; }

  // Ends and joins the threads; a next() that waits, and any later one, throws.
  void stop();

 private:
  enum class Fill { kEmpty, kFilling, kReady, kFailed };
  struct Slot {
    BatchBuffers buffers;
    Fill fill = Fill::kEmpty;
    bool stale = false;  // its contents were planned with old weights
    std::exception_ptr error;
  };
  struct PlannedStep {
    PlanState before;
    std::shared_ptr<const std::vector<PlannedRow>> rows;
    std::uint64_t weights_version;
  };
  // The worker's own: orders in use and the buffer that reads go to.
  struct Workspace {
    std::vector<WindowOrder::Cache> orders;
    std::vector<RowRequest> rows;
    Corpus::Workspace corpus;
  };

  // All below are called with the mutex held.
  BatchPosition position(std::size_t slot_index) const;
  const PlannedStep& planned(std::uint64_t step);
  const Weights& weights_in_force(std::uint64_t step) const;
  std::uint64_t first_open_step() const;
  void forget_plans_from(std::uint64_t step);
  void fill_slot(std::unique_lock<std::mutex>& lock, std::size_t slot_index,
                 Workspace& workspace);

  void write_batch(const std::vector<PlannedRow>& rows,
                   std::uint64_t micro_batch, const BatchBuffers& buffers,
                   Workspace& workspace) const;
  void work(std::stop_token stop);

  const std::unique_ptr<const Corpus> corpus_;
  const std::uint64_t seed_;
  const PlanRules rules_;
  const Layout layout_;
  std::vector<WindowOrder> orders_;

  mutable std::mutex mutex_;
  std::condition_variable_any work_ready_;
  std::condition_variable batch_ready_;
  bool stopped_ = false;
  std::uint64_t head_step_ = 0;         // of the oldest slot
  std::uint64_t head_micro_batch_ = 0;  // of the oldest slot
  std::uint64_t version_ = 0;
  std::map<std::uint64_t, Weights> weights_;
  PlanState unplanned_;              // before the first step not in planned_
  std::deque<PlannedStep> planned_;  // head_step_, head_step_ + 1, ...
  std::deque<std::shared_ptr<Slot>> slots_;
  Workspace own_workspace_;
  std::vector<std::jthread> threads_;  // last: they use all of the above
};

}  // namespace mixloader
