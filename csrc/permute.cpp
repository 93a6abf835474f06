#include "permute.h"

#include <cmath>

#include "philox.h"

namespace mixloader {
namespace {

// Keeps the stream of round keys apart from the planner's, which uses the seed
// itself as the Philox key.
constexpr std::uint64_t kRoundKeyStream = 0x9E3779B97F4A7C15;

std::uint64_t ceil_sqrt(std::uint64_t n) {
  auto root =
      static_cast<std::uint64_t>(std::sqrt(static_cast<long double>(n)));
  while (root * root >= n && root > 0) --root;
  while (root * root < n) ++root;
  return root;
}

// The finalizer of splitmix64 over (key, value), of which 32 bits are kept.
std::uint32_t mix(std::uint32_t key, std::uint64_t value) {
  std::uint64_t z = (std::uint64_t{key} << 32) ^ value;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return static_cast<std::uint32_t>((z ^ (z >> 31)) >> 32);
}

}  // namespace

Permutation::Permutation(std::uint64_t seed, std::uint64_t domain_key,
                         std::uint64_t epoch, std::uint64_t n)
    : epoch_(epoch), n_(n), a_(ceil_sqrt(n)), b_((n + a_ - 1) / a_) {
  for (std::uint32_t block = 0; block < kRounds / 4; ++block) {
    const auto words =
        philox(seed ^ kRoundKeyStream, {low(epoch), (high(epoch) << 8) | block,
                                        low(domain_key), high(domain_key)});
    for (std::uint32_t i = 0; i < 4; ++i) keys_[4 * block + i] = words[i];
  }
}

template <std::size_t kLanes>
std::array<std::uint64_t, kLanes> Permutation::turn(
    const std::array<const Permutation*, kLanes>& permutations,
    std::array<std::uint64_t, kLanes> x) {
  std::array<std::uint64_t, kLanes> left, right, a, b;
  for (std::size_t i = 0; i < kLanes; ++i) {
    a[i] = permutations[i]->a_;
    b[i] = permutations[i]->b_;
    left[i] = x[i] / b[i];
    right[i] = x[i] % b[i];
  }
  for (std::size_t round = 0; round < kRounds; round += 2) {
    for (std::size_t i = 0; i < kLanes; ++i) {
      left[i] += scale(mix(permutations[i]->keys_[round], right[i]), a[i]);
      if (left[i] >= a[i]) left[i] -= a[i];
    }
    for (std::size_t i = 0; i < kLanes; ++i) {
      right[i] += scale(mix(permutations[i]->keys_[round + 1], left[i]), b[i]);
      if (right[i] >= b[i]) right[i] -= b[i];
    }
  }
  for (std::size_t i = 0; i < kLanes; ++i) x[i] = left[i] * b[i] + right[i];
  return x;
}

std::uint64_t Permutation::operator()(std::uint64_t index) const {
  do {
    index = turn<1>({this}, {index})[0];
  } while (index >= n_);
  return index;
}

void Permutation::run(std::span<Task> tasks) {
  constexpr std::size_t kLanes = 4;
  while (tasks.size() >= kLanes) {
    std::array<const Permutation*, kLanes> permutations;
    std::array<std::uint64_t, kLanes> x;
    for (std::size_t i = 0; i < kLanes; ++i) {
      permutations[i] = &tasks[i].permutation;
      x[i] = tasks[i].index;
    }
    x = turn<kLanes>(permutations, x);
    for (std::size_t i = 0; i < kLanes; ++i) {
      const Permutation& permutation = tasks[i].permutation;
      tasks[i].index = x[i] < permutation.n_ ? x[i] : permutation(x[i]);
    }
    tasks = tasks.subspan(kLanes);
  }
  for (Task& task : tasks) task.index = task.permutation(task.index);
}

}  // namespace mixloader
