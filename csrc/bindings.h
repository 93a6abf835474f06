// The parts of the module _core, a file each. pybind11 only: conversion, the
// GIL, and errors. No logic of the loader's.
#pragma once

#include <pybind11/pybind11.h>

namespace mixloader {

namespace py = pybind11;

void bind_files(py::module_& m);

}  // namespace mixloader
