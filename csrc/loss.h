// Cross-entropy of rows of logits, its gradient, and sums for each domain: what
// mixloader/loss_path.py says of a path, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "loss_kernels.h"

namespace mixloader {

// As LossOptions of loss_path.py; softcap is 0 for none.
struct LossOptions {
  std::int64_t ignore_index;
  float label_smoothing;
  float z_loss;
  float softcap;
  bool distribution;
};

// int32 or int64 numbers.
class Ids {
 public:
  Ids() = default;
  explicit Ids(std::span<const std::int32_t> ids)
      : data_(ids.data()), size_(ids.size()), wide_(false) {}
  explicit Ids(std::span<const std::int64_t> ids)
      : data_(ids.data()), size_(ids.size()), wide_(true) {}

  std::size_t size() const { return size_; }
  std::int64_t operator[](std::size_t i) const {
    return wide_ ? static_cast<const std::int64_t*>(data_)[i]
                 : static_cast<const std::int32_t*>(data_)[i];
  }

 private:
  const void* data_ = nullptr;
  std::size_t size_ = 0;
  bool wide_ = false;
};

// Rows of logits, or of their gradient: neighbouring elements `stride` bytes
// from row to row.
template <typename Byte>
struct Rows {
  Byte* first = nullptr;
  std::ptrdiff_t stride = 0;

  explicit operator bool() const { return first != nullptr; }
  Byte* operator[](std::size_t row) const {
    return first + static_cast<std::ptrdiff_t>(row) * stride;
  }
};

// One call. The spans of what was not given are empty; those of a number for
// each row have the size of `targets`.
struct LossCall {
  LogitType type;
  std::size_t classes;  // at least 1
  Rows<const std::byte> logits;
  Ids targets;
  Ids domain_ids;  // each for so many rows:
  std::size_t rows_per_id = 1;
  std::span<const float> token_weights;
  std::span<const float> domain_weights;  // of each domain
  std::span<const float> reference_losses;
  std::span<const std::int32_t> token_bytes;  // of each class
  // Written with the first two numbers of RowSums of each row: forward. Without
  // `losses` these are read instead of being computed: backward.
  std::span<float> losses;
  std::span<float> tops;
  std::span<float> totals;
  Rows<std::byte> gradient;      // of sum(scale * losses); may be the logits
  std::span<const float> scale;  // one for all rows, or one for each
  std::span<std::int64_t>
      sums;  // [D + 1, kStatistics] as in stats.py, added to
  LossOptions options;
};

// Columns of `sums`.
constexpr std::size_t kStatistics = 9;

// Computes the call on up to so many threads, this one among them. What it
// computes does not depend on their number.
void compute_loss(const LossCall& call, const LossLevel& level,
                  unsigned threads);

}  // namespace mixloader
