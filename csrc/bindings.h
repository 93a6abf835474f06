// The parts of the module _core, a file each, and what they share. pybind11
// only: conversion, the GIL, and errors. No logic of the loader's.
#pragma once

#include <pybind11/pybind11.h>

#include "order.h"

namespace mixloader {

namespace py = pybind11;

// Philox, permutations, weights, the plan without data: bindings_plan.cpp.
void bind_plan(py::module_& m);
// Checksums and what tests need of files: bindings_files.cpp.
void bind_files(py::module_& m);
// The streamer: bindings_streamer.cpp.
void bind_streamer(py::module_& m);

inline Shuffle to_shuffle(bool shuffle, std::uint64_t shuffle_shards) {
  return {!shuffle         ? Shuffle::Kind::kNone
          : shuffle_shards ? Shuffle::Kind::kShards
                           : Shuffle::Kind::kWindows,
          shuffle_shards};
}

}  // namespace mixloader
