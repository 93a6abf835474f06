// The parts of the module _core, a file each, and what they share. pybind11
// only: conversion, the GIL, and errors. No logic of the loader's.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "corpus.h"
#include "order.h"

namespace mixloader {

namespace py = pybind11;

// Philox, permutations, weights, the plan without data: bindings_plan.cpp.
void bind_plan(py::module_& m);
// Checksums and what tests need of files: bindings_files.cpp.
void bind_files(py::module_& m);
// Domains and shards: bindings_corpus.cpp. make_corpus takes a list of (key,
// shards), which must live as long as the Corpus.
void bind_corpus(py::module_& m);
Shard to_shard(const py::dict& dict);
std::unique_ptr<const Corpus> make_corpus(const py::object& domains,
                                          CorpusOptions options);
// Packed rows: bindings_packing.cpp.
void bind_packing(py::module_& m);
// The loss: bindings_loss.cpp.
void bind_loss(py::module_& m);
// The streamer: bindings_streamer.cpp.
void bind_streamer(py::module_& m);

inline Shuffle to_shuffle(bool shuffle, std::uint64_t shuffle_shards) {
  return {!shuffle         ? Shuffle::Kind::kNone
          : shuffle_shards ? Shuffle::Kind::kShards
                           : Shuffle::Kind::kWindows,
          shuffle_shards};
}

}  // namespace mixloader
