// pybind11 only: conversion, the GIL, and errors. No logic of the loader's.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <deque>
#include <tuple>

#include "error.h"
#include "order.h"
#include "permute.h"
#include "philox.h"
#include "planner.h"
#include "streamer.h"

namespace mixloader {
namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
// (key, shards): see Domain. A shard is a dict of Shard's fields; those it does
// not have keep their defaults.
using DomainTuple = std::pair<std::uint64_t, std::vector<py::dict>>;

template <typename T>
std::span<T> writable(const py::object& array, std::size_t size) {
  if (array.is_none()) return {};
  auto whole = py::array_t<T, py::array::c_style>::ensure(array);
  if (!whole || whole.ptr() != array.ptr() ||
      static_cast<std::size_t>(whole.size()) != size) {
    throw py::value_error("a buffer is no contiguous array of " +
                          std::to_string(size) + " entries of its type");
  }
  return {whole.mutable_data(), size};
}

// Any element type; `size` in bytes.
std::span<std::byte> writable_bytes(const py::object& object,
                                    std::size_t size) {
  if (object.is_none()) return {};
  auto array = py::cast<py::array>(object);
  if (!(array.flags() & py::array::c_style) ||
      static_cast<std::size_t>(array.nbytes()) != size) {
    throw py::value_error("a buffer is no contiguous array of " +
                          std::to_string(size) + " bytes");
  }
  return {static_cast<std::byte*>(array.mutable_data()), size};
}

std::vector<std::int64_t> to_vector(const Int64Array& array) {
  return {array.data(), array.data() + array.size()};
}

template <typename T>
void take(const py::dict& dict, const char* key, T& field) {
  if (dict.contains(key)) field = dict[key].cast<T>();
}

std::span<const std::uint64_t> view(const py::dict& dict, const char* key) {
  if (!dict.contains(key)) return {};
  if (!py::isinstance<py::array_t<std::uint64_t, py::array::c_style>>(
          dict[key])) {
    throw py::value_error(std::string(key) + " is no array of uint64");
  }
  const auto array = dict[key].cast<py::array_t<std::uint64_t>>();
  return {array.data(), static_cast<std::size_t>(array.size())};
}

}  // namespace

Shard to_shard(const py::dict& dict) {
  Shard shard;
  take(dict, "name", shard.name);
  take(dict, "path", shard.path);
  take(dict, "offset", shard.offset);
  take(dict, "tokens", shard.tokens);
  take(dict, "width", shard.width);
  take(dict, "is_signed", shard.is_signed);
  take(dict, "windows", shard.windows);
  take(dict, "extent_tokens", shard.extent_tokens);
  take(dict, "extent_stride", shard.extent_stride);
  shard.extent_ends = view(dict, "extent_ends");
  shard.extent_bytes = view(dict, "extent_bytes");
  take(dict, "extents_are_documents", shard.extents_are_documents);
  take(dict, "checksums", shard.checksums);
  take(dict, "packing", shard.packing);
  if (dict.contains("documents")) {
    const py::dict table = dict["documents"];
    take(table, "path", shard.documents.path);
    take(table, "offset", shard.documents.offset);
    take(table, "count", shard.documents.count);
    take(table, "width", shard.documents.width);
    take(table, "bias", shard.documents.bias);
    take(table, "unit", shard.documents.unit);
  }
  return shard;
}

namespace {

std::unique_ptr<const Corpus> make_corpus(
    const std::vector<DomainTuple>& domains, CorpusOptions options) {
  std::vector<Domain> result;
  for (const auto& [key, shards] : domains) {
    Domain& domain = result.emplace_back(Domain{key, {}});
    for (const py::dict& shard : shards) {
      domain.shards.push_back(to_shard(shard));
    }
  }
  return std::make_unique<const Corpus>(std::move(result), options);
}

std::size_t width(TokenType type) {
  return type == TokenType::kInt64 ? 8 : type == TokenType::kInt32 ? 4 : 2;
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

// A Streamer, the Python arrays that it writes to, and those that it reads.
struct Engine {
  py::object domains;
  std::deque<py::tuple> arrays;
  Streamer streamer;  // last: its threads are joined before the arrays go
};

class PyStreamer {
 public:
  PyStreamer(const py::object& domains, CorpusOptions options,
             std::uint64_t seed, Shuffle shuffle, PlanRules rules,
             Layout layout, const Int64Array& units, unsigned threads)
      : layout_(layout),
        options_(options),
        owner_(::getpid()),
        engine_(new Engine{
            domains,
            {},
            {make_corpus(domains.cast<std::vector<DomainTuple>>(), options),
             seed, shuffle, std::move(rules), layout, to_vector(units),
             threads}}) {}

  ~PyStreamer() { close(); }
  PyStreamer(const PyStreamer&) = delete;
  PyStreamer& operator=(const PyStreamer&) = delete;

  // See BatchBuffers; None for what the format does not ask for.
  void submit(const py::object& inputs, const py::object& targets,
              const py::object& domains, const py::object& positions,
              const py::object& documents) {
    const auto engine = checked();
    const std::size_t rows = layout_.batch_size;
    const std::size_t size = rows * options_.seq_len;
    const RowFormat& format = options_.format;
    const BatchBuffers buffers{
        writable_bytes(
            inputs, (size + (format.shared ? rows : 0)) * width(format.inputs)),
        writable_bytes(targets, size * width(format.targets)),
        writable<std::int64_t>(domains, rows),
        writable<std::int64_t>(positions, size),
        writable<std::int32_t>(documents, size)};
    engine->arrays.push_back(
        py::make_tuple(inputs, targets, domains, positions, documents));
    engine->streamer.submit(buffers);
  }

  // (step, micro-batch, version of the weights), or None at the stream's end.
  std::optional<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>>
  next() {
    const auto engine = checked();
    while (true) {
      std::optional<BatchPosition> position;
      {
        const py::gil_scoped_release release;
        position = engine->streamer.next(std::chrono::milliseconds(100));
      }
      if (position) {
        if (position->end) return std::nullopt;
        engine->arrays.pop_front();
        return std::tuple{position->step, position->micro_batch,
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

  // (shard within the domain, its token, document or None, its first token).
  std::tuple<std::uint32_t, std::uint64_t, std::optional<std::uint64_t>,
             std::optional<std::uint64_t>>
  locate(std::uint32_t domain, std::uint64_t window) {
    const auto engine = checked();
    const Corpus& corpus = engine->streamer.corpus();
    if (domain >= corpus.domains() ||
        window >= corpus.window_ends(domain).back()) {
      throw py::index_error("there is no such window");
    }
    const py::gil_scoped_release release;
    const RowPlace place = corpus.locate(domain, window);
    const auto document = corpus.document_at(domain, window);
    if (!document) return {place.shard, place.token, {}, {}};
    return {place.shard, place.token, document->number, document->token};
  }

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
  CorpusOptions options_;
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

  bind_files(m);
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

  py::enum_<TokenType>(m, "TokenType")
      .value("INT64", TokenType::kInt64)
      .value("INT32", TokenType::kInt32)
      .value("UINT16", TokenType::kUint16);
  py::enum_<Boundaries>(m, "Boundaries")
      .value("NONE", Boundaries::kNone)
      .value("INDEX", Boundaries::kIndex)
      .value("AFTER_EOT", Boundaries::kAfterEot)
      .value("AT_EOT", Boundaries::kAtEot);
  py::enum_<Sampling>(m, "Sampling")
      .value("QUOTA", Sampling::kQuota)
      .value("MULTINOMIAL", Sampling::kMultinomial)
      .value("EXACT", Sampling::kExact);

  bind_packing(m);

  py::class_<PyStreamer>(m, "Streamer")
      .def(py::init([](const py::object& domains, std::uint64_t seq_len,
                       std::uint64_t vocab_size, TokenType inputs,
                       TokenType targets, bool shared, Boundaries boundaries,
                       std::uint64_t eot, bool mask_targets, bool mmap,
                       std::uint64_t seed, bool shuffle,
                       std::uint64_t shuffle_shards, Sampling sampling,
                       std::vector<std::uint64_t> limits, bool stop_at_limit,
                       std::uint64_t batch_size, std::uint64_t micro_batches,
                       std::uint64_t world_size, std::uint64_t rank,
                       const Int64Array& units, unsigned threads) {
             const auto kind = !shuffle         ? Shuffle::Kind::kNone
                               : shuffle_shards ? Shuffle::Kind::kShards
                                                : Shuffle::Kind::kWindows;
             return std::make_unique<PyStreamer>(
                 domains,
                 CorpusOptions{
                     seq_len,
                     vocab_size,
                     {inputs, targets, shared, boundaries, eot, mask_targets},
                     mmap ? ReadMode::kMmap : ReadMode::kPread},
                 seed, Shuffle{kind, shuffle_shards},
                 PlanRules{sampling, std::move(limits), stop_at_limit},
                 Layout{batch_size, micro_batches, world_size, rank}, units,
                 threads);
           }),
           py::kw_only(), py::arg("domains"), py::arg("seq_len"),
           py::arg("vocab_size"), py::arg("inputs") = TokenType::kInt64,
           py::arg("targets") = TokenType::kInt64, py::arg("shared") = false,
           py::arg("boundaries") = Boundaries::kNone, py::arg("eot") = 0,
           py::arg("mask_targets") = false, py::arg("mmap") = false,
           py::arg("seed"), py::arg("shuffle") = true,
           py::arg("shuffle_shards") = 0,
           py::arg("sampling") = Sampling::kQuota,
           py::arg("limits") = std::vector<std::uint64_t>(),
           py::arg("stop_at_limit") = false, py::arg("batch_size"),
           py::arg("micro_batches"), py::arg("world_size"), py::arg("rank"),
           py::arg("units"), py::arg("threads"))
      .def("submit", &PyStreamer::submit, py::arg("inputs"), py::arg("targets"),
           py::arg("domains"), py::arg("positions") = py::none(),
           py::arg("documents") = py::none())
      .def("next", &PyStreamer::next)
      .def("set_weights", &PyStreamer::set_weights, py::arg("units"),
           py::arg("step") = py::none())
      .def("step", &PyStreamer::step)
      .def("locate", &PyStreamer::locate, py::arg("domain"), py::arg("window"))
      .def("weights_at", &PyStreamer::weights_at, py::arg("step"))
      .def("state", &PyStreamer::state)
      .def("load_state", &PyStreamer::load_state, py::arg("state"))
      .def("close", &PyStreamer::close);
}

}  // namespace mixloader
