// Best-fit decreasing packing of a shard's documents, written as a sidecar.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "packing.h"

namespace mixloader {

// Takes the documents of a shard in order and writes their rows to a file.
//
// A document's whole multiples of seq_len become rows of one piece at once.
// What remains of each (all of a short document) is gathered for a block of
// documents and packed: longest first, each into the row that it leaves
// fullest, or into a new one. Equal rows: the one last added to. Pieces stand
// in a row as they stand in the shard.
class RowPacker {
 public:
  // Documents of a block. More fill rows better, fewer keep a row's pieces
  // closer together in the file. With lengths such as texts have, a block of
  // 2^10 leaves up to 5 % of the slots of 8192 empty, 2^16 at most 0.1 %.
  static constexpr std::size_t kBlock = 1 << 16;

  // Writes from byte 0 of an empty file; `path` is for messages. The caller
  // keeps the descriptor, syncs and closes it.
  RowPacker(int descriptor, std::string path, std::uint64_t seq_len,
            std::uint64_t tokens, std::array<std::uint64_t, 2> fingerprint);

  // The next document, tokens [begin, end). Throws ShardError.
  void add(std::uint64_t begin, std::uint64_t end);

  // Packs the last block, writes the directory of rows and, last of all, the
  // header. Throws ShardError.
  PackingHeader finish();

 private:
  void pack_block();
  void add_row(std::span<const Piece> pieces);
  void write_buffer();
  void write(std::span<const std::byte> bytes, std::uint64_t offset);

  int descriptor_;
  std::string path_;
  PackingHeader header_;
  std::size_t documents_ = 0;       // of the block
  std::vector<Piece> block_;        // remaining pieces
  std::vector<Piece> buffer_;       // of rows done, not written yet
  std::vector<PackedRowEnd> ends_;  // 16 bytes a row, until finish()
};

// Packs the documents of a shard that is on this machine, found as `boundaries`
// says. Throws ShardError.
PackingHeader pack_shard(const Shard& shard, std::uint64_t seq_len,
                         Boundaries boundaries, std::uint64_t eot,
                         std::array<std::uint64_t, 2> fingerprint,
                         int descriptor, const std::string& path);

}  // namespace mixloader
