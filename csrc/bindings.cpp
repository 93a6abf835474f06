// The module _core: its exceptions, and the parts that bindings.h names.
#include "bindings.h"

#include <pybind11/stl.h>

#include "error.h"
#include "permute.h"
#include "philox.h"
#include "planner.h"

namespace mixloader {

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core: plans, shards and the threads that fill batches.";

  // The exceptions are Python's own classes, so that one hierarchy serves both.
  py::register_local_exception_translator([](std::exception_ptr error) {
    const auto raise = [](const char* name, const std::exception& what) {
      const auto type = py::module_::import("mixloader.errors").attr(name);
      PyErr_SetString(type.ptr(), what.what());
    };
    try {
      if (error) std::rethrow_exception(error);
    } catch (const ShardError& e) {
      raise("ShardError", e);
    } catch (const TokenError& e) {
      raise("TokenError", e);
    } catch (const WeightsError& e) {
      raise("WeightsError", e);
    } catch (const StateError& e) {
      raise("StateError", e);
    }
  });

  m.attr("WEIGHT_ONE") = kWeightOne;
  m.def("philox", &philox, py::arg("key"), py::arg("counter"),
        "Philox4x32-10 of a 64-bit key and four 32-bit counter words.");
  m.def(
      "permute",
      [](std::uint64_t seed, std::uint64_t domain_key, std::uint64_t epoch,
         std::uint64_t n, std::uint64_t index) {
        return Permutation(seed, domain_key, epoch, n)(index);
      },
      py::arg("seed"), py::arg("domain_key"), py::arg("epoch"), py::arg("n"),
      py::arg("index"),
      "Where `index` goes in one epoch's order of n windows.");

  bind_streamer(m);
}

}  // namespace mixloader
