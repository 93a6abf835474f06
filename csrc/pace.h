// How fast rows come from storage. It decides how work is shared out and how
// far ahead it is asked for, never what is read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace mixloader {

class Pace {
 public:
  explicit Pace(std::uint64_t seq_len)
      : slow_ns_(kSeekNs + kTokenNs * static_cast<double>(seq_len)) {}

  // `rows` were read in `time`, by one thread.
  void record(std::chrono::nanoseconds time, std::uint64_t rows) {
    const double sample =
        static_cast<double>(time.count()) / static_cast<double>(rows);
    if (row_ns_ == 0) {
      row_ns_ = sample;
    } else {
      row_ns_ *= sample > row_ns_ ? kStep : 1 / kStep;
    }
    fast_ = slow() ? 0 : std::min(fast_ + 1, kSettled);
  }

  // Rows wait for storage, not for the processor.
  bool slow() const { return row_ns_ > slow_ns_; }

  // They do, or did until lately. What is asked for ahead comes fast: that it
  // does is no reason to stop asking at once.
  bool ahead() const { return row_ns_ > 0 && fast_ < kSettled; }

  // Rows of a batch that a thread takes at a time: as many as cost well over
  // what sharing does, and all threads can help with one slow batch.
  std::uint64_t chunk() const {
    return row_ns_ == 0
               ? 1
               : static_cast<std::uint64_t>(std::max(1.0, kChunkNs / row_ns_));
  }

 private:
  // From the page cache a row takes about 1 us and 1 ns a token; from a fast
  // disk 100 us.
  static constexpr double kSeekNs = 20e3;
  static constexpr double kTokenNs = 4;
  static constexpr double kChunkNs = 25e3;
  // The estimate follows the median by a factor: a thread that lost its
  // processor for a while does not make storage slow.
  static constexpr double kStep = 1.25;
  static constexpr int kSettled = 512;  // chunks

  double slow_ns_;
  double row_ns_ = 0;
  int fast_ = kSettled;
};

}  // namespace mixloader
