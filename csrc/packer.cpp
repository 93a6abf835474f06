#include "packer.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "documents.h"
#include "error.h"
#include "faults.h"

namespace mixloader {
namespace {

constexpr std::uint64_t kNone = ~std::uint64_t{0};

// A set of numbers below `size`: a tree of words, each bit of which says
// whether the word below it holds any.
class NumberSet {
 public:
  explicit NumberSet(std::uint64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size);
    } while (size > 1);
  }

  void insert(std::uint64_t number) {
    for (auto& level : levels_) {
      level[number / 64] |= std::uint64_t{1} << number % 64;
      number /= 64;
    }
  }

  void erase(std::uint64_t number) {
    for (auto& level : levels_) {
      level[number / 64] &= ~(std::uint64_t{1} << number % 64);
      number /= 64;
      if (level[number] != 0) return;
    }
  }

  // The least number of at least `number`, or kNone.
  std::uint64_t at_least(std::uint64_t number) const {
    for (std::size_t i = 0; i < levels_.size(); ++i, number = number / 64 + 1) {
      if (number / 64 >= levels_[i].size()) return kNone;
      const auto bits =
          levels_[i][number / 64] & (~std::uint64_t{0} << number % 64);
      if (bits == 0) continue;
      number = number / 64 * 64 + std::countr_zero(bits);
      while (i-- > 0)
        number = number * 64 + std::countr_zero(levels_[i][number]);
      return number;
    }
    return kNone;
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;
};

// The row of each piece; pieces come in the order in which they are placed.
// Constant time a piece but for the tree's depth: rows stand in stacks, one for
// every number of slots left.
std::vector<std::uint64_t> best_fit(std::span<const Piece> pieces,
                                    std::uint64_t seq_len) {
  NumberSet open(seq_len + 1);  // numbers of slots that some row has left
  std::vector<std::uint64_t> top(seq_len + 1, kNone), below, row_of;
  row_of.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    const std::uint64_t slots = piece.tokens - 1;
    std::uint64_t left = open.at_least(slots), row;
    if (left == kNone) {
      left = seq_len;
      row = below.size();
      below.push_back(kNone);
    } else {
      row = top[left];
      top[left] = below[row];
      if (top[left] == kNone) open.erase(left);
    }
    row_of.push_back(row);
    left -= slots;
    if (left == 0) continue;
    if (top[left] == kNone) open.insert(left);
    below[row] = std::exchange(top[left], row);
  }
  return row_of;
}

}  // namespace

RowPacker::RowPacker(int descriptor, std::string path, std::uint64_t seq_len,
                     std::uint64_t tokens,
                     std::array<std::uint64_t, 2> fingerprint)
    : descriptor_(descriptor), path_(std::move(path)), ends_(1) {
  header_.seq_len = seq_len;
  header_.tokens = tokens;
  header_.fingerprint = fingerprint;
}

void RowPacker::add(std::uint64_t begin, std::uint64_t end) {
  const std::uint64_t seq_len = header_.seq_len;
  for (; end - begin > seq_len; begin += seq_len) {
    add_row({{Piece{begin, seq_len + 1}}});
  }
  if (end - begin >= 2) block_.push_back({begin, end - begin});
  if (++documents_ == kBlock) pack_block();
}

void RowPacker::pack_block() {
  std::stable_sort(
      block_.begin(), block_.end(),
      [](const Piece& a, const Piece& b) { return a.tokens > b.tokens; });
  const auto row_of = best_fit(block_, header_.seq_len);
  std::vector<std::size_t> order(block_.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::pair(row_of[a], block_[a].token) <
           std::pair(row_of[b], block_[b].token);
  });
  std::vector<Piece> row;
  for (std::size_t i = 0; i < order.size(); ++i) {
    row.push_back(block_[order[i]]);
    if (i + 1 == order.size() || row_of[order[i]] != row_of[order[i + 1]]) {
      add_row(row);
      row.clear();
    }
  }
  block_.clear();
  documents_ = 0;
}

void RowPacker::add_row(std::span<const Piece> pieces) {
  constexpr std::size_t kBuffer = 1 << 16;  // pieces, a megabyte
  ends_.push_back(
      {ends_.back().pieces + pieces.size(), check_of(header_.rows, pieces)});
  ++header_.rows;
  for (const Piece& piece : pieces) header_.targets += piece.tokens - 1;
  buffer_.insert(buffer_.end(), pieces.begin(), pieces.end());
  if (buffer_.size() >= kBuffer) write_buffer();
}

PackingHeader RowPacker::finish() {
  pack_block();
  write_buffer();
  write(std::as_bytes(std::span(ends_)),
        sizeof header_ + header_.pieces * sizeof(Piece));
  header_.check = check_of(header_);
  write(std::as_bytes(std::span(&header_, 1)), 0);
  return header_;
}

void RowPacker::write_buffer() {
  write(std::as_bytes(std::span(buffer_)),
        sizeof header_ + header_.pieces * sizeof(Piece));
  header_.pieces += buffer_.size();
  buffer_.clear();
}

void RowPacker::write(std::span<const std::byte> bytes, std::uint64_t offset) {
  while (!bytes.empty()) {
    std::size_t size = bytes.size();
    const ssize_t wrote = faults::fails(faults::Call::kWrite, &size)
                              ? -1
                              : ::pwrite(descriptor_, bytes.data(), size,
                                         static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) {
      throw ShardError("cannot write the packed rows " + path_ + " at byte " +
                       std::to_string(offset) + ": " + std::strerror(errno));
    }
    bytes = bytes.subspan(static_cast<std::size_t>(wrote));
    offset += static_cast<std::uint64_t>(wrote);
  }
}

namespace {

// The tokens of a shard at which its documents begin, found piece by piece.
class DocumentStarts {
 public:
  DocumentStarts(const Shard& shard, Boundaries boundaries, std::uint64_t eot)
      : shard_(shard), boundaries_(boundaries), eot_(eot) {
    if (boundaries != Boundaries::kIndex) {
      file_.emplace(shard.path, "shard " + shard.name);
    } else if (!shard.extents_are_documents) {
      const std::string& path = shard.documents.path;
      file_.emplace(path, "index of documents " + path);
      table_.emplace(shard, *file_);
    }
  }

  // Appends those of the tokens (after, up_to], less `after`.
  void append(std::uint64_t after, std::uint64_t up_to,
              std::vector<std::uint64_t>& starts) {
    if (table_) return table_->append_starts(after, up_to, starts);
    if (!file_) return append_extent_starts(shard_, after, up_to, starts);
    const std::uint64_t count = up_to - after + 1;
    ids_.resize(count * shard_.width);
    ranges_.clear();
    append_ranges(shard_, after, count, ranges_);
    std::span<std::byte> left(ids_);
    for (const ByteRange& range : ranges_) {
      file_->read(range.begin, left.first(range.size));
      left = left.subspan(range.size);
    }
    append_eot_starts(ids_.data(), shard_.width, count, eot_,
                      boundaries_ == Boundaries::kAtEot, starts);
  }

 private:
  const Shard& shard_;
  Boundaries boundaries_;
  std::uint64_t eot_;
  std::optional<File> file_;  // of the tokens, or of the table
  std::optional<DocumentTable> table_;
  std::vector<std::byte> ids_;
  std::vector<ByteRange> ranges_;
};

}  // namespace

PackingHeader pack_shard(const Shard& shard, std::uint64_t seq_len,
                         Boundaries boundaries, std::uint64_t eot,
                         std::array<std::uint64_t, 2> fingerprint,
                         int descriptor, const std::string& path) {
  constexpr std::uint64_t kStride = 1 << 20;  // tokens looked at together
  check_shard(shard);
  RowPacker packer(descriptor, path, seq_len, shard.tokens, fingerprint);
  DocumentStarts documents(shard, boundaries, eot);
  std::uint64_t begin = 0;
  std::vector<std::uint64_t> starts;
  for (std::uint64_t after = 0; after + 1 < shard.tokens;) {
    const auto up_to = std::min(after + kStride, shard.tokens - 1);
    starts.clear();
    documents.append(after, up_to, starts);
    for (const std::uint64_t start : starts) {
      const std::uint64_t end = after + start;
      if (end <= begin || end > up_to) {
        throw ShardError("the documents of shard " + shard.name +
                         " do not follow each other: one begins at token " +
                         std::to_string(begin) + ", the next at token " +
                         std::to_string(end) + "; restore its index");
      }
      packer.add(begin, end);
      begin = end;
    }
    after = up_to;
  }
  packer.add(begin, shard.tokens);
  return packer.finish();
}

}  // namespace mixloader
