// What a row is written as.
#pragma once

#include <cstddef>
#include <cstdint>

#include "widen.h"

namespace mixloader {

// Where documents begin: not asked, from the shard's table (or its extents),
// after each end-of-text token, or at each of them.
enum class Boundaries { kNone, kIndex, kAfterEot, kAtEot };

// What is written for each row.
struct RowFormat {
  TokenType inputs = TokenType::kInt64;
  TokenType targets = TokenType::kInt64;
  // One buffer of seq_len + 1 tokens, no targets of its own.
  bool shared = false;
  Boundaries boundaries = Boundaries::kNone;
  std::uint64_t eot = 0;
  bool mask_targets = false;  // -100 where a target begins another document
};

inline constexpr std::int64_t kMaskedTarget = -100;

// A row's buffers of seq_len entries (inputs: one more if shared); positions
// and documents may be null.
struct RowBuffers {
  std::byte* inputs;
  std::byte* targets;
  std::int64_t* positions;  // within the document
  std::int32_t* documents;  // counted within the row, from 0
};

}  // namespace mixloader
