#include "order.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <utility>

namespace mixloader {
namespace {

// Draws that upcoming() looks at for each shard that it may find by them.
constexpr std::uint64_t kLooks = 16;

std::uint64_t first_window(std::span<const std::uint64_t> ends,
                           std::uint32_t shard) {
  return shard == 0 ? 0 : ends[shard - 1];
}

}  // namespace

// One epoch under kShards: the shards in its order, in blocks.
class WindowOrder::Epoch {
 public:
  Epoch(std::uint64_t number, const WindowOrder& order)
      : number_(number),
        seed_(order.seed_),
        key_(order.key_),
        together_(static_cast<std::size_t>(std::min<std::uint64_t>(
            order.shuffle_.together, order.shards_.size()))),
        window_ends_(order.window_ends_) {
    const std::size_t n = order.shards_.size();
    const Permutation permutation(seed_, key_, number, n);
    std::uint64_t end = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint32_t shard = order.shards_[permutation(i)];
      shards_.push_back(shard);
      end += window_ends_[shard] - first_window(window_ends_, shard);
      ends_.push_back(end);
    }
  }

  std::uint64_t number() const { return number_; }
  // In the order of this epoch.
  const std::vector<std::uint32_t>& shards() const { return shards_; }

  // Shards first_shard to last_shard (excluded) of that order, which give
  // `size` draws, from the first-th of the epoch on.
  struct Block {
    std::size_t first_shard, last_shard;
    std::uint64_t first, size;
  };
  Block block_of_shard(std::size_t shard) const {
    const std::size_t first = shard - shard % together_;
    const std::size_t last = std::min(first + together_, shards_.size());
    const std::uint64_t begin = first == 0 ? 0 : ends_[first - 1];
    return {first, last, begin, ends_[last - 1] - begin};
  }
  Block block_of_draw(std::uint64_t index) const {
    const auto end = std::upper_bound(ends_.begin(), ends_.end(), index);
    return block_of_shard(static_cast<std::size_t>(end - ends_.begin()));
  }

  std::uint64_t window(std::uint64_t index) {
    if (!permutation_ || index - block_.first >= block_.size) {
      block_ = block_of_draw(index);
      // The shards are permuted with the domain's key, each block with one of
      // its own.
      permutation_.emplace(seed_, key_ + 1 + block_.first_shard / together_,
                           number_, block_.size);
    }
    const std::uint64_t place =
        block_.first + (*permutation_)(index - block_.first);
    const auto shard = static_cast<std::size_t>(
        std::upper_bound(ends_.data() + block_.first_shard,
                         ends_.data() + block_.last_shard, place) -
        ends_.data());
    const std::uint64_t before = shard == 0 ? 0 : ends_[shard - 1];
    return first_window(window_ends_, shards_[shard]) + place - before;
  }

 private:
  std::uint64_t number_;
  std::uint64_t seed_;
  std::uint64_t key_;
  std::size_t together_;
  std::span<const std::uint64_t> window_ends_;
  std::vector<std::uint32_t> shards_;
  std::vector<std::uint64_t> ends_;  // draws up to and including each of these
  Block block_{};                    // in use, with its permutation
  std::optional<Permutation> permutation_;
};

// The shards found so far, each once.
class WindowOrder::Shards {
 public:
  Shards(std::size_t shards, std::uint64_t limit)
      : seen_(shards, false), limit_(std::min<std::uint64_t>(limit, shards)) {}

  std::uint64_t limit() const { return limit_; }

  bool full() const { return found_.size() >= limit_; }
  void add(std::uint32_t shard, std::uint64_t draws_ahead) {
    if (full() || seen_[shard]) return;
    seen_[shard] = true;
    found_.push_back({draws_ahead, shard});
  }
  std::vector<UpcomingShard> take() { return std::move(found_); }

 private:
  std::vector<bool> seen_;
  std::vector<UpcomingShard> found_;
  std::uint64_t limit_;
};

WindowOrder::WindowOrder(std::uint64_t seed, std::uint64_t key,
                         std::span<const std::uint64_t> window_ends,
                         Shuffle shuffle)
    : seed_(seed), key_(key), window_ends_(window_ends), shuffle_(shuffle) {
  if (shuffle.kind == Shuffle::Kind::kWindows) return;
  if (shuffle.kind == Shuffle::Kind::kShards && shuffle.together == 0) {
    throw std::invalid_argument(
        "shards shuffled in blocks of none; a block has one shard or more");
  }
  for (std::uint32_t shard = 0; shard < window_ends.size(); ++shard) {
    if (window_ends[shard] > first_window(window_ends, shard)) {
      shards_.push_back(shard);
    }
  }
}

std::uint64_t WindowOrder::window(std::uint64_t draw, Cache& cache) const {
  if (const auto last = task(draw, cache))
    return last->permutation(last->index);
  const std::uint64_t index = draw % windows();
  return shuffle_.kind == Shuffle::Kind::kNone
             ? index
             : epoch(draw / windows(), cache).window(index);
}

std::optional<Permutation::Task> WindowOrder::task(std::uint64_t draw,
                                                   Cache& cache) const {
  if (shuffle_.kind != Shuffle::Kind::kWindows) return std::nullopt;
  const std::uint64_t number = draw / windows();
  if (!cache.permutation || cache.permutation->epoch() != number) {
    cache.permutation.emplace(seed_, key_, number, windows());
  }
  return Permutation::Task{*cache.permutation, draw % windows()};
}

std::vector<UpcomingShard> WindowOrder::upcoming(std::uint64_t draw,
                                                 std::uint64_t limit,
                                                 Cache& cache) const {
  Shards found(window_ends_.size(), limit);
  const std::uint64_t number = draw / windows();
  const std::uint64_t index = draw % windows();
  if (shuffle_.kind == Shuffle::Kind::kWindows) {
    look_ahead(draw, kLooks * found.limit(), cache, found);
  } else if (shuffle_.kind == Shuffle::Kind::kNone) {
    const auto current =
        std::lower_bound(shards_.begin(), shards_.end(), shard_of(index));
    for (auto shard = current; shard != shards_.end(); ++shard) {
      const std::uint64_t first = first_window(window_ends_, *shard);
      found.add(*shard, first > index ? first - index : 0);
    }
    for (auto shard = shards_.begin(); shard != current; ++shard) {
      found.add(*shard, windows() - index + first_window(window_ends_, *shard));
    }
  } else {
    const Epoch& now = epoch(number, cache);
    const Epoch::Block block = now.block_of_draw(index);
    const std::uint64_t rest = block.first + block.size - index;
    const std::uint64_t looked =
        std::min(rest, kLooks * (block.last_shard - block.first_shard));
    look_ahead(draw, looked, cache, found);
    if (looked < rest) {  // one of these draws may need any shard of the block
      for (auto i = block.first_shard; i < block.last_shard; ++i) {
        found.add(now.shards()[i], looked);
      }
    }
    for (auto i = block.last_shard; i < shards_.size() && !found.full(); ++i) {
      found.add(now.shards()[i], now.block_of_shard(i).first - index);
    }
    if (found.full()) return found.take();
    const Epoch& next = epoch(number + 1, cache);
    for (std::size_t i = 0; i < shards_.size() && !found.full(); ++i) {
      found.add(next.shards()[i],
                windows() - index + next.block_of_shard(i).first);
    }
  }
  return found.take();
}

void WindowOrder::look_ahead(std::uint64_t draw, std::uint64_t draws,
                             Cache& cache, Shards& found) const {
  for (std::uint64_t i = 0; i < draws && !found.full(); ++i) {
    found.add(shard_of(window(draw + i, cache)), i);
  }
}

WindowOrder::Epoch& WindowOrder::epoch(std::uint64_t number,
                                       Cache& cache) const {
  std::shared_ptr<Epoch>& kept = cache.epochs[number % 2];
  if (!kept || kept->number() != number) {
    kept = std::make_shared<Epoch>(number, *this);
  }
  return *kept;
}

std::uint32_t WindowOrder::shard_of(std::uint64_t window) const {
  return static_cast<std::uint32_t>(
      std::upper_bound(window_ends_.begin(), window_ends_.end(), window) -
      window_ends_.begin());
}

}  // namespace mixloader
