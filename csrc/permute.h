// A keyed permutation of [0, n) that needs no table: the order of a domain's
// windows in one epoch, by random access.
//
// A Feistel network on Z_a x Z_b with a = ceil(sqrt(n)) and b = ceil(n / a);
// a * b exceeds n by less than a, so walking the cycle back into [0, n) almost
// never takes a second turn.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace mixloader {

class Permutation {
 public:
  // n in [1, 2^62]; `domain_key` and `epoch` (below 2^56) choose one
  // permutation, as `seed` does.
  Permutation(std::uint64_t seed, std::uint64_t domain_key, std::uint64_t epoch,
              std::uint64_t n);

  std::uint64_t operator()(std::uint64_t index) const;

  std::uint64_t epoch() const { return epoch_; }

  // An index, and the permutation that it is to go through.
  struct Task;
  // index = permutation(index), for all of them: several go in step, which
  // takes a third of the time, for one alone waits for its own arithmetic.
  static void run(std::span<Task> tasks);

 private:
  // Once through the rounds, each index by the permutation of its own.
  template <std::size_t kLanes>
  static std::array<std::uint64_t, kLanes> turn(
      const std::array<const Permutation*, kLanes>& permutations,
      std::array<std::uint64_t, kLanes> x);

  // With 8 rounds the orders of 5 or 6 windows were far from equally likely
  // (chi-square 69 and 139 standard deviations off), with 12 still 4 and 8,
  // with 16 within 2; a round costs about 2 ns.
  static constexpr int kRounds = 16;

  std::uint64_t epoch_;
  std::uint64_t n_;
  std::uint64_t a_;
  std::uint64_t b_;
  std::array<std::uint32_t, kRounds> keys_;
};

struct Permutation::Task {
  Permutation permutation;
  std::uint64_t index;
};

}  // namespace mixloader
