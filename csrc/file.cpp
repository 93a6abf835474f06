#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"

namespace mixloader {

// O_NONBLOCK: opening a FIFO must not wait for a writer.
File::File(std::string path)
    : path_(std::move(path)),
      descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) {
    throw ShardError("cannot open shard " + path_ + ": " +
                     std::strerror(errno));
  }
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    throw ShardError("shard " + path_ + " is not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() { ::close(descriptor_); }

void File::read(std::uint64_t offset, std::span<std::byte> out) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t got =
        ::pread(descriptor_, out.data() + done, out.size() - done,
                static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      throw ShardError("cannot read shard " + path_ + " at byte " +
                       std::to_string(offset + done) + ": " +
                       std::strerror(errno));
    }
    if (got == 0) {
      throw ShardError(
          "shard " + path_ + " ends at byte " + std::to_string(offset + done) +
          ", but its tokens reach byte " + std::to_string(offset + out.size()) +
          " at least; it was truncated after it was opened: restore it");
    }
    done += static_cast<std::size_t>(got);
  }
}

}  // namespace mixloader
