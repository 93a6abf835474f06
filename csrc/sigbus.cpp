#include "sigbus.h"

#include <setjmp.h>
#include <signal.h>

#include <atomic>
#include <functional>
#include <mutex>

namespace mixloader {
namespace {

struct Guard {
  sigjmp_buf retreat;
  std::span<const std::byte> map;
};

// initial-exec: the first access of a thread must not allocate, it may be in
// the handler.
thread_local Guard* guard [[gnu::tls_model("initial-exec")]] = nullptr;
thread_local bool passing_on [[gnu::tls_model("initial-exec")]] = false;

// The handler before ours. Two, so that one is whole while the other is
// written.
struct sigaction before[2];
std::atomic<int> current{0};
std::mutex mutex;

// A handler before ours may have ours as the one before it, and come back.
void pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction& previous = before[current.load()];
  const bool has_info = (previous.sa_flags & SA_SIGINFO) != 0;
  const bool is_function = has_info || (previous.sa_handler != SIG_DFL &&
                                        previous.sa_handler != SIG_IGN);
  if (passing_on || !is_function) {
    struct sigaction fatal{};
    fatal.sa_handler = SIG_DFL;
    ::sigaction(SIGBUS, &fatal, nullptr);
    if (info->si_code <= 0) ::raise(SIGBUS);  // sent: it will not fault again
    return;
  }
  passing_on = true;
  if (has_info) {
    previous.sa_sigaction(signal, info, context);
  } else {
    previous.sa_handler(signal);
  }
  passing_on = false;
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  Guard* const here = guard;
  if (here != nullptr) {
    const auto* address = static_cast<const std::byte*>(info->si_addr);
    const std::less<> below;
    if (!below(address, here->map.data()) &&
        below(address, here->map.data() + here->map.size())) {
      guard = nullptr;
      ::siglongjmp(here->retreat, 1);
    }
  }
  pass_on(signal, info, context);
}

}  // namespace

void guard_against_sigbus() {
  const std::lock_guard lock(mutex);
  struct sigaction installed{};
  ::sigaction(SIGBUS, nullptr, &installed);
  if ((installed.sa_flags & SA_SIGINFO) != 0 &&
      installed.sa_sigaction == &on_sigbus) {
    return;
  }
  const int next = 1 - current.load();
  before[next] = installed;
  current = next;
  struct sigaction ours{};
  ours.sa_sigaction = &on_sigbus;
  // SA_NODEFER: the handler is left by a jump that restores no mask.
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  ::sigemptyset(&ours.sa_mask);
  ::sigaction(SIGBUS, &ours, nullptr);
}

bool survives(std::span<const std::byte> map, void (*work)(void*),
              void* argument) {
  Guard here;
  here.map = map;
  if (sigsetjmp(here.retreat, 0) != 0) return false;
  guard = &here;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  work(argument);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  guard = nullptr;
  return true;
}

}  // namespace mixloader
