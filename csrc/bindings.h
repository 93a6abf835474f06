// The parts of the module _core, a file each. pybind11 only: conversion, the
// GIL, and errors. No logic of the loader's.
#pragma once

#include <pybind11/pybind11.h>

#include "shard.h"

namespace mixloader {

namespace py = pybind11;

// A dict of Shard's fields; those it does not have keep their defaults.
Shard to_shard(const py::dict& dict);

void bind_files(py::module_& m);
void bind_packing(py::module_& m);

}  // namespace mixloader
