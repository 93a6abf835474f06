// Checksums of the blocks of a file, in a sidecar, so that what is read is
// checked without reading the rest.
//
// The sidecar, little-endian:
//   8 bytes   "mixsums1": what it is, and the version of this layout
//   u64       bytes a block, a power of two
//   u64       bytes of the file
//   u64       XXH64 of the 24 bytes before
//   u64 each  XXH64 of block i, seeded with i; the last block may be shorter
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "file.h"

namespace mixloader {

// XXH64 (Collet, xxhash.com; specification 0.1.1).
std::uint64_t xxh64(std::span<const std::byte> bytes, std::uint64_t seed = 0);

class Checksums {
 public:
  // Checks the header. Throws ShardError if this is no sidecar.
  explicit Checksums(std::shared_ptr<const File> sidecar);

  // Fills `out` from byte `offset` of `file`, after checking every block that
  // it touches. Throws ShardError, naming the first that does not match.
  // Thread-safe; `blocks` is reused.
  void read(const File& file, std::uint64_t offset, std::span<std::byte> out,
            std::vector<std::byte>& blocks) const;

  // Checks the whole file. Throws ShardError, naming the first block that does
  // not match and how many there are.
  void verify(const File& file) const;

 private:
  void expect_size(const File& file) const;
  // How many of the blocks from `first` on, which `bytes` holds, do not match;
  // `bad` is the first of them.
  std::uint64_t count_bad(std::uint64_t first, std::span<const std::byte> bytes,
                          std::uint64_t& bad) const;
  [[noreturn]] void throw_bad(const File& file, std::uint64_t block,
                              std::uint64_t bad, std::uint64_t checked) const;

  std::shared_ptr<const File> sidecar_;
  std::uint64_t block_ = 0;  // bytes
  std::uint64_t size_ = 0;   // of the file, bytes
};

// Writes the sidecar of a file. Throws ShardError, and std::invalid_argument
// for a block size that is no power of two from 512 to 2^30.
void write_checksums(const std::string& path, const std::string& sidecar,
                     std::uint64_t block_bytes);

}  // namespace mixloader
