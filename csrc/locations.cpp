#include "locations.h"

#include <utility>

#include "error.h"

namespace mixloader {

// One reader that waits, for as long as this lives; the lock is held at either
// end.
class Locations::Asking {
 public:
  Asking(Locations& locations, std::uint32_t shard)
      : waiting_(locations.waiting_), mine_(waiting_.insert(shard)) {
    locations.asked_ = true;
    locations.changed_.notify_all();
  }
  ~Asking() { waiting_.erase(mine_); }
  Asking(const Asking&) = delete;
  Asking& operator=(const Asking&) = delete;

 private:
  std::multiset<std::uint32_t>& waiting_;
  std::multiset<std::uint32_t>::iterator mine_;
};

Locations::Locations(std::vector<std::string> paths)
    : fetched_(paths.size()),
      paths_(std::move(paths)),
      failures_(paths_.size()) {
  for (std::size_t shard = 0; shard < paths_.size(); ++shard) {
    fetched_[shard] = paths_[shard].empty();
    any_fetched_ = any_fetched_ || fetched_[shard];
  }
}

std::string Locations::wait(std::uint32_t shard) {
  std::unique_lock lock(mutex_);
  if (paths_[shard].empty()) {
    failures_[shard].clear();
    const Asking asking(*this, shard);
    changed_.wait(lock, [&] { return settled(shard); });
  }
  if (!paths_[shard].empty()) return paths_[shard];
  throw ShardError(stopped_ ? "the loader is closed" : failures_[shard]);
}

bool Locations::wait_for(std::uint32_t shard,
                         std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  if (!settled(shard)) {
    const Asking asking(*this, shard);
    changed_.wait_for(lock, timeout, [&] { return settled(shard); });
  }
  if (!paths_[shard].empty()) return true;
  if (stopped_) throw ShardError("the loader is closed");
  if (failures_[shard].empty()) return false;
  throw ShardError(std::exchange(failures_[shard], {}));
}

std::string Locations::find(std::uint32_t shard) const {
  const std::lock_guard lock(mutex_);
  return paths_[shard];
}

void Locations::provide(std::uint32_t shard, std::string path) {
  {
    const std::lock_guard lock(mutex_);
    paths_.at(shard) = std::move(path);
    failures_[shard].clear();
  }
  changed_.notify_all();
}

void Locations::fail(std::uint32_t shard, std::string message) {
  {
    const std::lock_guard lock(mutex_);
    failures_.at(shard) = std::move(message);
  }
  changed_.notify_all();
}

void Locations::withdraw(std::uint32_t shard) {
  {
    const std::lock_guard lock(mutex_);
    paths_.at(shard).clear();
    // A reader that had not woken yet asks again.
    asked_ = asked_ || waiting_.contains(shard);
  }
  changed_.notify_all();
}

std::vector<std::uint32_t> Locations::wanted(
    std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return stopped_ || asked_; });
  asked_ = false;
  std::vector<std::uint32_t> result;
  for (auto shard = waiting_.begin(); shard != waiting_.end();
       shard = waiting_.upper_bound(*shard)) {
    if (!settled(*shard)) result.push_back(*shard);
  }
  return result;
}

void Locations::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
}

bool Locations::settled(std::uint32_t shard) const {
  return stopped_ || !paths_[shard].empty() || !failures_[shard].empty();
}

}  // namespace mixloader
