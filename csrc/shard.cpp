#include "shard.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace mixloader {
namespace {

// A file's last byte, as off_t counts.
constexpr std::uint64_t kFileEnd = std::numeric_limits<std::int64_t>::max();

// True if begin + count * size stays within any file.
bool fits(std::uint64_t begin, std::uint64_t count, std::uint64_t size) {
  std::uint64_t bytes = 0;
  std::uint64_t end = 0;
  return !__builtin_mul_overflow(count, size, &bytes) &&
         !__builtin_add_overflow(begin, bytes, &end) && end <= kFileEnd;
}

}  // namespace

Extent extent_at(const Shard& shard, std::uint64_t token) {
  if (!shard.extent_ends.empty()) {
    const auto& ends = shard.extent_ends;
    const auto number = static_cast<std::uint64_t>(
        std::upper_bound(ends.begin(), ends.end(), token) - ends.begin());
    return {number, number == 0 ? 0 : ends[number - 1], ends[number],
            shard.extent_bytes[number]};
  }
  if (shard.extent_tokens > 0) {
    const std::uint64_t number = token / shard.extent_tokens;
    const std::uint64_t first = number * shard.extent_tokens;
    return {number, first,
            first + std::min(shard.extent_tokens, shard.tokens - first),
            shard.offset + number * shard.extent_stride};
  }
  return {0, 0, shard.tokens, shard.offset};
}

std::uint64_t byte_of(const Shard& shard, std::uint64_t token) {
  if (shard.is_one_run()) return shard.offset + token * shard.width;
  const std::uint64_t behind = token == shard.tokens && token > 0 ? 1 : 0;
  const Extent extent = extent_at(shard, token - behind);
  return extent.byte + (token - extent.first) * shard.width;
}

void append_ranges(const Shard& shard, std::uint64_t first, std::uint64_t count,
                   std::vector<ByteRange>& ranges) {
  const std::uint64_t end = first + count;
  while (first < end) {
    const Extent extent = extent_at(shard, first);
    const std::uint64_t here = std::min(end, extent.end) - first;
    ranges.push_back({extent.byte + (first - extent.first) * shard.width,
                      here * shard.width});
    first += here;
  }
}

void check_shard(const Shard& shard) {
  const auto require = [&shard](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument("shard " + shard.name + what);
  };
  require(shard.width == 1 || shard.width == 2 || shard.width == 4 ||
              shard.width == 8,
          ": a token has 1, 2, 4 or 8 bytes");
  require(shard.extent_ends.size() == shard.extent_bytes.size(),
          ": extents differ in number");
  if (!shard.extent_ends.empty()) {
    require(shard.extent_ends.back() == shard.tokens,
            ": extents do not hold its tokens");
    std::uint64_t previous = 0;
    for (std::size_t i = 0; i < shard.extent_ends.size(); ++i) {
      const std::uint64_t end = shard.extent_ends[i];
      require(end >= previous, ": ends of extents do not ascend");
      require(fits(shard.extent_bytes[i], end - previous, shard.width),
              ": an extent reaches beyond any file");
      previous = end;
    }
  } else if (shard.extent_tokens > 0 && shard.tokens > 0) {
    const std::uint64_t last = (shard.tokens - 1) / shard.extent_tokens;
    require(fits(shard.offset, last, shard.extent_stride) &&
                fits(shard.offset + last * shard.extent_stride,
                     shard.tokens - last * shard.extent_tokens, shard.width),
            ": its extents reach beyond any file");
  } else {
    require(fits(shard.offset, shard.tokens, shard.width),
            ": its tokens reach beyond any file");
  }
  const NumberTable& table = shard.documents;
  require(table.path.empty() ||
              ((table.width == 4 || table.width == 8) && table.unit > 0 &&
               fits(table.offset, table.count, table.width)),
          ": its table of documents is none that a file could hold");
}

}  // namespace mixloader
