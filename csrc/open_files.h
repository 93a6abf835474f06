// What is open: a bounded number of files of a corpus, each opened when it is
// first needed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "error.h"

namespace mixloader {

// Objects that hold files open, numbered by the caller, of any type: a number
// always stands for the same. Finding one that is open takes no lock.
class OpenFiles {
  struct Slot;

 public:
  // Keeps what was got from going while it is used.
  template <typename T>
  class Pin {
   public:
    Pin() = default;
    Pin(Pin&& other) noexcept
        : files_(other.files_),
          slot_(std::exchange(other.slot_, nullptr)),
          own_(std::move(other.own_)),
          object_(std::exchange(other.object_, nullptr)) {}
    Pin& operator=(Pin&& other) noexcept {
      std::swap(files_, other.files_);
      std::swap(slot_, other.slot_);
      std::swap(own_, other.own_);
      std::swap(object_, other.object_);
      return *this;
    }
    ~Pin() {
      if (slot_ != nullptr) files_->release(*slot_);
    }

    const T& operator*() const { return *object_; }
    const T* operator->() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

   private:
    friend class OpenFiles;
    OpenFiles* files_ = nullptr;
    Slot* slot_ = nullptr;
    std::shared_ptr<const void> own_;  // if it is in no slot
    const T* object_ = nullptr;
  };

  // Numbers below `numbers`; at most `limit` open at a time (and those in use).
  OpenFiles(std::size_t numbers, std::size_t limit);

  // Object `number`. If it is not open, open() makes it, a shared_ptr<const T>;
  // if open() throws TooManyFiles, others are closed and it is tried again.
  template <typename T, typename Open>
  Pin<T> get(std::size_t number, Open open) {
    Pin<T> pin = find<T>(number);
    while (!pin) {
      std::shared_ptr<const T> opened;
      try {
        opened = open();
      } catch (const TooManyFiles&) {
        if (!shrink()) throw;
        continue;
      }
      install(number, std::move(opened), pin);
    }
    return pin;
  }

  // Object `number` if it is open.
  template <typename T>
  Pin<T> find(std::size_t number) {
    Pin<T> pin;
    Slot& slot = slots_[number];
    if ((slot.state.fetch_add(1, std::memory_order_acquire) & kOpen) == 0) {
      release(slot);
      return pin;
    }
    if (!slot.used.load(std::memory_order_relaxed)) {
      slot.used.store(true, std::memory_order_relaxed);
    }
    pin.files_ = this;
    pin.slot_ = &slot;
    pin.object_ = static_cast<const T*>(slot.object.get());
    return pin;
  }

  // Closes object `number`, once nobody uses it.
  void close(std::size_t number);

  std::size_t size() const;

 private:
  static constexpr std::uint32_t kOpen = std::uint32_t{1} << 31;
  struct Slot {
    std::atomic<std::uint32_t> state{0};  // kOpen, plus how many use it
    std::atomic<bool> used{false};        // since the clock's hand came by
    // Written with the mutex held while not open.
    std::shared_ptr<const void> object;
  };
  using Closed = std::vector<std::shared_ptr<const void>>;

  template <typename T>
  void install(std::size_t number, std::shared_ptr<const T> opened,
               Pin<T>& pin) {
    pin.object_ = opened.get();
    pin.files_ = this;
    pin.slot_ = put(number, opened);
    if (pin.slot_ == nullptr) pin.own_ = std::move(opened);
  }
  // The slot, with `object` in it and in use, or null if there is no room.
  Slot* put(std::size_t number, std::shared_ptr<const void> object);
  // Closes files until no more than `size` are open. False: none was closed.
  bool evict_to(std::size_t size, Closed& closed);
  bool shrink();
  void release(Slot& slot);

  std::vector<Slot> slots_;
  mutable std::mutex mutex_;
  std::size_t limit_;
  std::vector<std::size_t> clock_;  // numbers of open slots
  std::size_t hand_ = 0;
};

}  // namespace mixloader
