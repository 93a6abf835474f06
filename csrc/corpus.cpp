#include "corpus.h"

#include <sys/resource.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <utility>

#include "error.h"

namespace mixloader {
namespace {

// Extents are read together if no more than this lies between them: about what
// another system call costs.
constexpr std::uint64_t kGap = 4096;

// Ids that become inputs and targets in turn, so that what was read is still in
// the first cache.
constexpr std::uint64_t kIdsAtATime = 4096;

// A data set may have more shards than a process may have descriptors, and
// others need some, too. A map needs none.
std::size_t most_open(ReadMode mode) {
  if (mode == ReadMode::kMmap) return 8192;
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return std::clamp<std::size_t>(limit.rlim_cur / 2, 1, 4096);
}

void check_format(const RowFormat& format) {
  if (!format.mask_targets) return;
  if (format.boundaries == Boundaries::kNone || format.shared ||
      format.targets == TokenType::kUint16) {
    throw std::invalid_argument(
        "mask_targets needs boundaries of documents, and targets of a signed "
        "type in a buffer of their own");
  }
}

void check_boundaries(const Shard& shard, Boundaries boundaries) {
  if (boundaries != Boundaries::kIndex || shard.windows == 0 ||
      !shard.packing.empty() || !shard.documents.path.empty() ||
      shard.extents_are_documents) {
    return;
  }
  throw ShardError(
      "shard " + shard.name +
      " has no index of its documents; ask for boundaries by its end-of-text "
      "tokens, or for none");
}

}  // namespace

Corpus::Corpus(std::vector<Domain> domains, CorpusOptions options)
    : domains_(std::move(domains)),
      options_(options),
      id_end_(std::min(options.vocab_size > 0
                           ? options.vocab_size
                           : std::numeric_limits<std::uint64_t>::max(),
                       capacity_of(options.format.inputs))) {
  const RowFormat& format = options_.format;
  check_format(format);
  if (!format.shared) id_end_ = std::min(id_end_, capacity_of(format.targets));
  for (const std::size_t width : {1, 2, 4, 8}) {
    kernels_.push_back(
        {widen_from(width, format.inputs), widen_from(width, format.targets)});
  }
  std::vector<std::string> paths;
  for (const Domain& domain : domains_) {
    first_shard_.push_back(static_cast<std::uint32_t>(paths.size()));
    std::uint64_t windows = 0;
    auto& ends = window_ends_.emplace_back();
    for (const Shard& shard : domain.shards) {
      check_shard(shard);
      check_boundaries(shard, format.boundaries);
      if (!shard.packing.empty()) check_packable(format);
      windows += shard.windows;
      ends.push_back(windows);
      paths.push_back(shard.path);
    }
  }
  shards_ = paths.size();
  locations_ = std::make_unique<Locations>(std::move(paths));
  files_ = std::make_unique<OpenFiles>(number_of(Part::kParts, 0),
                                       most_open(options_.mode));
}

Corpus::OpenFile Corpus::open(const Shard& shard, std::uint32_t number) const {
  return files_->get<File>(number_of(Part::kTokens, number), [&] {
    const auto file = open_where_it_is(shard, number);
    const std::uint64_t end = byte_of(shard, shard.tokens);
    if (file->size() < end) {
      throw ShardError(
          "shard " + shard.name + " has " + std::to_string(file->size()) +
          " bytes, but its " + std::to_string(shard.tokens) + " tokens need " +
          std::to_string(end) + "; it was truncated or replaced: restore it");
    }
    return file;
  });
}

std::shared_ptr<const File> Corpus::open_where_it_is(
    const Shard& shard, std::uint32_t number) const {
  while (true) {
    const std::string path = locations_->wait(number);
    try {
      return std::make_shared<const File>(path, "shard " + shard.name,
                                          options_.mode);
    } catch (const TooManyFiles&) {
      throw;
    } catch (const ShardError&) {
      // It may have been withdrawn, and removed, since its path was told.
      if (locations_->find(number) == path) throw;
    }
  }
}

void Corpus::close(std::uint32_t shard) const {
  files_->close(number_of(Part::kTokens, shard));
}

template <typename Use>
auto Corpus::with_documents(const Shard& shard, std::uint32_t number,
                            Use use) const {
  const std::string& path = shard.documents.path;
  if (path == shard.name) {
    const OpenFile file = open(shard, number);
    return use(DocumentTable(shard, *file));
  }
  const auto file =
      files_->get<File>(number_of(Part::kDocuments, number), [&path] {
        return std::make_shared<const File>(path, "index of documents " + path);
      });
  return use(DocumentTable(shard, *file));
}

void Corpus::read_pieces(const Shard& shard, std::uint32_t number,
                         std::uint64_t row, std::vector<Piece>& pieces) const {
  files_
      ->get<PackedRows>(number_of(Part::kPacking, number),
                        [&] {
                          auto rows =
                              std::make_shared<const PackedRows>(shard.packing);
                          rows->expect(shard, options_.seq_len);
                          return rows;
                        })
      ->read(row, pieces);
}

RowPlace Corpus::locate(std::uint32_t domain, std::uint64_t window) const {
  const auto& ends = window_ends_[domain];
  const auto index = static_cast<std::uint32_t>(
      std::upper_bound(ends.begin(), ends.end(), window) - ends.begin());
  const std::uint64_t within = window - (index == 0 ? 0 : ends[index - 1]);
  const bool packed = !domains_[domain].shards[index].packing.empty();
  return {index, within, packed ? 0 : within * options_.seq_len};
}

std::optional<DocumentPlace> Corpus::document_at(std::uint32_t domain,
                                                 std::uint64_t window) const {
  RowPlace place = locate(domain, window);
  const Shard& shard = domains_[domain].shards[place.shard];
  const std::uint32_t number = first_shard_[domain] + place.shard;
  if (!shard.packing.empty()) {
    std::vector<Piece> pieces;
    read_pieces(shard, number, place.window, pieces);
    place.token = pieces.front().token;
  }
  if (shard.extents_are_documents) {
    const Extent extent = extent_at(shard, place.token);
    return DocumentPlace{extent.number, extent.first};
  }
  if (shard.documents.path.empty()) return std::nullopt;
  return with_documents(shard, number, [&place](const DocumentTable& table) {
    return table.find(place.token);
  });
}

void Corpus::hint(std::uint32_t domain, std::uint64_t window) const try {
  const RowPlace place = locate(domain, window);
  const Shard& shard = domains_[domain].shards[place.shard];
  const std::uint32_t number = first_shard_[domain] + place.shard;
  // A shard that has to be fetched first is asked for by reading it.
  const OpenFile file =
      shard.path.empty() ? files_->find<File>(number_of(Part::kTokens, number))
                         : open(shard, number);
  if (!file) return;
  std::vector<Piece> pieces{{place.token, options_.seq_len + 1}};
  if (!shard.packing.empty()) {
    read_pieces(shard, number, place.window, pieces);
  }
  for (const Piece& piece : pieces) {
    const std::uint64_t begin = byte_of(shard, piece.token);
    const std::uint64_t end =
        byte_of(shard, piece.token + piece.tokens - 1) + shard.width;
    if (begin < end) file->advise(begin, end - begin);
  }
} catch (const std::exception&) {
  // The row itself will say what is wrong.
}

Corpus::Row Corpus::open_row(const RowRequest& request) const {
  const RowPlace place = locate(request.domain, request.window);
  const Shard& shard = domains_[request.domain].shards[place.shard];
  const std::uint32_t number = first_shard_[request.domain] + place.shard;
  return {{&shard, number, open(shard, number)}, place};
}

void Corpus::read_rows(std::span<const RowRequest> rows,
                       Workspace& workspace) const {
  if (rows.empty()) return;
  Row next = open_row(rows.front());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row row = std::move(next);
    const bool last = i + 1 == rows.size();
    if (!last) next = open_row(rows[i + 1]);
    read_row(row, last ? nullptr : &next, rows[i].buffers, workspace);
  }
}

const std::byte* Corpus::in_place(const Row& row) const {
  if (!is_read_in_place(row)) return nullptr;
  const Shard& shard = *row.open.shard;
  return row.open.file->at(byte_of(shard, row.place.token),
                           (options_.seq_len + 1) * shard.width);
}

// Else its tokens are gathered in the workspace first.
bool Corpus::is_read_in_place(const Row& row) const {
  const Shard& shard = *row.open.shard;
  const Boundaries boundaries = options_.format.boundaries;
  return row.open.file->is_mapped() && shard.is_one_run() &&
         shard.checksums.empty() && shard.packing.empty() &&
         boundaries != Boundaries::kAfterEot &&
         boundaries != Boundaries::kAtEot;
}

void Corpus::read_row(const Row& row, const Row* next,
                      const RowBuffers& buffers, Workspace& workspace) const {
  const Shard& shard = *row.open.shard;
  if (!shard.packing.empty()) return read_packed_row(row, buffers, workspace);
  const std::uint64_t count = options_.seq_len + 1;
  std::uint64_t largest = 0;
  if (const std::byte* ids = in_place(row)) {
    const std::byte* after = next == nullptr ? nullptr : in_place(*next);
    row.open.file->use(
        byte_of(shard, row.place.token), count * shard.width,
        [&, ids] { largest = write_ids(ids, shard.width, after, buffers); });
  } else {
    read_tokens(row.open, row.place.token, count, workspace);
    largest = write_ids(workspace.tokens.data(), shard.width, nullptr, buffers);
  }
  if (largest >= id_end(shard)) {
    read_tokens(row.open, row.place.token, count, workspace);
    throw_token_error(shard, row.place.token, workspace);
  }
  if (options_.format.boundaries != Boundaries::kNone) {
    mark_documents(row, buffers, workspace);
  }
}

void Corpus::read_packed_row(const Row& row, const RowBuffers& buffers,
                             Workspace& workspace) const {
  const Shard& shard = *row.open.shard;
  const auto read = [&](std::uint64_t token, std::uint64_t count) {
    read_tokens(row.open, token, count, workspace);
    return workspace.tokens.data();
  };
  const auto check = [&](std::uint64_t token, std::uint64_t largest) {
    if (largest >= id_end(shard)) throw_token_error(shard, token, workspace);
  };
  read_pieces(shard, row.open.number, row.place.window, workspace.pieces);
  write_packed_row(workspace.pieces, options_.seq_len, shard.width,
                   options_.format, read, check, buffers);
}

// Tokens [first, first + count) of a shard to workspace.tokens, as they are.
void Corpus::read_tokens(const OpenShard& open, std::uint64_t first,
                         std::uint64_t count, Workspace& workspace) const {
  const Shard& shard = *open.shard;
  workspace.tokens.resize(count * shard.width);
  const std::span<std::byte> tokens(workspace.tokens);
  if (shard.is_one_run()) {
    read_bytes(open, byte_of(shard, first), tokens, workspace);
    return;
  }
  auto& ranges = workspace.ranges;
  ranges.clear();
  append_ranges(shard, first, count, ranges);
  std::size_t done = 0;
  for (std::size_t i = 0; i < ranges.size();) {
    const std::uint64_t begin = ranges[i].begin;
    std::uint64_t end = begin + ranges[i].size;
    std::size_t behind = i + 1;
    while (behind < ranges.size() && ranges[behind].begin >= end &&
           ranges[behind].begin - end <= kGap) {
      end = ranges[behind].begin + ranges[behind].size;
      ++behind;
    }
    if (behind == i + 1) {
      read_bytes(open, begin, tokens.subspan(done, ranges[i].size), workspace);
      done += ranges[i++].size;
      continue;
    }
    workspace.span.resize(end - begin);
    read_bytes(open, begin, workspace.span, workspace);
    for (; i < behind; ++i) {
      std::memcpy(&tokens[done], &workspace.span[ranges[i].begin - begin],
                  ranges[i].size);
      done += ranges[i].size;
    }
  }
}

void Corpus::read_bytes(const OpenShard& open, std::uint64_t offset,
                        std::span<std::byte> out, Workspace& workspace) const {
  const std::string& path = open.shard->checksums;
  if (path.empty()) {
    open.file->read(offset, out);
    return;
  }
  files_
      ->get<Checksums>(
          number_of(Part::kChecksums, open.number),
          [&path] {
            return std::make_shared<const Checksums>(
                std::make_shared<const File>(path, "checksums " + path));
          })
      ->read(*open.file, offset, out, workspace.blocks);
}

std::uint64_t Corpus::write_ids(const std::byte* ids, std::size_t width,
                                const std::byte* next,
                                const RowBuffers& buffers) const {
  const RowFormat& format = options_.format;
  const Kernels& kernels = kernels_[std::countr_zero(width)];
  const std::uint64_t n = options_.seq_len;
  if (format.shared) return kernels.inputs(ids, n + 1, buffers.inputs, next);
  std::uint64_t largest = 0;
  for (std::uint64_t i = 0; i < n; i += kIdsAtATime) {
    const std::uint64_t some = std::min(kIdsAtATime, n - i);
    const std::byte* from = ids + i * width;
    largest = std::max(
        {largest,
         kernels.inputs(from, some,
                        buffers.inputs + i * width_of(format.inputs),
                        next == nullptr ? nullptr : next + i * width),
         kernels.targets(from + width, some,
                         buffers.targets + i * width_of(format.targets),
                         nullptr)});
  }
  return largest;
}

void Corpus::mark_documents(const Row& row, const RowBuffers& buffers,
                            Workspace& workspace) const {
  const Shard& shard = *row.open.shard;
  const RowFormat& format = options_.format;
  const std::uint64_t first = row.place.token;
  const std::uint64_t last = first + options_.seq_len;
  auto& starts = workspace.starts;
  starts.clear();
  if (format.boundaries != Boundaries::kIndex) {
    append_eot_starts(workspace.tokens.data(), shard.width,
                      options_.seq_len + 1, format.eot,
                      format.boundaries == Boundaries::kAtEot, starts);
  } else if (shard.extents_are_documents) {
    append_extent_starts(shard, first, last, starts);
  } else {
    with_documents(shard, row.open.number, [&](const DocumentTable& table) {
      table.append_starts(first, last, starts);
    });
  }
  write_documents(starts, options_.seq_len, format, buffers);
}

// Ids of a shard that can be used are below this.
std::uint64_t Corpus::id_end(const Shard& shard) const {
  if (!shard.is_signed) return id_end_;
  return std::min(id_end_, std::uint64_t{1} << (8 * shard.width - 1));
}

// For workspace.tokens, the tokens of a shard from `first` on.
void Corpus::throw_token_error(const Shard& shard, std::uint64_t first,
                               const Workspace& workspace) const {
  const std::uint64_t end = id_end(shard);
  const std::uint64_t count = workspace.tokens.size() / shard.width;
  std::uint64_t i = 0;
  std::uint64_t id = 0;
  while (i < count &&
         (id = id_at(workspace.tokens.data(), shard.width, i)) < end) {
    ++i;
  }
  if (i == count) {
    throw ShardError("shard " + shard.name +
                     " was written to while it was read; leave it alone");
  }
  const unsigned bits = 8 * shard.width;
  const bool negative = shard.is_signed && id >> (bits - 1) != 0;
  const std::string shown =
      negative ? std::to_string(static_cast<std::int64_t>(id << (64 - bits)) >>
                                (64 - bits))
               : std::to_string(id);
  std::string why;
  if (negative) {
    why = "ids count from 0";
  } else if (options_.vocab_size > 0 && id >= options_.vocab_size) {
    why = "the vocabulary has " + std::to_string(options_.vocab_size) + " ids";
  } else {
    why = "the type asked for holds only ids below " + std::to_string(id_end_);
  }
  throw TokenError("shard " + shard.name + " holds token id " + shown +
                   " at token " + std::to_string(first + i) + " (byte " +
                   std::to_string(byte_of(shard, first + i)) + "), but " + why +
                   "; check the shard's dtype (" +
                   (shard.is_signed ? "" : "u") + "int" + std::to_string(bits) +
                   " here), its tokenizer, vocab_size and the type asked for");
}

}  // namespace mixloader
