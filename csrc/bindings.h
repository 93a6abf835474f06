// The parts of the Python module, and what they share.
#pragma once

#include <pybind11/pybind11.h>

#include "order.h"

namespace mixloader {

// Philox, permutations, weights, the plan without data: bindings_plan.cpp.
void bind_plan(pybind11::module_& m);

inline Shuffle to_shuffle(bool shuffle, std::uint64_t shuffle_shards) {
  return {!shuffle         ? Shuffle::Kind::kNone
          : shuffle_shards ? Shuffle::Kind::kShards
                           : Shuffle::Kind::kWindows,
          shuffle_shards};
}

}  // namespace mixloader
