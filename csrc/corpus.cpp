#include "corpus.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "error.h"

namespace mixloader {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tokens on disk are little-endian and are not swapped");

// Compiled twice where the loader can choose at run time: AVX2 widens in half
// the time of the x86-64 baseline. (Sanitizers run before such choices can.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define MIXLOADER_SIMD __attribute__((target_clones("avx2", "default")))
#else
#define MIXLOADER_SIMD
#endif

// Widens n + 1 tokens into n inputs and n targets; returns the largest id.
template <typename Token>
[[gnu::always_inline]] inline std::uint64_t widen(
    const Token* __restrict tokens, std::size_t n,
    std::int64_t* __restrict inputs, std::int64_t* __restrict targets) {
  Token largest = 0;
  for (std::size_t i = 0; i <= n; ++i) largest = std::max(largest, tokens[i]);
  for (std::size_t i = 0; i < n; ++i) inputs[i] = tokens[i];
  for (std::size_t i = 0; i < n; ++i) targets[i] = tokens[i + 1];
  return largest;
}

MIXLOADER_SIMD std::uint64_t widen16(const std::uint16_t* tokens, std::size_t n,
                                     std::int64_t* inputs,
                                     std::int64_t* targets) {
  return widen(tokens, n, inputs, targets);
}

MIXLOADER_SIMD std::uint64_t widen32(const std::uint32_t* tokens, std::size_t n,
                                     std::int64_t* inputs,
                                     std::int64_t* targets) {
  return widen(tokens, n, inputs, targets);
}

template <typename Token>
[[noreturn]] void throw_token_error(const Shard& shard, std::uint64_t start,
                                    const Token* tokens,
                                    std::uint64_t vocab_size) {
  const Token* bad = tokens;
  while (*bad < vocab_size) ++bad;
  const auto position = start + static_cast<std::uint64_t>(bad - tokens);
  throw TokenError(
      "shard " + shard.name + " holds token id " + std::to_string(*bad) +
      " at token " + std::to_string(position) + " (byte " +
      std::to_string(shard.offset + position * shard.width) +
      "), but the vocabulary has " + std::to_string(vocab_size) +
      " ids; check the shard's dtype (" + std::to_string(8 * shard.width) +
      " bits here), its tokenizer and vocab_size");
}

}  // namespace

Corpus::Corpus(std::vector<Domain> domains, CorpusOptions options)
    : domains_(std::move(domains)), options_(options) {
  std::vector<std::string> paths;
  for (const Domain& domain : domains_) {
    first_shard_.push_back(static_cast<std::uint32_t>(paths.size()));
    std::uint64_t windows = 0;
    auto& ends = window_ends_.emplace_back();
    for (const Shard& shard : domain.shards) {
      windows += shard.windows;
      ends.push_back(windows);
      paths.push_back(shard.path);
    }
  }
  locations_ = std::make_unique<Locations>(std::move(paths));
}

std::shared_ptr<const File> Corpus::open(const Shard& shard,
                                         std::uint32_t number) const {
  const std::lock_guard lock(mutex_);
  if (const auto found = open_.find(&shard); found != open_.end()) {
    return found->second;
  }
  auto file = std::make_shared<const File>(locations_->wait(number));
  const std::uint64_t end = shard.offset + shard.tokens * shard.width;
  if (file->size() < end) {
    throw ShardError(
        "shard " + shard.name + " has " + std::to_string(file->size()) +
        " bytes, but its " + std::to_string(shard.tokens) + " tokens need " +
        std::to_string(end) + "; it was truncated or replaced: restore it");
  }
  if (open_order_.size() == kOpenFiles) {
    open_.erase(open_order_.front());
    open_order_.pop_front();
  }
  open_.emplace(&shard, file);
  open_order_.push_back(&shard);
  return file;
}

RowPlace Corpus::locate(std::uint32_t domain, std::uint64_t window) const {
  const auto& ends = window_ends_[domain];
  const auto index = static_cast<std::uint32_t>(
      std::upper_bound(ends.begin(), ends.end(), window) - ends.begin());
  const std::uint64_t first = index == 0 ? 0 : ends[index - 1];
  return {index, (window - first) * options_.seq_len};
}

void Corpus::read_row(std::uint32_t domain, std::uint64_t window,
                      const RowBuffers& row, Workspace& workspace) const {
  const RowPlace place = locate(domain, window);
  const Shard& shard = domains_[domain].shards[place.shard];
  const std::uint64_t length = options_.seq_len;
  auto& bytes = workspace.bytes;
  bytes.resize((length + 1) * shard.width);
  open(shard, first_shard_[domain] + place.shard)
      ->read(shard.offset + place.token * shard.width, bytes);
  auto* inputs = reinterpret_cast<std::int64_t*>(row.inputs);
  auto* targets = reinterpret_cast<std::int64_t*>(row.targets);
  const auto* narrow = reinterpret_cast<const std::uint16_t*>(bytes.data());
  const auto* wide = reinterpret_cast<const std::uint32_t*>(bytes.data());
  const auto largest = shard.width == 2
                           ? widen16(narrow, length, inputs, targets)
                           : widen32(wide, length, inputs, targets);
  if (options_.vocab_size > 0 && largest >= options_.vocab_size) {
    shard.width == 2
        ? throw_token_error(shard, place.token, narrow, options_.vocab_size)
        : throw_token_error(shard, place.token, wide, options_.vocab_size);
  }
}

}  // namespace mixloader
