// A domain's shards: where tokens lie in which files.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mixloader {

// Ascending numbers in a file, little-endian; entry i stands for
// (number - bias) / unit.
struct NumberTable {
  std::string path;          // empty: there is none
  std::uint64_t offset = 0;  // of entry 0, bytes
  std::uint64_t count = 0;
  std::uint32_t width = 8;  // bytes an entry, 4 or 8
  std::uint64_t bias = 0;
  std::uint64_t unit = 1;
};

// Little-endian tokens in a file: one run, or extents with something else in
// between, which windows read across.
struct Shard {
  std::string name;  // for messages: its path, or where it was fetched from
  std::string path;  // on this machine; empty: see Locations
  std::uint64_t offset = 0;  // of the first token, bytes
  std::uint64_t tokens = 0;
  std::uint32_t width = 2;  // bytes a token: 1, 2, 4 or 8
  bool is_signed = false;
  std::uint64_t windows = 0;  // rows that it gives in one epoch

  // Extents of equal size: the i-th begins at offset + i * extent_stride.
  // extent_tokens 0: one run.
  std::uint64_t extent_tokens = 0;
  std::uint64_t extent_stride = 0;
  // Extents of any size, if not empty: tokens up to and including the i-th,
  // and the byte where it begins. The caller keeps what they point to.
  std::span<const std::uint64_t> extent_ends;
  std::span<const std::uint64_t> extent_bytes;
  bool extents_are_documents = false;

  NumberTable documents;  // tokens at which documents begin
  std::string checksums;  // sidecar of block checksums; empty: none
  std::string packing;    // sidecar of packed rows; empty: windows of tokens

  bool is_one_run() const { return extent_tokens == 0 && extent_ends.empty(); }
};

struct Domain {
  std::uint64_t key;  // of its permutations; depends on its name alone
  std::vector<Shard> shards;
};

// Bytes [begin, begin + size) of a file.
struct ByteRange {
  std::uint64_t begin;
  std::uint64_t size;
};

// Where an extent lies, in tokens and in bytes. A shard of one run is one.
struct Extent {
  std::uint64_t number;
  std::uint64_t first;  // token
  std::uint64_t end;    // token behind its last
  std::uint64_t byte;   // of its first token
};
Extent extent_at(const Shard& shard, std::uint64_t token);

// The byte of a token, or (token == shard.tokens) behind the last.
std::uint64_t byte_of(const Shard& shard, std::uint64_t token);

// Appends where tokens [first, first + count) lie, in order; `count` > 0.
void append_ranges(const Shard& shard, std::uint64_t first, std::uint64_t count,
                   std::vector<ByteRange>& ranges);

// Throws std::invalid_argument for a shard that no file could be: sizes that
// overflow, an unknown width, extents that do not hold its tokens.
void check_shard(const Shard& shard);

}  // namespace mixloader
