// Asks the disk for rows before anyone reads them. Which window of a domain
// comes next does not depend on the weights, so what was asked for is still
// good after they change.
#pragma once

#include <cstdint>
#include <vector>

#include "corpus.h"
#include "order.h"
#include "timeline.h"

namespace mixloader {

class ReadAhead {
 public:
  // Both are kept by the caller, and outlive this.
  ReadAhead(const Corpus& corpus, const std::vector<WindowOrder>& orders,
            const Layout& layout);

  // Asks for the rows of a step, as far as that was not done before, and beyond
  // it for those that each domain may give next: its share of `queue` rows (of
  // all ranks), and one. Of several ranks, each asks for its own rows and for
  // an equal part of the others: they may share one machine's memory, but none
  // asks for more than about what it reads. Not thread-safe.
  void ask(const StepPlan& plan, std::uint64_t queue);

 private:
  void ask(std::uint32_t domain, std::uint64_t draw);

  const Corpus& corpus_;
  const std::vector<WindowOrder>& orders_;
  const Layout layout_;
  std::vector<WindowOrder::Cache> caches_;
  std::vector<std::uint64_t> asked_;  // the draw of each domain to go on from
  std::uint32_t turn_ = 0;            // the domain to go on from
};

}  // namespace mixloader
