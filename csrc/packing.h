// Rows packed with pieces of documents: the sidecar that lists them, and the
// row that is written from a list.
//
// A row of seq_len slots is filled with pieces of documents. A piece of n
// tokens, n >= 2, takes n - 1 slots: inputs are all of its tokens but the last,
// targets all but the first, so every target lies in its input's document. A
// document longer than seq_len + 1 is cut at a stride of seq_len, as windows
// are: each of its tokens but the first is a target once.
//
// The sidecar of a shard, in little-endian words of 64 bits:
//   header  the fields of PackingHeader
//   pieces  two words each: the token at which it begins, how many it has
//   rows    two words each: pieces up to and including this row, and the XXH64
//           of the row's pieces as they are written, seeded with its number;
//           one entry of zeros before the first row
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "file.h"
#include "row.h"
#include "shard.h"

namespace mixloader {

inline constexpr std::uint64_t kPackingMagic = 0x736b6361'7078696dULL;
inline constexpr std::uint64_t kPackingVersion = 1;

struct PackingHeader {
  std::uint64_t magic = kPackingMagic;  // "mixpacks"
  std::uint64_t version = kPackingVersion;
  std::uint64_t seq_len = 0;
  std::uint64_t tokens = 0;  // of the shard
  std::uint64_t rows = 0;
  std::uint64_t pieces = 0;
  std::uint64_t targets = 0;  // slots filled, of rows * seq_len
  std::array<std::uint64_t, 2> fingerprint{};  // of what was packed, and how
  std::uint64_t check = 0;                     // XXH64 of the words before
};

struct Piece {
  std::uint64_t token;  // at which it begins
  std::uint64_t tokens;
};

// An entry for each row of a sidecar, see above.
struct PackedRowEnd {
  std::uint64_t pieces;
  std::uint64_t check;
};

std::uint64_t check_of(const PackingHeader& header);
std::uint64_t check_of(std::uint64_t row, std::span<const Piece> pieces);

// A sidecar that is read row by row, in any order, with no memory of its own.
class PackedRows {
 public:
  // Checks the header and the size. Throws ShardError.
  explicit PackedRows(const std::string& path);

  const PackingHeader& header() const { return header_; }

  // Throws ShardError unless it was made for this shard and row length.
  void expect(const Shard& shard, std::uint64_t seq_len) const;

  // The pieces of a row. Thread-safe. Throws ShardError if they are damaged.
  void read(std::uint64_t row, std::vector<Piece>& pieces) const;

  // Reads every row. Throws ShardError at the first that is damaged.
  void verify() const;

 private:
  // The pieces of rows from `first` on: as many as there are entries in `ends`,
  // which are those before, between and behind them, less one.
  void read_rows(std::uint64_t first, std::span<PackedRowEnd> ends,
                 std::vector<Piece>& pieces) const;
  bool is_sound(std::uint64_t row, std::span<const Piece> pieces,
                std::uint64_t check) const;
  [[noreturn]] void throw_damaged(const std::string& what) const;

  File file_;
  PackingHeader header_;
};

// Throws std::invalid_argument for a format that packed rows cannot have.
void check_packable(const RowFormat& format);

// The ids of tokens [token, token + count) of a shard, as they lie on disk;
// they stay until the next call.
using ReadIds =
    std::function<const std::byte*(std::uint64_t token, std::uint64_t count)>;
// Throws if the largest of the ids last read, from `token` on, is none.
using CheckIds =
    std::function<void(std::uint64_t token, std::uint64_t largest)>;

// Writes one row from ids of `width` bytes: the pieces in order, positions from
// 0 in each, documents numbered by piece. Slots that remain are a document of
// their own: inputs format.eot, targets kMaskedTarget.
void write_packed_row(std::span<const Piece> pieces, std::uint64_t seq_len,
                      std::size_t width, const RowFormat& format,
                      const ReadIds& read, const CheckIds& check,
                      const RowBuffers& row);

}  // namespace mixloader
