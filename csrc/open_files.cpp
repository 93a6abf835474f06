#include "open_files.h"

#include <algorithm>

namespace mixloader {

OpenFiles::OpenFiles(std::size_t numbers, std::size_t limit)
    : slots_(numbers), limit_(std::max<std::size_t>(limit, 1)) {}

std::size_t OpenFiles::size() const {
  const std::lock_guard lock(mutex_);
  return clock_.size();
}

OpenFiles::Slot* OpenFiles::put(std::size_t number,
                                std::shared_ptr<const void> object) {
  Closed closed;  // after the lock is gone
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[number];
  // Another thread was faster, or what was closed here is still in use.
  if (slot.object != nullptr) return nullptr;
  evict_to(limit_ - 1, closed);
  if (clock_.size() >= limit_) return nullptr;
  clock_.push_back(number);
  slot.object = std::move(object);
  slot.used.store(true, std::memory_order_relaxed);
  slot.state.fetch_add(kOpen + 1, std::memory_order_release);
  return &slot;
}

bool OpenFiles::evict_to(std::size_t size, Closed& closed) {
  if (clock_.size() <= size) return false;
  closed.reserve(clock_.size() - size);
  // Twice around: once to take the marks of use away.
  for (std::size_t left = 2 * clock_.size(); left > 0 && clock_.size() > size;
       --left) {
    if (hand_ >= clock_.size()) hand_ = 0;
    Slot& slot = slots_[clock_[hand_]];
    std::uint32_t idle = kOpen;
    if (slot.used.exchange(false, std::memory_order_relaxed) ||
        !slot.state.compare_exchange_strong(idle, 0,
                                            std::memory_order_acq_rel)) {
      ++hand_;
      continue;
    }
    closed.push_back(std::move(slot.object));
    slot.object = nullptr;
    clock_[hand_] = clock_.back();
    clock_.pop_back();
  }
  return !closed.empty();
}

bool OpenFiles::shrink() {
  Closed closed;
  const std::lock_guard lock(mutex_);
  limit_ = std::max<std::size_t>(clock_.size() / 2, 1);
  return evict_to(clock_.size() / 2, closed);
}

void OpenFiles::close(std::size_t number) {
  std::shared_ptr<const void> closed;
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[number];
  const auto found = std::find(clock_.begin(), clock_.end(), number);
  if (found == clock_.end()) return;
  *found = clock_.back();
  clock_.pop_back();
  const auto users =
      slot.state.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  if (users == 0) closed = std::move(slot.object);
}

// Who leaves a closed slot last takes the object away.
void OpenFiles::release(Slot& slot) {
  if (slot.state.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  std::shared_ptr<const void> closed;
  const std::lock_guard lock(mutex_);
  if (slot.state.load(std::memory_order_acquire) == 0) {
    closed = std::move(slot.object);
  }
}

}  // namespace mixloader
