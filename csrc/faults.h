// Failures of system calls, made to order by tests. Unarmed, they cost the
// reading of one flag a call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mixloader::faults {

enum class Call { kOpen, kStat, kRead, kMap, kAdvise, kWrite };

// What the calls [nth, nth + times) of one kind meet, counted from 1.
struct Fault {
  Call call = Call::kRead;
  std::uint64_t nth = 1;
  std::uint64_t times = 1;
  int error = 0;          // errno; 0: none
  bool is_short = false;  // half of the bytes are read or written
  unsigned delay_ms = 0;  // before the call
};

// From now on, in all threads, until disarmed; replaces an earlier one.
void arm(const Fault& fault);
// Returns how many calls of the kind there were since it was armed.
std::uint64_t disarm();

extern std::atomic<bool> armed;
// Waits and sets errno if the fault says so. True: the call is to fail.
bool strike(Call call, std::size_t* size);

// To be asked before each call; may cut `size` short.
inline bool fails(Call call, std::size_t* size = nullptr) {
  return armed.load(std::memory_order_relaxed) && strike(call, size);
}

}  // namespace mixloader::faults
