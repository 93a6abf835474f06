// The domains and their shards: from (domain, window) to the tokens of a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "file.h"
#include "locations.h"

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

  NumberTable documents;  // tokens at which documents begin
  std::string checksums;  // sidecar of block checksums; empty: none
  std::string packing;    // sidecar of packed rows; empty: windows of tokens
};

struct Domain {
  std::uint64_t key;  // of its permutations; depends on its name alone
  std::vector<Shard> shards;
};

enum class TokenType { kInt64, kInt32, kUint16 };

// Where documents begin: not asked, from the shard's table, after each
// end-of-text token, or at each of them.
enum class Boundaries { kNone, kIndex, kAfterEot, kAtEot };

// What is written for each row.
struct RowFormat {
  TokenType inputs = TokenType::kInt64;
  TokenType targets = TokenType::kInt64;
  bool shared =
      false;  // one buffer of seq_len + 1 tokens, no targets of its own
  Boundaries boundaries = Boundaries::kNone;
  std::uint64_t eot = 0;
  bool mask_targets = false;  // -100 where a target begins another document
};

// A row's buffers of seq_len entries (inputs: one more if shared); positions
// and documents may be null.
struct RowBuffers {
  std::byte* inputs;
  std::byte* targets;
  std::int64_t* positions;  // within the document
  std::int32_t* documents;  // counted within the row, from 0
};

// Where the first token of a row stands.
struct RowPlace {
  std::uint32_t shard;  // within the domain
  std::uint64_t token;  // within the shard
};

// How shards are read.
enum class ReadMode { kPread, kMmap };

struct CorpusOptions {
  std::uint64_t seq_len = 0;
  std::uint64_t vocab_size = 0;  // 0: token ids are not checked
  RowFormat format;
  ReadMode mode = ReadMode::kPread;
};

// Rows of seq_len + 1 tokens; windows stand at a stride of seq_len, none
// across the end of a shard.
class Corpus {
 public:
  // What a thread keeps between rows.
  struct Workspace {
    std::vector<std::byte> bytes;
  };

  // Every domain has one window or more (the caller has checked). Files are
  // opened when first read.
  Corpus(std::vector<Domain> domains, CorpusOptions options);

  std::size_t domains() const { return domains_.size(); }
  const CorpusOptions& options() const { return options_; }
  std::uint64_t key(std::uint32_t domain) const { return domains_[domain].key; }
  // Windows up to and including each shard of a domain.
  std::span<const std::uint64_t> window_ends(std::uint32_t domain) const {
    return window_ends_[domain];
  }
  // Shards are numbered through all domains.
  std::uint32_t first_shard(std::uint32_t domain) const {
    return first_shard_[domain];
  }
  Locations& locations() const { return *locations_; }

  // Thread-safe. Throws ShardError and TokenError.
  void read_row(std::uint32_t domain, std::uint64_t window,
                const RowBuffers& row, Workspace& workspace) const;

  RowPlace locate(std::uint32_t domain, std::uint64_t window) const;

 private:
  std::shared_ptr<const File> open(const Shard& shard,
                                   std::uint32_t number) const;

  std::vector<Domain> domains_;
  CorpusOptions options_;
  std::vector<std::vector<std::uint64_t>> window_ends_;
  std::vector<std::uint32_t> first_shard_;
  std::unique_ptr<Locations> locations_;

  // Open files, oldest first; a data set may have more shards than a process
  // may have descriptors.
  static constexpr std::size_t kOpenFiles = 256;
  mutable std::mutex mutex_;
  mutable std::unordered_map<const Shard*, std::shared_ptr<const File>> open_;
  mutable std::deque<const Shard*> open_order_;
};

}  // namespace mixloader
