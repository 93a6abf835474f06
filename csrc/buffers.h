// Memory for batches that comes back: blocks of one size, whose pages are warm
// from the batch before. A fresh one of 512 KB costs the kernel 128 page faults
// to fill and as many pages to free.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace mixloader {

class BufferPool {
 public:
  // A block, 64-byte aligned; its contents are whatever they were.
  using Block = std::shared_ptr<std::byte>;

  explicit BufferPool(std::size_t bytes);

  // The block goes back when the last pointer to it dies, on any thread, also
  // after the pool is gone.
  Block take();

 private:
  struct Free {
    void operator()(std::byte* block) const;
  };
  using Owned = std::unique_ptr<std::byte, Free>;
  struct Spare {
    std::mutex mutex;
    std::size_t limit;  // blocks; more of them are freed
    std::vector<Owned> blocks;
  };

  const std::size_t bytes_;
  const std::shared_ptr<Spare> spare_;
};

}  // namespace mixloader
