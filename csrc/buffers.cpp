#include "buffers.h"

#include <algorithm>
#include <new>
#include <utility>

namespace mixloader {
namespace {

constexpr std::align_val_t kAlignment{64};

// Kept for whoever drops many batches at once, as after the micro-batches of
// an optimizer step.
constexpr std::size_t kSpareBlocks = 16;
constexpr std::size_t kSpareBytes = 64 << 20;

}  // namespace

void BufferPool::Free::operator()(std::byte* block) const {
  ::operator delete(block, kAlignment);
}

BufferPool::BufferPool(std::size_t bytes)
    : bytes_(bytes), spare_(std::make_shared<Spare>()) {
  spare_->limit =
      std::clamp<std::size_t>(kSpareBytes / bytes_, 2, kSpareBlocks);
  spare_->blocks.reserve(spare_->limit);
}

BufferPool::Block BufferPool::take() {
  Owned block;
  {
    const std::lock_guard lock(spare_->mutex);
    if (!spare_->blocks.empty()) {
      block = std::move(spare_->blocks.back());
      spare_->blocks.pop_back();
    }
  }
  if (!block) {
    block.reset(static_cast<std::byte*>(::operator new(bytes_, kAlignment)));
  }
  const std::weak_ptr<Spare> spare = spare_;
  return Block(block.release(), [spare](std::byte* bytes) {
    Owned returned(bytes);
    const auto pool = spare.lock();
    if (!pool) return;
    const std::lock_guard lock(pool->mutex);
    if (pool->blocks.size() < pool->limit) {
      pool->blocks.push_back(std::move(returned));
    }
  });
}

}  // namespace mixloader
