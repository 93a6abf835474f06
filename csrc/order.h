// The order of a domain's windows: which window its n-th draw is, epoch after
// epoch. A pure function of seed, domain and shuffle, by random access;
// mixloader/reference.py is its specification.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "permute.h"

namespace mixloader {

// kNone: as on disk. kWindows: all windows of a domain, permuted anew in every
// epoch. kShards: the shards that give windows are permuted and cut into blocks
// of `together` (at least 1); windows are permuted within a block, so that few
// shards are in use at a time.
struct Shuffle {
  enum class Kind { kNone, kWindows, kShards };
  Kind kind = Kind::kWindows;
  std::uint64_t together = 0;
};

// A shard that will be read: after so many draws, or possibly later.
struct UpcomingShard {
  std::uint64_t draws_ahead;
  std::uint32_t shard;
};

class WindowOrder {
 public:
  class Epoch;

  // What a thread keeps between calls: keys and tables of the epochs in use.
  // Prefetching threads cross the end of an epoch to and fro, hence two.
  struct Cache {
    std::optional<Permutation> permutation;
    std::array<std::shared_ptr<Epoch>, 2> epochs;
  };

  // window_ends: windows up to and including each shard of the domain, one
  // window or more in all; a shard may have none. The span must outlive this.
  WindowOrder(std::uint64_t seed, std::uint64_t key,
              std::span<const std::uint64_t> window_ends, Shuffle shuffle);

  // Windows in one epoch.
  std::uint64_t windows() const { return window_ends_.back(); }

  // The window (counted through the shards) of a draw (counted through the
  // epochs). Thread-safe, with a cache a thread.
  std::uint64_t window(std::uint64_t draw, Cache& cache) const;
  // The same but for the last step, so that it can be taken for many draws at
  // once: window(draw) is the index of the task once it was run. nullopt where
  // there is no such step.
  std::optional<Permutation::Task> task(std::uint64_t draw, Cache& cache) const;

  // Shards that the draws from `draw` on need, each once, `limit` at most, in
  // the order of their first need as far as it is known. kNone and kShards:
  // every shard that gives windows, into the next epoch; of the shards of one
  // block those first that the draws looked at need first. kWindows: those that
  // the next draws need, of which 16 a shard asked for are looked at.
  std::vector<UpcomingShard> upcoming(std::uint64_t draw, std::uint64_t limit,
                                      Cache& cache) const;

 private:
  class Shards;

  Epoch& epoch(std::uint64_t number, Cache& cache) const;
  std::uint32_t shard_of(std::uint64_t window) const;
  void look_ahead(std::uint64_t draw, std::uint64_t draws, Cache& cache,
                  Shards& found) const;

  std::uint64_t seed_;
  std::uint64_t key_;
  std::span<const std::uint64_t> window_ends_;
  Shuffle shuffle_;
  // kNone and kShards: those that give windows.
  std::vector<std::uint32_t> shards_;
};

}  // namespace mixloader
