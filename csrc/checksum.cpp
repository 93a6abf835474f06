#include "checksum.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "error.h"

namespace mixloader {
namespace {

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5;

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);  // little-endian
  return value;
}

std::uint64_t xxh_round(std::uint64_t lane, std::uint64_t input) {
  return std::rotl(lane + input * kPrime2, 31) * kPrime1;
}

constexpr std::uint64_t kMagic = 0x31736d75'7378696d;  // "mixsums1"
constexpr std::uint64_t kHeader = 32;

std::uint64_t blocks_of(std::uint64_t size, std::uint64_t block) {
  return size / block + (size % block != 0 ? 1 : 0);
}

bool is_block_size(std::uint64_t bytes) {
  return std::has_single_bit(bytes) && bytes >= 512 && bytes <= 1 << 30;
}

// Blocks read at a time by what goes through a whole file, in bytes.
constexpr std::uint64_t kStride = std::uint64_t{1} << 22;

}  // namespace

std::uint64_t xxh64(std::span<const std::byte> bytes, std::uint64_t seed) {
  const std::byte* at = bytes.data();
  const std::byte* const end = at + bytes.size();
  std::uint64_t hash = seed + kPrime5;
  if (bytes.size() >= 32) {
    std::array<std::uint64_t, 4> lanes{seed + kPrime1 + kPrime2, seed + kPrime2,
                                       seed, seed - kPrime1};
    for (; end - at >= 32; at += 32) {
      for (std::size_t i = 0; i < 4; ++i) {
        lanes[i] = xxh_round(lanes[i], load<std::uint64_t>(at + 8 * i));
      }
    }
    hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) +
           std::rotl(lanes[2], 12) + std::rotl(lanes[3], 18);
    for (const std::uint64_t lane : lanes) {
      hash = (hash ^ xxh_round(0, lane)) * kPrime1 + kPrime4;
    }
  }
  hash += bytes.size();
  for (; end - at >= 8; at += 8) {
    hash ^= xxh_round(0, load<std::uint64_t>(at));
    hash = std::rotl(hash, 27) * kPrime1 + kPrime4;
  }
  if (end - at >= 4) {
    hash ^= load<std::uint32_t>(at) * kPrime1;
    hash = std::rotl(hash, 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) {
    hash ^= std::to_integer<std::uint64_t>(*at) * kPrime5;
    hash = std::rotl(hash, 11) * kPrime1;
  }
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

Checksums::Checksums(std::shared_ptr<const File> sidecar)
    : sidecar_(std::move(sidecar)) {
  std::array<std::byte, kHeader> header{};
  if (sidecar_->size() >= kHeader) sidecar_->read(0, header);
  block_ = load<std::uint64_t>(&header[8]);
  size_ = load<std::uint64_t>(&header[16]);
  if (load<std::uint64_t>(header.data()) != kMagic ||
      load<std::uint64_t>(&header[24]) !=
          xxh64(std::span(header).first<24>()) ||
      !is_block_size(block_) ||
      sidecar_->size() != kHeader + 8 * blocks_of(size_, block_)) {
    throw ShardError(sidecar_->name() +
                     " is damaged, or no sidecar of checksums that this "
                     "version reads; write it again");
  }
}

void Checksums::expect_size(const File& file) const {
  if (file.size() == size_) return;
  throw ShardError(file.name() + " has " + std::to_string(file.size()) +
                   " bytes, but had " + std::to_string(size_) +
                   " when its checksums were written (" + sidecar_->path() +
                   "); restore it, or write them again");
}

std::uint64_t Checksums::count_bad(std::uint64_t first,
                                   std::span<const std::byte> bytes,
                                   std::uint64_t& bad) const {
  std::uint64_t count = 0;
  std::array<std::uint64_t, 512> expected;
  for (std::uint64_t done = 0; !bytes.empty(); ++done) {
    const std::size_t i = done % expected.size();
    if (i == 0) {
      const auto left = blocks_of(bytes.size(), block_);
      const auto some = std::min<std::uint64_t>(left, expected.size());
      sidecar_->read(kHeader + 8 * (first + done),
                     std::as_writable_bytes(std::span(expected).first(some)));
    }
    const auto here = bytes.first(std::min<std::size_t>(block_, bytes.size()));
    if (xxh64(here, first + done) != expected[i] && count++ == 0) {
      bad = first + done;
    }
    bytes = bytes.subspan(here.size());
  }
  return count;
}

void Checksums::throw_bad(const File& file, std::uint64_t block,
                          std::uint64_t bad, std::uint64_t checked) const {
  const std::uint64_t begin = block * block_;
  throw ShardError(file.name() + " is damaged in block " +
                   std::to_string(block) + ", bytes " + std::to_string(begin) +
                   " to " + std::to_string(std::min(begin + block_, size_)) +
                   ": it does not match its checksum in " + sidecar_->path() +
                   " (" + std::to_string(bad) + " of " +
                   std::to_string(checked) +
                   " blocks checked do not); restore it");
}

void Checksums::read(const File& file, std::uint64_t offset,
                     std::span<std::byte> out,
                     std::vector<std::byte>& blocks) const {
  expect_size(file);
  const std::uint64_t first = offset / block_;
  const std::uint64_t begin = first * block_;
  const std::uint64_t last = (offset + out.size() - 1) / block_;
  const std::uint64_t end = std::min((last + 1) * block_, size_);
  if (offset + out.size() > end) {
    throw ShardError(file.name() + " has " + std::to_string(size_) +
                     " bytes, but its tokens reach byte " +
                     std::to_string(offset + out.size()));
  }
  blocks.resize(end - begin);
  file.read(begin, blocks);
  std::uint64_t block = 0;
  if (const auto bad = count_bad(first, blocks, block); bad > 0) {
    throw_bad(file, block, bad, last - first + 1);
  }
  std::memcpy(out.data(), blocks.data() + (offset - begin), out.size());
}

void Checksums::verify(const File& file) const {
  expect_size(file);
  std::vector<std::byte> bytes;
  std::uint64_t bad = 0;
  std::uint64_t block = 0;
  const std::uint64_t stride = std::max(kStride, block_);
  for (std::uint64_t begin = 0; begin < size_; begin += stride) {
    bytes.resize(std::min(stride, size_ - begin));
    file.read(begin, bytes);
    std::uint64_t found = 0;
    const std::uint64_t here = count_bad(begin / block_, bytes, found);
    if (bad == 0) block = found;
    bad += here;
  }
  if (bad > 0) throw_bad(file, block, bad, blocks_of(size_, block_));
}

void write_checksums(const std::string& path, const std::string& sidecar,
                     std::uint64_t block_bytes) {
  if (!is_block_size(block_bytes)) {
    throw std::invalid_argument("block_bytes is " +
                                std::to_string(block_bytes) +
                                "; expected a power of two from 512 to 2^30");
  }
  const File file(path);
  std::vector<std::uint64_t> words{kMagic, block_bytes, file.size()};
  words.push_back(xxh64(std::as_bytes(std::span(words))));
  std::vector<std::byte> bytes;
  const std::uint64_t stride = std::max(kStride, block_bytes);
  for (std::uint64_t begin = 0; begin < file.size(); begin += stride) {
    bytes.resize(std::min(stride, file.size() - begin));
    file.read(begin, bytes);
    for (auto rest = std::span<const std::byte>(bytes); !rest.empty();) {
      const auto block =
          rest.first(std::min<std::size_t>(block_bytes, rest.size()));
      words.push_back(xxh64(block, words.size() - 4));
      rest = rest.subspan(block.size());
    }
  }
  write_file(sidecar, std::as_bytes(std::span(words)));
}

}  // namespace mixloader
