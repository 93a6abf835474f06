// Where each shard lies on this machine. Those of remote or compressed storage
// come and go: whoever fetches them says so here, and readers wait for them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace mixloader {

class Locations {
 public:
  // One path a shard; an empty one is not here yet.
  explicit Locations(std::vector<std::string> paths);

  // The path of a shard, once it is here. Throws ShardError if it could not be
  // fetched (the next call asks for it again), or when stopped.
  std::string wait(std::uint32_t shard);

  void provide(std::uint32_t shard, std::string path);
  void fail(std::uint32_t shard, std::string message);
  // The shard is no longer here.
  void withdraw(std::uint32_t shard);

  // The shards that readers are waiting for; returns early when there are any,
  // else empty after `timeout`.
  std::vector<std::uint32_t> wanted(std::chrono::milliseconds timeout) const;

  void stop();

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool stopped_ = false;
  std::vector<std::string> paths_;
  std::vector<std::string> failures_;  // empty: none
  std::multiset<std::uint32_t> wanted_;
};

}  // namespace mixloader
