#include "locations.h"

#include <utility>

#include "error.h"

namespace mixloader {

Locations::Locations(std::vector<std::string> paths)
    : paths_(std::move(paths)), failures_(paths_.size()) {}

std::string Locations::wait(std::uint32_t shard) {
  std::unique_lock lock(mutex_);
  if (paths_[shard].empty()) {
    failures_[shard].clear();
    const auto mine = wanted_.insert(shard);
    changed_.notify_all();
    changed_.wait(lock, [&] {
      return stopped_ || !paths_[shard].empty() || !failures_[shard].empty();
    });
    wanted_.erase(mine);
  }
  if (!paths_[shard].empty()) return paths_[shard];
  throw ShardError(failures_[shard].empty() ? "the loader is closed"
                                            : failures_[shard]);
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
  const std::lock_guard lock(mutex_);
  paths_.at(shard).clear();
}

std::vector<std::uint32_t> Locations::wanted(
    std::chrono::milliseconds timeout) const {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout,
                    [this] { return stopped_ || !wanted_.empty(); });
  const std::set<std::uint32_t> distinct(wanted_.begin(), wanted_.end());
  return {distinct.begin(), distinct.end()};
}

void Locations::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
}

}  // namespace mixloader
