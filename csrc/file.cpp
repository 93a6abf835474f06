#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "error.h"
#include "faults.h"
#include "sigbus.h"

namespace mixloader {
namespace {

using faults::Call;

std::string descriptor_limit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return std::to_string(limit.rlim_cur);
}

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

// O_NONBLOCK: opening a FIFO must not wait for a writer.
File::File(std::string path, std::string name, ReadMode mode)
    : path_(std::move(path)),
      name_(name.empty() ? "shard " + path_ : std::move(name)) {
  do {
    descriptor_ =
        faults::fails(Call::kOpen)
            ? -1
            : ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor_ < 0 && errno == EINTR);
  if (descriptor_ < 0) throw_cannot("open", errno);
  struct stat status{};
  if (faults::fails(Call::kStat) || ::fstat(descriptor_, &status) != 0) {
    const int error = errno;
    close();
    throw_cannot("look at", error);
  }
  if (!S_ISREG(status.st_mode)) {
    close();
    throw ShardError(name_ + " is not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
  device_ = status.st_dev;
  inode_ = status.st_ino;
  if (mode == ReadMode::kMmap && size_ > 0) map();
}

File::~File() {
  close();
  if (map_ != nullptr) ::munmap(const_cast<std::byte*>(map_), size_);
}

void File::close() {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
}

void File::map() {
  void* map = faults::fails(Call::kMap) ? MAP_FAILED
                                        : ::mmap(nullptr, size_, PROT_READ,
                                                 MAP_SHARED, descriptor_, 0);
  const int error = errno;
  close();  // the map stays
  if (map == MAP_FAILED) throw_cannot("map", error);
  map_ = static_cast<const std::byte*>(map);
  ::madvise(map, size_, MADV_RANDOM);  // rows are drawn at random
  guard_against_sigbus();
}

void File::throw_cannot(const char* what, int error) const {
  const std::string message =
      std::string("cannot ") + what + " " + name_ + ": " + std::strerror(error);
  switch (error) {
    case EMFILE:
      throw TooManyFiles(message + "; this process may open " +
                         descriptor_limit() +
                         " files at a time: raise the limit (ulimit -n), or "
                         "close some");
    case ENFILE:
    case ENOMEM:
      throw TooManyFiles(message);
    case ENOENT:
    case ENOTDIR:
      throw ShardError(message + "; restore it, or correct its path");
    case EACCES:
    case EPERM:
      throw ShardError(message + "; give this user leave to read it");
    default:
      throw ShardError(message);
  }
}

void File::throw_cut(std::uint64_t size, std::uint64_t end) const {
  throw ShardError(name_ + " ends at byte " + std::to_string(size) +
                   ", but its tokens reach byte " + std::to_string(end) +
                   " at least; it was truncated after it was opened: restore "
                   "it");
}

void File::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (is_mapped()) {
    const std::byte* from = at(offset, out.size());
    use(offset, out.size(),
        [from, out] { std::memcpy(out.data(), from, out.size()); });
    return;
  }
  std::size_t done = 0;
  while (done < out.size()) {
    std::size_t size = out.size() - done;
    const ssize_t got = faults::fails(Call::kRead, &size)
                            ? -1
                            : ::pread(descriptor_, out.data() + done, size,
                                      static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      throw ShardError("cannot read " + name_ + " at byte " +
                       std::to_string(offset + done) + ": " +
                       std::strerror(errno));
    }
    if (got == 0) throw_cut(offset + done, offset + out.size());
    done += static_cast<std::size_t>(got);
  }
}

void File::advise(std::uint64_t offset, std::uint64_t size) const {
  if (faults::fails(Call::kAdvise)) return;
  if (!is_mapped()) {
    ::posix_fadvise(descriptor_, static_cast<off_t>(offset),
                    static_cast<off_t>(size), POSIX_FADV_WILLNEED);
    return;
  }
  if (offset >= size_) return;
  const std::uint64_t begin = offset / page_size() * page_size();
  const std::uint64_t end = std::min(offset + size, size_);
  ::madvise(const_cast<std::byte*>(map_) + begin, end - begin, MADV_WILLNEED);
}

const std::byte* File::at(std::uint64_t offset, std::uint64_t size) const {
  if (offset > size_ || size > size_ - offset) throw_cut(size_, offset + size);
  return map_ + offset;
}

void File::use(std::uint64_t offset, std::uint64_t size, void (*work)(void*),
               void* argument) const {
  if (size == 0) return;
  const std::uint64_t end = offset + size;
  struct Job {
    void (*work)(void*);
    void* argument;
    const volatile std::byte* last;
    bool last_is_zero;
  } job{work, argument, map_ + end - 1, false};
  const bool whole = survives(
      {map_, size_},
      [](void* pointer) {
        auto* job = static_cast<Job*>(pointer);
        job->work(job->argument);
        job->last_is_zero = *job->last == std::byte{0};
      },
      &job);
  // A file cut within a page does not fault there, but reads as zeros up to the
  // end of the page. So only where the last byte is zero is there any doubt.
  if (whole && (!job.last_is_zero || reaches(end))) return;
  struct stat status{};
  const bool known = ::stat(path_.c_str(), &status) == 0;
  throw_cut(known ? static_cast<std::uint64_t>(status.st_size) : offset, end);
}

// False if the file has been cut before `end`, which may lie within a page.
bool File::reaches(std::uint64_t end) const {
  const std::uint64_t next_page =
      (end + page_size() - 1) / page_size() * page_size();
  if (next_page < size_) {  // still there: so is what lies before
    return survives(
        {map_, size_},
        [](void* byte) {
          static_cast<void>(*static_cast<const volatile std::byte*>(byte));
        },
        const_cast<std::byte*>(map_ + next_page));
  }
  struct stat status{};
  if (faults::fails(Call::kStat) || ::stat(path_.c_str(), &status) != 0) {
    return true;  // renamed or removed, and not cut as far as one can tell
  }
  const bool is_same = status.st_dev == device_ && status.st_ino == inode_;
  return !is_same || static_cast<std::uint64_t>(status.st_size) >= end;
}

namespace {

// A descriptor that is closed, and a temporary file that is removed unless it
// was kept.
struct NewFile {
  std::string path;
  int descriptor;
  bool kept = false;

  ~NewFile() {
    if (descriptor >= 0) ::close(descriptor);
    if (!kept) ::unlink(path.c_str());
  }
};

[[noreturn]] void throw_cannot_write(const std::string& path) {
  throw ShardError("cannot write " + path + ": " + std::strerror(errno) +
                   "; what was there before is untouched");
}

}  // namespace

void write_file(const std::string& path, std::span<const std::byte> bytes) {
  const std::string folder = path.substr(0, path.find_last_of('/') + 1);
  const std::string draft = path + "." + std::to_string(::getpid()) + ".tmp";
  NewFile file{draft, ::open(draft.c_str(),
                             O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)};
  if (file.descriptor < 0) throw_cannot_write(path);
  while (!bytes.empty()) {
    std::size_t size = bytes.size();
    const ssize_t done = faults::fails(Call::kWrite, &size)
                             ? -1
                             : ::write(file.descriptor, bytes.data(), size);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw_cannot_write(path);
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
  if (faults::fails(Call::kWrite) || ::fsync(file.descriptor) != 0 ||
      ::rename(draft.c_str(), path.c_str()) != 0) {
    throw_cannot_write(path);
  }
  file.kept = true;
  const int parent =
      ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (parent >= 0) {
    ::fsync(parent);  // the rename; not every file system can
    ::close(parent);
  }
}

}  // namespace mixloader
