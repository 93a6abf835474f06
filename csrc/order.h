// The order of a domain's windows: which window its n-th draw is, epoch after
// epoch. A pure function of seed, domain and shuffle, by random access.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "permute.h"

namespace mixloader {

// kNone: as on disk. kWindows: all windows of a domain, permuted anew in every
// epoch. kShards: the shards are permuted and cut into blocks of `together`;
// windows are permuted within a block, so that few shards are in use at a time.
struct Shuffle {
  enum class Kind { kNone, kWindows, kShards };
  Kind kind = Kind::kWindows;
  std::uint64_t together = 0;
};

class WindowOrder {
 public:
  // What a thread keeps between calls: tables and keys of the epoch in use.
  struct Cache {
    std::optional<Permutation> permutation;
  };

  // window_ends: windows up to and including each shard of the domain. The
  // span must outlive this.
  WindowOrder(std::uint64_t seed, std::uint64_t key,
              std::span<const std::uint64_t> window_ends, Shuffle shuffle);

  // Windows in one epoch.
  std::uint64_t windows() const { return window_ends_.back(); }

  // The window (counted through the shards) of a draw (counted through the
  // epochs).
  std::uint64_t window(std::uint64_t draw, Cache& cache) const;

 private:
  std::uint64_t seed_;
  std::uint64_t key_;
  std::span<const std::uint64_t> window_ends_;
  Shuffle shuffle_;
};

}  // namespace mixloader
