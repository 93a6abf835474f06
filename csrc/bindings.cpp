// pybind11 only: conversion, the GIL, and errors. No logic of the loader's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <deque>
#include <tuple>

#include "error.h"
#include "permute.h"
#include "philox.h"
#include "planner.h"
#include "streamer.h"

namespace py = pybind11;

namespace mixloader {
namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using ShardTuple =
    std::tuple<std::string, std::uint64_t, std::uint64_t, std::uint32_t>;
using DomainTuple = std::pair<std::uint64_t, std::vector<ShardTuple>>;

std::span<std::int64_t> writable(Int64Array& array, std::size_t size) {
  if (static_cast<std::size_t>(array.size()) != size) {
    throw py::value_error("a buffer has " + std::to_string(array.size()) +
                          " entries; expected " + std::to_string(size));
  }
  return {array.mutable_data(), size};
}

std::vector<std::int64_t> to_vector(const Int64Array& array) {
  return {array.data(), array.data() + array.size()};
}

std::unique_ptr<const Corpus> make_corpus(
    const std::vector<DomainTuple>& domains, std::uint64_t seq_len,
    std::uint64_t vocab_size) {
  std::vector<Domain> result;
  for (const auto& [key, shards] : domains) {
    Domain& domain = result.emplace_back(Domain{key, {}});
    for (const auto& [path, offset, tokens, width] : shards) {
      domain.shards.push_back({path, offset, tokens, width});
    }
  }
  return std::make_unique<const Corpus>(std::move(result), seq_len, vocab_size);
}

py::dict to_dict(const StreamState& state) {
  py::list weights;
  for (const auto& [step, entry] : state.weights) {
    py::list change;  // a list, as JSON would give it back
    change.append(step);
    change.append(entry.version);
    change.append(entry.units);
    weights.append(change);
  }
  py::dict result;
  result["step"] = state.plan.step;
  result["rows"] = state.rows;
  result["cursors"] = state.plan.cursors;
  result["residuals"] = state.plan.residuals;
  result["weights_version"] = state.version;
  result["weights"] = weights;
  return result;
}

StreamState from_dict(const py::dict& dict) {
  StreamState state;
  state.plan.step = dict["step"].cast<std::uint64_t>();
  state.plan.cursors = dict["cursors"].cast<std::vector<std::uint64_t>>();
  state.plan.residuals = dict["residuals"].cast<std::vector<std::int64_t>>();
  state.rows = dict["rows"].cast<std::uint64_t>();
  state.version = dict["weights_version"].cast<std::uint64_t>();
  for (const py::handle entry : dict["weights"]) {
    auto [step, version, units] = entry.cast<
        std::tuple<std::uint64_t, std::uint64_t, std::vector<std::int64_t>>>();
    state.weights.emplace(step, Weights{version, std::move(units)});
  }
  return state;
}

// A Streamer and the Python arrays that it writes to.
struct Engine {
  std::deque<std::array<Int64Array, 2>> arrays;
  Streamer streamer;  // last: its threads are joined before the arrays go
};

class PyStreamer {
 public:
  PyStreamer(const std::vector<DomainTuple>& domains, std::uint64_t seq_len,
             std::uint64_t vocab_size, std::uint64_t seed, Layout layout,
             const Int64Array& units, unsigned threads)
      : layout_(layout),
        seq_len_(seq_len),
        owner_(::getpid()),
        engine_(new Engine{{},
                           {make_corpus(domains, seq_len, vocab_size), seed,
                            layout, to_vector(units), threads}}) {}

  ~PyStreamer() { close(); }
  PyStreamer(const PyStreamer&) = delete;
  PyStreamer& operator=(const PyStreamer&) = delete;

  // tokens [2, B, T]: inputs, then targets. domains [B].
  void submit(Int64Array tokens, Int64Array domains) {
    const auto engine = checked();
    const std::size_t half = layout_.batch_size * seq_len_;
    const auto both = writable(tokens, 2 * half);
    const BatchBuffers buffers{both.first(half), both.last(half),
                               writable(domains, layout_.batch_size)};
    engine->arrays.push_back({std::move(tokens), std::move(domains)});
    engine->streamer.submit(buffers);
  }

  std::tuple<std::uint64_t, std::uint64_t, std::uint64_t> next() {
    const auto engine = checked();
    while (true) {
      std::optional<BatchPosition> position;
      {
        const py::gil_scoped_release release;
        position = engine->streamer.next(std::chrono::milliseconds(100));
      }
      if (position) {
        engine->arrays.pop_front();
        return {position->step, position->micro_batch,
                position->weights_version};
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  std::uint64_t set_weights(const Int64Array& units,
                            std::optional<std::uint64_t> step) {
    return checked()->streamer.set_weights(to_vector(units), step);
  }

  std::uint64_t step() { return checked()->streamer.step(); }

  Int64Array weights_at(std::uint64_t step) {
    const auto units = checked()->streamer.weights_at(step);
    return Int64Array(static_cast<py::ssize_t>(units.size()), units.data());
  }

  py::dict state() { return to_dict(checked()->streamer.state()); }

  void load_state(const py::dict& state) {
    checked()->streamer.load_state(from_dict(state));
  }

  void close() {
    auto engine = std::move(engine_);
    if (!engine) return;
    if (::getpid() != owner_) {
      // In a forked child the threads do not exist and cannot be joined; the
      // engine is left as it is, a leak that ends with the child.
      new std::shared_ptr<Engine>(std::move(engine));
      return;
    }
    const py::gil_scoped_release release;
    engine->streamer.stop();
  }

 private:
  // Shared, so that a close() in one thread does not pull the engine from
  // under a next() in another.
  std::shared_ptr<Engine> checked() {
    if (!engine_) throw std::runtime_error("the loader is closed");
    if (::getpid() != owner_) {
      throw std::runtime_error(
          "this loader was made in another process; after a fork, make a new "
          "one and load_state_dict() into it");
    }
    return engine_;
  }

  Layout layout_;
  std::uint64_t seq_len_;
  pid_t owner_;
  std::shared_ptr<Engine> engine_;
};

}  // namespace

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

  py::class_<PyStreamer>(m, "Streamer")
      .def(py::init([](const std::vector<DomainTuple>& domains,
                       std::uint64_t seq_len, std::uint64_t vocab_size,
                       std::uint64_t seed, std::uint64_t batch_size,
                       std::uint64_t micro_batches, std::uint64_t world_size,
                       std::uint64_t rank, const Int64Array& units,
                       unsigned threads) {
             return std::make_unique<PyStreamer>(
                 domains, seq_len, vocab_size, seed,
                 Layout{batch_size, micro_batches, world_size, rank}, units,
                 threads);
           }),
           py::kw_only(), py::arg("domains"), py::arg("seq_len"),
           py::arg("vocab_size"), py::arg("seed"), py::arg("batch_size"),
           py::arg("micro_batches"), py::arg("world_size"), py::arg("rank"),
           py::arg("units"), py::arg("threads"))
      .def("submit", &PyStreamer::submit, py::arg("tokens").noconvert(),
           py::arg("domains").noconvert())
      .def("next", &PyStreamer::next)
      .def("set_weights", &PyStreamer::set_weights, py::arg("units"),
           py::arg("step") = py::none())
      .def("step", &PyStreamer::step)
      .def("weights_at", &PyStreamer::weights_at, py::arg("step"))
      .def("state", &PyStreamer::state)
      .def("load_state", &PyStreamer::load_state, py::arg("state"))
      .def("close", &PyStreamer::close);
}

}  // namespace mixloader
