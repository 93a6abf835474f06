// The plain loops that mixloader is measured against: rows of T + 1 uint16
// tokens from given places, widened into given buffers. No plan, no checks, no
// threads, nothing allocated. Compiled and called by bench/bare.py.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

enum Output { kTwo = 0, kShared = 1, kMixed = 2, kRaw = 3 };

struct Row {
  const std::uint16_t* tokens;
  const std::uint16_t* next;  // of the row after, or null: worth a prefetch
  std::size_t length;         // T
};

// 32 tokens are one cache line, and the line of the next row is asked for while
// this one is widened.
constexpr std::size_t kLine = 32;

template <typename Out>
void widen(const Row& row, std::size_t from, std::size_t to,
           Out* __restrict out) {
  const std::uint16_t* __restrict tokens = row.tokens + from;
  const std::size_t n = to - from;
  std::size_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    if (row.next) __builtin_prefetch(row.next + from + i);
    for (std::size_t j = i; j < i + kLine; ++j) out[j] = tokens[j];
  }
  for (; i < n; ++i) out[i] = tokens[i];
}

template <int kOutput>
void write(Row row, std::size_t slot, void* inputs, void* targets) {
  const std::size_t length = row.length;
  if constexpr (kOutput == kShared) {
    widen(row, 0, length + 1,
          static_cast<std::int64_t*>(inputs) + slot * (length + 1));
  } else if constexpr (kOutput == kRaw) {
    if (row.next) {
      for (std::size_t i = 0; i <= length; i += kLine)
        __builtin_prefetch(row.next + i);
    }
    std::memcpy(static_cast<std::uint16_t*>(inputs) + slot * (length + 1),
                row.tokens, 2 * (length + 1));
  } else {
    using In = std::conditional_t<kOutput == kTwo, std::int64_t, std::int32_t>;
    widen(row, 0, length, static_cast<In*>(inputs) + slot * length);
    row.next = nullptr;
    widen(row, 1, length + 1,
          static_cast<std::int64_t*>(targets) + slot * length);
  }
}

struct Job {
  const std::uint64_t* starts;  // tokens
  std::size_t rows;
  std::size_t length;
  std::size_t slots;  // rows that the buffers hold; they are filled in a circle
  void* inputs;
  void* targets;
};

template <int kOutput>
int run_pread(int fd, const Job& job) {
  std::vector<std::uint16_t> scratch(job.length + 1);
  const std::size_t bytes = 2 * (job.length + 1);
  for (std::size_t r = 0; r < job.rows; ++r) {
    const std::size_t slot = r % job.slots;
    std::uint16_t* to = scratch.data();
    if (kOutput == kRaw)
      to = static_cast<std::uint16_t*>(job.inputs) + slot * (job.length + 1);
    const auto got = pread(fd, to, bytes, 2 * job.starts[r]);
    if (got != static_cast<ssize_t>(bytes)) return got < 0 ? errno : EIO;
    if (kOutput != kRaw)
      write<kOutput>({to, nullptr, job.length}, slot, job.inputs, job.targets);
  }
  return 0;
}

template <int kOutput>
int run_mmap(const std::uint16_t* map, const Job& job) {
  for (std::size_t r = 0; r < job.rows; ++r) {
    const std::uint16_t* next =
        r + 1 < job.rows ? map + job.starts[r + 1] : nullptr;
    write<kOutput>({map + job.starts[r], next, job.length}, r % job.slots,
                   job.inputs, job.targets);
  }
  return 0;
}

template <int kOutput>
int run(int fd, const void* map, const Job& job) {
  return map ? run_mmap<kOutput>(static_cast<const std::uint16_t*>(map), job)
             : run_pread<kOutput>(fd, job);
}

}  // namespace

extern "C" {

// advice: of madvise; populate: fault every page in now. Null on failure.
void* bare_map(int fd, std::size_t bytes, int populate, int advice) {
  void* map = mmap(nullptr, bytes, PROT_READ,
                   MAP_SHARED | (populate ? MAP_POPULATE : 0), fd, 0);
  if (map == MAP_FAILED || madvise(map, bytes, advice) != 0) return nullptr;
  return map;
}

int bare_unmap(void* map, std::size_t bytes) { return munmap(map, bytes); }

// Fills `rows` rows with pread from fd, or from `map` where there is one.
// Returns 0 or an errno.
int bare_run(int fd, const void* map, int output, const std::uint64_t* starts,
             std::size_t rows, std::size_t length, std::size_t slots,
             void* inputs, void* targets) {
  const Job job{starts, rows, length, slots, inputs, targets};
  switch (output) {
    case kTwo:
      return run<kTwo>(fd, map, job);
    case kShared:
      return run<kShared>(fd, map, job);
    case kMixed:
      return run<kMixed>(fd, map, job);
    case kRaw:
      return run<kRaw>(fd, map, job);
    default:
      return EINVAL;
  }
}

// Pages of a file that are in the page cache, by mincore; -1 on failure.
long bare_resident_pages(int fd, std::size_t bytes) {
  const std::size_t page = sysconf(_SC_PAGESIZE);
  void* map = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) return -1;
  std::vector<unsigned char> pages((bytes + page - 1) / page);
  const int failed = mincore(map, bytes, pages.data());
  munmap(map, bytes);
  if (failed) return -1;
  return std::count_if(pages.begin(), pages.end(),
                       [](unsigned char state) { return state & 1; });
}
}
