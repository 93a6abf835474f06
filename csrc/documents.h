// Where documents begin within a row, and what is written of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "file.h"
#include "row.h"
#include "shard.h"

namespace mixloader {

// A document of a shard: its number, and its first token.
struct DocumentPlace {
  std::uint64_t number;
  std::uint64_t token;
};

// A shard's table of the tokens at which documents begin, searched on the disk.
// Token 0 is always a beginning, listed or not; equal entries are empty
// documents.
class DocumentTable {
 public:
  // Throws ShardError if the file is too short for the table.
  DocumentTable(const Shard& shard, const File& file);

  // Appends those of the tokens (after, up_to] at which a document begins, each
  // once, less `after`. Throws ShardError for entries that are no ascending
  // tokens of the shard.
  void append_starts(std::uint64_t after, std::uint64_t up_to,
                     std::vector<std::uint64_t>& starts) const;

  // The document that holds a token.
  DocumentPlace find(std::uint64_t token) const;

 private:
  static constexpr std::size_t kBlock = 512;  // entries read at a time
  struct Block;

  void load(std::uint64_t first, Block& block) const;
  // The first entry beyond `token`; `block` holds it, if there is one.
  std::uint64_t upper_bound(std::uint64_t token, Block& block) const;

  const Shard& shard_;
  const NumberTable& table_;
  const File& file_;
};

// The same from a shard's extents, where these are its documents.
void append_extent_starts(const Shard& shard, std::uint64_t after,
                          std::uint64_t up_to,
                          std::vector<std::uint64_t>& starts);

// The same from the n ids of `width` bytes of a row: a document begins after
// each `eot`, or at it, but for the first id.
void append_eot_starts(const std::byte* ids, std::size_t width, std::size_t n,
                       std::uint64_t eot, bool at_eot,
                       std::vector<std::uint64_t>& starts);

// Writes the positions, the document ids and the masked targets of a row of
// seq_len, at whose ids `starts` (ascending, from 1 to seq_len) documents
// begin.
void write_documents(std::span<const std::uint64_t> starts,
                     std::uint64_t seq_len, const RowFormat& format,
                     const RowBuffers& row);

}  // namespace mixloader
