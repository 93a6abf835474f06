// A condition variable that may be watched for a moment before one sleeps on
// it: to be put to sleep and woken costs several microseconds on either side.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace mixloader {

// All is called with the lock held, but for the wakes.
class Bell {
 public:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  // Says whether somebody sleeps and nobody watches.
  bool ring() {
    rings_.fetch_add(1, std::memory_order_release);
    return asleep_ > 0 && watching_ == 0;
  }
  void wake_one() { rung_.notify_one(); }
  void wake_all() { rung_.notify_all(); }

  // Lets go of the lock until the bell rings, for kWatch at most. False: it did
  // not.
  bool watch(Lock& lock) {
    const std::uint64_t before = rings_.load(std::memory_order_relaxed);
    const auto end = Clock::now() + kWatch;
    ++watching_;
    lock.unlock();
    while (rings_.load(std::memory_order_acquire) == before &&
           Clock::now() < end) {
      pause();
    }
    lock.lock();
    --watching_;
    return rings_.load(std::memory_order_relaxed) != before;
  }

  // Until it is woken, or for no reason.
  void sleep(Lock& lock) {
    ++asleep_;
    rung_.wait(lock);
    --asleep_;
  }
  void sleep_until(Lock& lock, Clock::time_point end) {
    ++asleep_;
    rung_.wait_until(lock, end);
    --asleep_;
  }
  unsigned asleep() const { return asleep_; }

 private:
  static constexpr std::chrono::microseconds kWatch{20};

  // Leaves the core to its other thread for some cycles.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::condition_variable rung_;
  std::atomic<std::uint64_t> rings_{0};
  unsigned watching_ = 0;
  unsigned asleep_ = 0;
};

}  // namespace mixloader
