// The domains and their shards: from (domain, window) to the tokens of a row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checksum.h"
#include "documents.h"
#include "file.h"
#include "locations.h"
#include "open_files.h"
#include "packing.h"
#include "row.h"
#include "shard.h"
#include "widen.h"

namespace mixloader {

// Where a row stands.
struct RowPlace {
  std::uint32_t shard;   // within the domain
  std::uint64_t window;  // within the shard
  std::uint64_t token;   // within the shard, its first; packed rows: 0
};

// A row, and where it is to be written.
struct RowRequest {
  std::uint32_t domain;
  std::uint64_t window;
  RowBuffers buffers;
};

struct CorpusOptions {
  std::uint64_t seq_len = 0;
  std::uint64_t vocab_size = 0;  // 0: ids need only fit the output types
  RowFormat format;
  ReadMode mode = ReadMode::kPread;
};

// Rows of seq_len + 1 tokens; windows stand at a stride of seq_len, none
// across the end of a shard.
class Corpus {
 public:
  // What a thread keeps between rows.
  struct Workspace {
    std::vector<std::byte> tokens;      // of a row, as they are on the disk
    std::vector<std::byte> span;        // several extents, with their gaps
    std::vector<std::byte> blocks;      // that checksums cover
    std::vector<ByteRange> ranges;      // of the file, where tokens lie
    std::vector<std::uint64_t> starts;  // of documents, in the row
    std::vector<Piece> pieces;          // of a packed row
  };

  // Every domain has one window or more (the caller has checked). Files are
  // opened when first read. Throws std::invalid_argument for shards and formats
  // that could not be, ShardError for shards without the index of documents
  // that is asked for.
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

  // Thread-safe. Throws ShardError and TokenError; what was written of the row
  // and of those behind it is then of no use.
  void read_rows(std::span<const RowRequest> rows, Workspace& workspace) const;

  // Asks for a row to be read from the disk soon, if its shard is here. Errors
  // are left to read_rows.
  void hint(std::uint32_t domain, std::uint64_t window) const;

  // Forgets the open file of a shard: it is about to go, or to be replaced.
  void close(std::uint32_t shard) const;

  RowPlace locate(std::uint32_t domain, std::uint64_t window) const;

  // The document in which a row begins, if the shard has an index of them.
  std::optional<DocumentPlace> document_at(std::uint32_t domain,
                                           std::uint64_t window) const;

 private:
  using OpenFile = OpenFiles::Pin<File>;
  struct OpenShard {
    const Shard* shard;
    std::uint32_t number;  // through all domains
    OpenFile file;
  };
  // A row that is about to be read.
  struct Row {
    OpenShard open;
    RowPlace place;
  };

  // What is open of a shard: see the numbers of OpenFiles.
  enum class Part { kTokens, kDocuments, kChecksums, kPacking, kParts };
  std::size_t number_of(Part part, std::uint32_t shard) const {
    return static_cast<std::size_t>(part) * shards_ + shard;
  }
  OpenFile open(const Shard& shard, std::uint32_t number) const;
  // Waits until it is here.
  std::shared_ptr<const File> open_where_it_is(const Shard& shard,
                                               std::uint32_t number) const;
  Row open_row(const RowRequest& request) const;
  // Calls use(table) with a shard's table of documents.
  template <typename Use>
  auto with_documents(const Shard& shard, std::uint32_t number, Use use) const;

  // The pieces of a row of a packed shard, by the row's number in it.
  void read_pieces(const Shard& shard, std::uint32_t number, std::uint64_t row,
                   std::vector<Piece>& pieces) const;

  // Where the ids of a mapped row lie, if they are used there.
  const std::byte* in_place(const Row& row) const;
  bool is_read_in_place(const Row& row) const;
  // `next`: the row that is read after this one, or null.
  void read_row(const Row& row, const Row* next, const RowBuffers& buffers,
                Workspace& workspace) const;
  void read_packed_row(const Row& row, const RowBuffers& buffers,
                       Workspace& workspace) const;
  void read_tokens(const OpenShard& open, std::uint64_t first,
                   std::uint64_t count, Workspace& workspace) const;
  void read_bytes(const OpenShard& open, std::uint64_t offset,
                  std::span<std::byte> out, Workspace& workspace) const;
  // Returns the largest id. `next`: see Widen.
  std::uint64_t write_ids(const std::byte* ids, std::size_t width,
                          const std::byte* next,
                          const RowBuffers& buffers) const;
  void mark_documents(const Row& row, const RowBuffers& buffers,
                      Workspace& workspace) const;
  std::uint64_t id_end(const Shard& shard) const;
  [[noreturn]] void throw_token_error(const Shard& shard, std::uint64_t first,
                                      const Workspace& workspace) const;

  // For ids of one width on the disk.
  struct Kernels {
    Widen inputs;
    Widen targets;
  };

  std::vector<Domain> domains_;
  CorpusOptions options_;
  std::uint64_t id_end_;          // ids that the options allow are below
  std::vector<Kernels> kernels_;  // by the logarithm of the width
  std::vector<std::vector<std::uint64_t>> window_ends_;
  std::vector<std::uint32_t> first_shard_;
  std::size_t shards_ = 0;
  std::unique_ptr<Locations> locations_;
  std::unique_ptr<OpenFiles> files_;
};

}  // namespace mixloader
