#include "order.h"

namespace mixloader {

WindowOrder::WindowOrder(std::uint64_t seed, std::uint64_t key,
                         std::span<const std::uint64_t> window_ends,
                         Shuffle shuffle)
    : seed_(seed), key_(key), window_ends_(window_ends), shuffle_(shuffle) {}

std::uint64_t WindowOrder::window(std::uint64_t draw, Cache& cache) const {
  const std::uint64_t epoch = draw / windows();
  if (!cache.permutation || cache.permutation->epoch() != epoch) {
    cache.permutation.emplace(seed_, key_, epoch, windows());
  }
  return (*cache.permutation)(draw % windows());
}

}  // namespace mixloader
