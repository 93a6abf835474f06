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

  std::size_t size() const { return fetched_.size(); }
  // Whether a shard has to be fetched, as it had no path to begin with; and
  // whether any has.
  bool fetched(std::uint32_t shard) const { return fetched_[shard]; }
  bool any_fetched() const { return any_fetched_; }

  // The path of a shard, once it is here. Throws ShardError if it could not be
  // fetched (the next call asks for it again), or when stopped.
  std::string wait(std::uint32_t shard);
  // The same for who can only wait a while at a time: false if it is not here
  // yet. A failure is thrown even if it came between two calls.
  bool wait_for(std::uint32_t shard, std::chrono::milliseconds timeout);
  // The path of a shard that is here, else an empty one.
  std::string find(std::uint32_t shard) const;

  void provide(std::uint32_t shard, std::string path);
  // Has no effect on a shard that is here.
  void fail(std::uint32_t shard, std::string message);
  // The shard is no longer here.
  void withdraw(std::uint32_t shard);

  // The shards that readers are waiting for. Returns as soon as one has asked
  // since the call before, else after `timeout`, and at once when stopped.
  std::vector<std::uint32_t> wanted(std::chrono::milliseconds timeout);

  void stop();

 private:
  class Asking;
  bool settled(std::uint32_t shard) const;

  std::vector<bool> fetched_;
  bool any_fetched_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::vector<std::string> paths_;
  std::vector<std::string> failures_;  // empty: none
  std::multiset<std::uint32_t> waiting_;
  bool asked_ = false;  // since the last wanted()
};

}  // namespace mixloader
