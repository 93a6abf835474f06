#include "faults.h"

#include <cerrno>
#include <chrono>
#include <mutex>
#include <thread>

namespace mixloader::faults {

std::atomic<bool> armed{false};

namespace {

std::mutex mutex;
Fault current;
std::uint64_t calls = 0;

}  // namespace

void arm(const Fault& fault) {
  const std::lock_guard lock(mutex);
  current = fault;
  calls = 0;
  armed = true;
}

std::uint64_t disarm() {
  const std::lock_guard lock(mutex);
  armed = false;
  return calls;
}

bool strike(Call call, std::size_t* size) {
  Fault fault;
  {
    const std::lock_guard lock(mutex);
    if (!armed || call != current.call) return false;
    ++calls;
    if (calls < current.nth || calls - current.nth >= current.times) {
      return false;
    }
    fault = current;
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(fault.delay_ms));
  if (fault.is_short && size != nullptr && *size > 1) *size /= 2;
  errno = fault.error;
  return fault.error != 0;
}

}  // namespace mixloader::faults
