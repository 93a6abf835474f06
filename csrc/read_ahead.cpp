#include "read_ahead.h"

#include <algorithm>

namespace mixloader {

ReadAhead::ReadAhead(const Corpus& corpus,
                     const std::vector<WindowOrder>& orders,
                     const Layout& layout)
    : corpus_(corpus), orders_(orders), layout_(layout) {}

void ReadAhead::ask(const StepPlan& plan, std::uint64_t queue) {
  const auto domains = static_cast<std::uint32_t>(orders_.size());
  caches_.resize(domains);
  asked_.resize(domains);
  const auto& before = plan.before->cursors;
  const auto& after = plan.after->cursors;
  const std::uint64_t ranks = layout_.world_size;
  if (ranks > 1) {
    for (std::uint64_t m = 0; m < layout_.micro_batches; ++m) {
      for (std::uint64_t r = 0; r < layout_.batch_size; ++r) {
        const PlannedRow& row =
            (*plan.rows)[(m * ranks + layout_.rank) * layout_.batch_size + r];
        ask(row.domain, row.draw);
      }
    }
  }
  // Thousands of domains take their turns over several steps.
  std::uint64_t left =
      2 * layout_.batch_size * layout_.micro_batches + queue / ranks + 64;
  for (std::uint32_t i = 0; i < domains && left > 0; ++i) {
    const std::uint32_t domain = turn_;
    const auto share =
        static_cast<std::uint64_t>((*plan.weights.units)[domain]) * queue /
        static_cast<std::uint64_t>(kWeightOne);
    const std::uint64_t end = after[domain] + share + 1;
    std::uint64_t& draw = asked_[domain];
    draw = std::clamp(draw, ranks > 1 ? after[domain] : before[domain], end);
    for (; draw < end && left > 0; ++draw) {
      if (draw % ranks != layout_.rank) continue;
      ask(domain, draw);
      --left;
    }
    if (draw == end) turn_ = (turn_ + 1) % domains;
  }
}

void ReadAhead::ask(std::uint32_t domain, std::uint64_t draw) {
  corpus_.hint(domain, orders_[domain].window(draw, caches_[domain]));
}

}  // namespace mixloader
