#include "packing.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "checksum.h"
#include "documents.h"
#include "error.h"

namespace mixloader {
namespace {

constexpr std::uint64_t kEntry = 2 * sizeof(std::uint64_t);  // bytes

static_assert(sizeof(PackingHeader) == 10 * sizeof(std::uint64_t));
static_assert(sizeof(Piece) == kEntry && sizeof(PackedRowEnd) == kEntry);

}  // namespace

std::uint64_t check_of(const PackingHeader& header) {
  const auto bytes = std::as_bytes(std::span(&header, 1));
  return xxh64(bytes.first(offsetof(PackingHeader, check)), 0);
}

std::uint64_t check_of(std::uint64_t row, std::span<const Piece> pieces) {
  return xxh64(std::as_bytes(pieces), row);
}

PackedRows::PackedRows(const std::string& path)
    : file_(path, "packed rows " + path) {
  const std::uint64_t size = file_.size();
  if (size < sizeof header_) throw_damaged("it has no whole header");
  file_.read(0, std::as_writable_bytes(std::span(&header_, 1)));
  if (header_.magic != kPackingMagic) throw_damaged("it has another magic");
  if (header_.version != kPackingVersion) {
    throw_damaged("it has version " + std::to_string(header_.version) +
                  ", and this mixloader reads version " +
                  std::to_string(kPackingVersion));
  }
  if (header_.check != check_of(header_)) {
    throw_damaged("its header does not match its checksum");
  }
  // The counts are compared before they are multiplied.
  const std::uint64_t entries = (size - sizeof header_) / kEntry;
  if (header_.pieces >= entries || header_.rows >= entries ||
      size != sizeof header_ + kEntry * (header_.pieces + header_.rows + 1)) {
    throw_damaged("its " + std::to_string(size) + " bytes are not those of " +
                  std::to_string(header_.pieces) + " pieces in " +
                  std::to_string(header_.rows) + " rows");
  }
}

void PackedRows::expect(const Shard& shard, std::uint64_t seq_len) const {
  if (header_.seq_len == seq_len && header_.tokens == shard.tokens &&
      header_.rows >= shard.windows) {
    return;
  }
  throw ShardError(file_.name() + " are " + std::to_string(header_.rows) +
                   " rows of " + std::to_string(header_.seq_len) +
                   " tokens from a shard of " + std::to_string(header_.tokens) +
                   " tokens, but shard " + shard.name + " of " +
                   std::to_string(shard.tokens) + " tokens is to give " +
                   std::to_string(shard.windows) + " rows of " +
                   std::to_string(seq_len) + "; pack it again");
}

void PackedRows::read(std::uint64_t row, std::vector<Piece>& pieces) const {
  std::array<PackedRowEnd, 2> ends;
  read_rows(row, ends, pieces);
  if (!is_sound(row, pieces, ends[1].check)) {
    throw_damaged("row " + std::to_string(row) +
                  " does not match its checksum");
  }
}

void PackedRows::verify() const {
  constexpr std::uint64_t kRows = 4096;
  std::vector<PackedRowEnd> ends;
  std::vector<Piece> pieces;
  for (std::uint64_t first = 0; first < header_.rows; first += kRows) {
    const auto count = std::min(kRows, header_.rows - first);
    ends.resize(count + 1);
    read_rows(first, ends, pieces);
    const Piece* begin = pieces.data();
    for (std::uint64_t i = 0; i < count; ++i) {
      const auto size = ends[i + 1].pieces - ends[i].pieces;
      if (!is_sound(first + i, {begin, size}, ends[i + 1].check)) {
        throw_damaged("row " + std::to_string(first + i) +
                      " does not match its checksum");
      }
      begin += size;
    }
  }
}

void PackedRows::read_rows(std::uint64_t first, std::span<PackedRowEnd> ends,
                           std::vector<Piece>& pieces) const {
  file_.read(sizeof header_ + kEntry * (header_.pieces + first),
             std::as_writable_bytes(ends));
  if (first == 0 && (ends[0].pieces != 0 || ends[0].check != 0)) {
    throw_damaged("row 0 does not begin with piece 0");
  }
  for (std::size_t i = 0; i + 1 < ends.size(); ++i) {
    const auto begin = ends[i].pieces, end = ends[i + 1].pieces;
    if (end <= begin || end - begin > header_.seq_len || end > header_.pieces) {
      throw_damaged("row " + std::to_string(first + i) + " would be pieces " +
                    std::to_string(begin) + " to " + std::to_string(end));
    }
  }
  const auto begin = ends.front().pieces;
  pieces.resize(ends.back().pieces - begin);
  file_.read(sizeof header_ + kEntry * begin,
             std::as_writable_bytes(std::span(pieces)));
}

bool PackedRows::is_sound(std::uint64_t row, std::span<const Piece> pieces,
                          std::uint64_t check) const {
  if (check_of(row, pieces) != check) return false;
  std::uint64_t slots = header_.seq_len;
  for (const Piece& piece : pieces) {
    if (piece.tokens < 2 || piece.tokens - 1 > slots ||
        piece.tokens > header_.tokens ||
        piece.token > header_.tokens - piece.tokens) {
      return false;
    }
    slots -= piece.tokens - 1;
  }
  return true;
}

void PackedRows::throw_damaged(const std::string& what) const {
  throw ShardError(file_.name() + " are damaged: " + what +
                   "; remove the file, and it is made again");
}

void check_packable(const RowFormat& format) {
  if (format.shared) {
    throw std::invalid_argument(
        "packed rows have targets of their own: they are not the inputs "
        "shifted by one where a piece ends, so one shared buffer cannot hold "
        "both");
  }
  if (format.targets == TokenType::kUint16) {
    throw std::invalid_argument(
        "packed rows mark slots without a target by -100, which uint16 "
        "targets cannot hold; ask for int32 or int64 targets");
  }
  if (format.eot >= capacity_of(format.inputs)) {
    throw std::invalid_argument(
        "packed rows end with the end-of-text token, but inputs of the type "
        "asked for cannot hold " +
        std::to_string(format.eot));
  }
}

void write_packed_row(std::span<const Piece> pieces, std::uint64_t seq_len,
                      std::size_t width, const RowFormat& format,
                      const ReadIds& read, const CheckIds& check,
                      const RowBuffers& row) {
  const auto widen_inputs = widen_from(width, format.inputs);
  const auto widen_targets = widen_from(width, format.targets);
  std::vector<std::uint64_t> starts;
  std::uint64_t slot = 0;
  for (const Piece& piece : pieces) {
    const std::uint64_t slots = piece.tokens - 1;
    const std::byte* ids = read(piece.token, piece.tokens);
    check(piece.token,
          std::max(widen_inputs(ids, slots,
                                row.inputs + slot * width_of(format.inputs),
                                nullptr),
                   widen_targets(ids + width, slots,
                                 row.targets + slot * width_of(format.targets),
                                 nullptr)));
    slot += slots;
    if (slot < seq_len) starts.push_back(slot);
  }
  for (; slot < seq_len; ++slot) {
    store(format.inputs, row.inputs, slot,
          static_cast<std::int64_t>(format.eot));
    store(format.targets, row.targets, slot, kMaskedTarget);
  }
  RowFormat unmasked = format;  // every piece's last target is its own
  unmasked.mask_targets = false;
  write_documents(starts, seq_len, unmasked, row);
}

}  // namespace mixloader
