// The module _core: its exceptions, and the parts that bindings.h names.
#include "bindings.h"

#include "error.h"

namespace mixloader {

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "The C++ core: plans, shards, the threads that fill batches, and the "
      "loss on a CPU.";

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

  bind_plan(m);
  bind_files(m);
  bind_corpus(m);
  bind_packing(m);
  bind_loss(m);
  bind_streamer(m);
}

}  // namespace mixloader
