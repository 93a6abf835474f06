// Read-only files: every system call on data goes through here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace mixloader {

class File {
 public:
  // Opens a regular file for reading. Throws ShardError, naming the path.
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Fills `out` from byte `offset`. Throws ShardError if the file ends before
  // or cannot be read.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

  std::uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int descriptor_;
  std::uint64_t size_ = 0;
};

}  // namespace mixloader
