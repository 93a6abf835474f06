#include "documents.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <string>

#include "error.h"
#include "widen.h"

namespace mixloader {

// Entries [first, first + count), as tokens.
struct DocumentTable::Block {
  std::uint64_t first = 0;
  std::size_t count = 0;
  std::array<std::uint64_t, kBlock> tokens;

  std::uint64_t end() const { return first + count; }
  std::uint64_t front() const { return tokens[0]; }
  std::uint64_t back() const { return tokens[count - 1]; }
};

DocumentTable::DocumentTable(const Shard& shard, const File& file)
    : shard_(shard), table_(shard.documents), file_(file) {
  const std::uint64_t end = table_.offset + table_.count * table_.width;
  if (file_.size() < end) {
    throw ShardError(file_.name() + " has " + std::to_string(file_.size()) +
                     " bytes, but its " + std::to_string(table_.count) +
                     " documents need " + std::to_string(end) +
                     "; it was truncated or replaced: restore it");
  }
}

void DocumentTable::load(std::uint64_t first, Block& block) const {
  block.first = first;
  block.count = std::min<std::uint64_t>(kBlock, table_.count - first);
  std::array<std::byte, kBlock * 8> bytes;
  const std::uint64_t begin = table_.offset + first * table_.width;
  file_.read(begin, std::span(bytes).first(block.count * table_.width));
  std::uint64_t previous = 0;
  for (std::size_t i = 0; i < block.count; ++i) {
    const std::uint64_t number = id_at(bytes.data(), table_.width, i);
    const std::uint64_t token = (number - table_.bias) / table_.unit;
    if (number < table_.bias || (number - table_.bias) % table_.unit != 0 ||
        token < previous || token > shard_.tokens) {
      throw ShardError(
          file_.name() + " is damaged: document " + std::to_string(first + i) +
          " (byte " + std::to_string(begin + i * table_.width) + ") has " +
          std::to_string(number) +
          ", which is no token of the shard's that follows the one before; "
          "restore it");
    }
    block.tokens[i] = previous = token;
  }
}

// Every second guess takes documents to be of one size; the others halve what
// is left, so that no table takes more than twice the logarithm.
std::uint64_t DocumentTable::upper_bound(std::uint64_t token,
                                         Block& block) const {
  std::uint64_t low = 0;              // entries before are <= token
  std::uint64_t high = table_.count;  // from here on they are beyond
  std::uint64_t low_token = 0;
  std::uint64_t high_token = shard_.tokens + 1;
  for (bool halve = false;; halve = !halve) {
    if (low >= high) {  // between two blocks, or at an end
      if (low < table_.count) load(low, block);
      return low;
    }
    std::uint64_t guess = low + (high - low) / 2;
    if (!halve) {
      const double share = static_cast<double>(token - low_token) /
                           static_cast<double>(high_token - low_token);
      guess = low + static_cast<std::uint64_t>(share *
                                               static_cast<double>(high - low));
    }
    guess = std::min(guess, high - 1);
    load(guess - std::min<std::uint64_t>(guess - low, kBlock / 2), block);
    if (block.front() > token) {
      high = block.first;
      high_token = block.front();
    } else if (block.back() <= token) {
      low = block.end();
      low_token = block.back();
    } else {
      const auto end = block.tokens.begin() + block.count;
      return block.first +
             static_cast<std::uint64_t>(
                 std::upper_bound(block.tokens.begin(), end, token) -
                 block.tokens.begin());
    }
  }
}

void DocumentTable::append_starts(std::uint64_t after, std::uint64_t up_to,
                                  std::vector<std::uint64_t>& starts) const {
  Block block;
  std::uint64_t previous = after;
  for (std::uint64_t i = upper_bound(after, block); i < table_.count; ++i) {
    if (i >= block.end()) load(i, block);
    const std::uint64_t token = block.tokens[i - block.first];
    if (token > up_to || token == shard_.tokens) return;
    if (token != previous) starts.push_back(token - after);
    previous = token;
  }
}

DocumentPlace DocumentTable::find(std::uint64_t token) const {
  Block block;
  if (table_.count == 0) return {0, 0};
  load(0, block);
  const std::uint64_t unlisted = block.front() == 0 ? 0 : 1;
  const std::uint64_t beyond = upper_bound(token, block);
  if (beyond == 0) return {0, 0};
  load(beyond - 1, block);
  return {beyond - 1 + unlisted, block.front()};
}

void append_extent_starts(const Shard& shard, std::uint64_t after,
                          std::uint64_t up_to,
                          std::vector<std::uint64_t>& starts) {
  std::uint64_t start = extent_at(shard, after).end;
  while (start <= up_to && start < shard.tokens) {
    starts.push_back(start - after);
    start = extent_at(shard, start).end;
  }
}

namespace {

template <typename Id>
void append_where(const std::byte* ids, std::size_t begin, std::size_t end,
                  std::uint64_t eot, std::uint64_t shift,
                  std::vector<std::uint64_t>& starts) {
  constexpr std::size_t kStep = 64;  // ids looked at together
  if (static_cast<Id>(eot) != eot) return;
  for (std::size_t i = begin; i < end; i += kStep) {
    const std::size_t step = std::min(kStep, end - i);
    std::array<Id, kStep> some;
    std::memcpy(some.data(), ids + i * sizeof(Id), step * sizeof(Id));
    bool any = false;
    for (std::size_t k = 0; k < step; ++k) any |= some[k] == eot;
    if (!any) continue;
    for (std::size_t k = 0; k < step; ++k) {
      if (some[k] == eot) starts.push_back(i + k + shift);
    }
  }
}

}  // namespace

void append_eot_starts(const std::byte* ids, std::size_t width, std::size_t n,
                       std::uint64_t eot, bool at_eot,
                       std::vector<std::uint64_t>& starts) {
  const std::size_t begin = at_eot ? 1 : 0;
  const std::size_t end = at_eot ? n : n - 1;
  const std::uint64_t shift = at_eot ? 0 : 1;
  const auto append = width == 1   ? append_where<std::uint8_t>
                      : width == 2 ? append_where<std::uint16_t>
                      : width == 4 ? append_where<std::uint32_t>
                                   : append_where<std::uint64_t>;
  append(ids, begin, end, eot, shift, starts);
}

void write_documents(std::span<const std::uint64_t> starts,
                     std::uint64_t seq_len, const RowFormat& format,
                     const RowBuffers& row) {
  std::uint64_t begin = 0;
  for (std::size_t document = 0; document <= starts.size(); ++document) {
    const std::uint64_t end =
        document < starts.size() ? starts[document] : seq_len;
    if (row.positions != nullptr) {
      std::iota(row.positions + begin, row.positions + end, 0);
    }
    if (row.documents != nullptr) {
      std::fill(row.documents + begin, row.documents + end,
                static_cast<std::int32_t>(document));
    }
    if (format.mask_targets && document < starts.size()) {
      store(format.targets, row.targets, end - 1, kMaskedTarget);
    }
    begin = end;
  }
}

}  // namespace mixloader
