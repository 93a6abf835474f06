// The domains and their shards: from (domain, window) to tokens.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "file.h"

namespace mixloader {

// A run of little-endian tokens in a file.
struct Shard {
  std::string path;
  std::uint64_t offset;  // of the first token, bytes
  std::uint64_t tokens;
  std::uint32_t width;  // bytes a token, 2 or 4
};

struct Domain {
  std::uint64_t key;  // of its permutations; depends on its name alone
  std::vector<Shard> shards;
};

// Training windows of seq_len + 1 tokens, at a stride of seq_len, none across
// the end of a shard.
class Corpus {
 public:
  // vocab_size 0: token ids are not checked. Every domain has one window or
  // more (the caller has checked). Files are opened when first read.
  Corpus(std::vector<Domain> domains, std::uint64_t seq_len,
         std::uint64_t vocab_size);

  std::size_t domains() const { return domains_.size(); }
  std::uint64_t key(std::uint32_t domain) const { return domains_[domain].key; }
  std::uint64_t windows(std::uint32_t domain) const {
    return window_ends_[domain].back();
  }
  std::uint64_t seq_len() const { return seq_len_; }

  // Writes tokens [0, seq_len) of a window to `inputs` and tokens
  // [1, seq_len] to `targets`. `scratch` is the caller's, reused between calls.
  // Thread-safe. Throws ShardError and TokenError.
  void read_window(std::uint32_t domain, std::uint64_t window,
                   std::span<std::int64_t> inputs,
                   std::span<std::int64_t> targets,
                   std::vector<std::byte>& scratch) const;

 private:
  std::shared_ptr<const File> open(const Shard& shard) const;

  std::vector<Domain> domains_;
  std::uint64_t seq_len_;
  std::uint64_t vocab_size_;
  // Per domain and shard: windows up to and including that shard.
  std::vector<std::vector<std::uint64_t>> window_ends_;

  // Open files, oldest first; a data set may have more shards than a process
  // may have descriptors.
  static constexpr std::size_t kOpenFiles = 256;
  mutable std::mutex mutex_;
  mutable std::unordered_map<const Shard*, std::shared_ptr<const File>> open_;
  mutable std::deque<const Shard*> open_order_;
};

}  // namespace mixloader
