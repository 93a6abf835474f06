// Read-only files: every system call on data goes through here.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace mixloader {

// How shards are read.
enum class ReadMode { kPread, kMmap };

class File {
 public:
  // Opens a regular file for reading; kMmap maps it as a whole. Errors call it
  // `name`, e.g. "shard /data/a.bin" (and it is that by default). Throws
  // ShardError, and TooManyFiles if fewer open files would do.
  explicit File(std::string path, std::string name = {},
                ReadMode mode = ReadMode::kPread);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Fills `out` from byte `offset`. Throws ShardError if the file ends before
  // or cannot be read.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

  // Asks for bytes to be read from the disk soon. Says nothing if that fails.
  void advise(std::uint64_t offset, std::uint64_t size) const;

  // Mapped files only. Where bytes [offset, offset + size) lie; they may be
  // touched by use() alone. Throws ShardError if the file ended before when it
  // was opened.
  const std::byte* at(std::uint64_t offset, std::uint64_t size) const;
  bool is_mapped() const { return map_ != nullptr; }
  // Runs work() on bytes [offset, offset + size) of the map. Throws ShardError
  // if the file was cut there meanwhile: work() may have stopped half-way then,
  // so it must hold nothing that needs a destructor.
  template <typename Work>
  void use(std::uint64_t offset, std::uint64_t size, Work work) const {
    use(
        offset, size, [](void* argument) { (*static_cast<Work*>(argument))(); },
        &work);
  }

  std::uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }
  const std::string& name() const { return name_; }

 private:
  void use(std::uint64_t offset, std::uint64_t size, void (*work)(void*),
           void* argument) const;
  bool reaches(std::uint64_t end) const;
  void map();
  void close();
  [[noreturn]] void throw_cannot(const char* what, int error) const;
  [[noreturn]] void throw_cut(std::uint64_t size, std::uint64_t end) const;

  std::string path_;
  std::string name_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
  const std::byte* map_ = nullptr;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// Writes a whole file so that `path` holds what it held before or all of
// `bytes`, whenever the program or the machine stops. Throws ShardError.
void write_file(const std::string& path, std::span<const std::byte> bytes);

}  // namespace mixloader
