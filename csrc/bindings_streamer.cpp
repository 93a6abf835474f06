// The streamer for Python.
#include <pthread.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <tuple>

#include "batch_memory.h"
#include "bindings.h"
#include "streamer.h"

namespace mixloader {
namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
// A buffer of so many bytes; 0: none is asked for.
std::span<std::byte> writable_bytes(const py::object& object,
                                    std::size_t bytes) {
  if (bytes == 0) {
    if (object.is_none()) return {};
    throw py::value_error("a buffer was given that the format does not use");
  }
  if (!py::isinstance<py::array>(object)) {
    throw py::value_error("a buffer that the format needs is no array");
  }
  auto array = py::reinterpret_borrow<py::array>(object);
  if (!(array.flags() & py::array::c_style) ||
      static_cast<std::size_t>(array.nbytes()) != bytes) {
    throw py::value_error("a buffer is no contiguous array of " +
                          std::to_string(bytes) + " bytes");
  }
  return {static_cast<std::byte*>(array.mutable_data()), bytes};
}

template <typename T>
std::span<T> writable(const py::object& object, std::size_t bytes) {
  if (bytes > 0 && !py::isinstance<py::array_t<T>>(object)) {
    throw py::value_error("a buffer is no array of its type");
  }
  const auto raw = writable_bytes(object, bytes);
  return {reinterpret_cast<T*>(raw.data()), raw.size() / sizeof(T)};
}

std::vector<std::int64_t> to_vector(const Int64Array& array) {
  return {array.data(), array.data() + array.size()};
}

py::dict to_dict(const StreamState& state) {
  py::list weights;
  for (const auto& [step, entry] : state.weights) {
    py::list change;  // a list, as JSON would give it back
    change.append(step);
    change.append(entry.version);
    change.append(*entry.units);
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
    state.weights.emplace(
        step,
        Weights{version, std::make_shared<const std::vector<std::int64_t>>(
                             std::move(units))});
  }
  return state;
}

// What is written to for a batch: a block of ours, or the caller's arrays.
struct Submitted {
  BufferPool::Block block;
  py::object owner, arrays;  // nothing with a block
};

// A Streamer, and the Python objects that it reads and writes.
struct Engine {
  py::object domains;
  std::deque<Submitted> submitted;  // and not taken, oldest first
  Streamer streamer;  // last: its threads are joined before the memory goes
};

py::object to_capsule(OwnedTensor tensor) {
  if (!tensor) return py::none();
  // Whoever takes the tensor over renames the capsule.
  py::capsule capsule(tensor.get(), "dltensor", [](PyObject* self) {
    if (PyCapsule_IsValid(self, "dltensor") == 0) return;
    OwnedTensor(
        static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor")));
  });
  tensor.release();
  return capsule;
}

// Goes up in a forked child, where threads and what they hold are gone. Cheaper
// to ask for than the number of the process.
std::atomic<unsigned> forks{0};

// Threads of a Python argument: a number, or None for as many as it takes.
Threads to_threads(std::optional<unsigned> threads) {
  constexpr unsigned kMost = 32;
  return threads ? Threads{*threads, *threads} : Threads{1, kMost};
}

class PyStreamer {
 public:
  PyStreamer(const py::object& domains, CorpusOptions options,
             std::uint64_t seed, Shuffle shuffle, PlanRules rules,
             Layout layout, const Int64Array& units, Threads threads)
      : memory_(layout, options),
        forks_(forks.load()),
        engine_(new Engine{
            domains,
            {},
            {make_corpus(domains, options), seed, shuffle, std::move(rules),
             layout, to_vector(units), threads}}) {}

  ~PyStreamer() { close(); }
  PyStreamer(const PyStreamer&) = delete;
  PyStreamer& operator=(const PyStreamer&) = delete;

  // Submits memory of its own until it has `ahead` batches to fill.
  void supply(std::size_t ahead) {
    const auto engine = checked();
    while (engine->submitted.size() < ahead) {
      BufferPool::Block block = memory_.take();
      const BatchBuffers buffers = memory_.buffers(block.get());
      engine->submitted.push_back({std::move(block), {}, {}});
      engine->streamer.submit(buffers);
    }
  }

  // See BatchBuffers; None for what the format does not ask for. `owner` comes
  // back with the batch.
  void submit(const py::object& inputs, const py::object& targets,
              const py::object& domains, const py::object& positions,
              const py::object& documents, const py::object& owner) {
    const auto engine = checked();
    const auto& sizes = memory_.sizes();
    const BatchBuffers buffers{writable_bytes(inputs, sizes[0]),
                               writable_bytes(targets, sizes[1]),
                               writable<std::int64_t>(domains, sizes[2]),
                               writable<std::int64_t>(positions, sizes[3]),
                               writable<std::int32_t>(documents, sizes[4])};
    engine->submitted.push_back(
        {nullptr, owner,
         py::make_tuple(inputs, targets, domains, positions, documents)});
    engine->streamer.submit(buffers);
  }

  // (step, micro-batch, version of the weights, whether it was waited for,
  // number of the fill, batches ready behind it, its tensors), or None at the
  // stream's end. Without `consume` it is the next batch until take().
  using Drawn = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, bool,
                           std::uint64_t, std::uint64_t, py::object>;
  // timeout: seconds, 0 for ever.
  std::optional<Drawn> next(double timeout, bool consume) {
    const auto engine = checked();
    const auto begin = std::chrono::steady_clock::now();
    // While batches are read ahead the GIL stays; letting go of it may cost a
    // wait for another thread.
    auto batch = engine->streamer.next(std::chrono::milliseconds(0));
    const bool waited = !batch;
    while (!batch) {
      {
        const py::gil_scoped_release release;
        batch = engine->streamer.next(std::chrono::milliseconds(100));
      }
      if (!batch && PyErr_CheckSignals() != 0) throw py::error_already_set();
      const std::chrono::duration<double> elapsed =
          std::chrono::steady_clock::now() - begin;
      if (!batch && timeout > 0 && elapsed.count() >= timeout) {
        throw std::runtime_error(
            "no batch came within the timeout of " + std::to_string(timeout) +
            " seconds; the storage is slow or gone, or the timeout too short");
      }
    }
    if (batch->end) return std::nullopt;
    const Drawn drawn{batch->step,
                      batch->micro_batch,
                      batch->weights_version,
                      waited,
                      batch->fill,
                      batch->ready,
                      tensors(engine->submitted.front())};
    // Refilled meanwhile by another thread: what is there now.
    if (consume && !take(batch->fill)) return next(timeout, true);
    return drawn;
  }

  // Consumes the batch that next() gave, if it was not filled anew since.
  bool take(std::uint64_t fill) {
    const auto engine = checked();
    if (!engine->streamer.take(fill)) return false;
    engine->submitted.pop_front();
    return true;
  }

  std::size_t queued() { return checked()->submitted.size(); }

  std::pair<std::uint64_t, std::uint64_t> position() {
    return checked()->streamer.position();
  }

  // (number of the fill, tensors) of the next batch if it is ready.
  std::optional<std::pair<std::uint64_t, py::object>> peek() {
    const auto engine = checked();
    const auto fill = engine->streamer.peek();
    if (!fill) return std::nullopt;
    return std::pair{*fill, tensors(engine->submitted.front())};
  }

  std::uint64_t set_weights(const Int64Array& units,
                            std::optional<std::uint64_t> step) {
    return checked()->streamer.set_weights(to_vector(units), step);
  }

  // In parts, so that it can be interrupted; what was passed over stays so.
  std::uint64_t skip(std::uint64_t n) {
    const auto engine = checked();
    constexpr std::uint64_t kPart = 1024;
    while (true) {
      const std::uint64_t part = std::min(n, kPart);
      const std::uint64_t before = engine->streamer.step();
      std::uint64_t after;
      {
        const py::gil_scoped_release release;
        after = engine->streamer.skip(part);
      }
      n -= part;
      if (n == 0 || after - before < part) return after;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
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

  // Where shards that must be fetched are: see Locations.
  void provide(std::uint32_t shard, std::string path) {
    locations(*checked(), shard).provide(shard, std::move(path));
  }
  void fail(std::uint32_t shard, std::string message) {
    locations(*checked(), shard).fail(shard, std::move(message));
  }
  void withdraw(std::uint32_t shard) {
    const auto engine = checked();
    locations(*engine, shard).withdraw(shard);
    engine->streamer.corpus().close(shard);
  }
  std::vector<std::uint32_t> wanted(std::uint64_t timeout_ms) {
    const auto engine = checked();
    const py::gil_scoped_release release;
    return engine->streamer.corpus().locations().wanted(
        std::chrono::milliseconds(timeout_ms));
  }

  // (rows ahead, shard), soonest first.
  std::vector<std::pair<double, std::uint32_t>> upcoming(std::uint64_t limit) {
    const auto engine = checked();
    const py::gil_scoped_release release;
    std::vector<std::pair<double, std::uint32_t>> result;
    for (const auto& [rows, shard] : engine->streamer.upcoming(limit)) {
      result.emplace_back(rows, shard);
    }
    return result;
  }

  void close() {
    auto engine = std::move(engine_);
    if (!engine) return;
    if (forks.load() != forks_) {
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
    if (forks.load() != forks_) {
      throw std::runtime_error(
          "this loader was made in another process; after a fork, make a new "
          "one and load_state_dict() into it");
    }
    return engine_;
  }

  // Of what was filled: capsules (None for what the format does not ask for),
  // or the owner of the caller's arrays.
  py::object tensors(const Submitted& submitted) const {
    if (!submitted.block) return submitted.owner;
    auto all = memory_.tensors(submitted.block);
    py::tuple result(all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      result[i] = to_capsule(std::move(all[i]));
    }
    return result;
  }

  static Locations& locations(const Engine& engine, std::uint32_t shard) {
    Locations& all = engine.streamer.corpus().locations();
    if (shard >= all.size() || !all.fetched(shard)) {
      throw py::value_error("shard " + std::to_string(shard) +
                            " is none that has to be fetched");
    }
    return all;
  }

  BatchMemory memory_;
  const unsigned forks_;
  std::shared_ptr<Engine> engine_;
};

}  // namespace

void bind_streamer(py::module_& m) {
  ::pthread_atfork(nullptr, nullptr, [] { ++forks; });
  py::class_<PyStreamer>(m, "Streamer")
      .def(py::init(
               [](const py::object& domains, std::uint64_t seq_len,
                  std::uint64_t vocab_size, TokenType inputs, TokenType targets,
                  bool shared, Boundaries boundaries, std::uint64_t eot,
                  bool mask_targets, bool mmap, std::uint64_t seed,
                  bool shuffle, std::uint64_t shuffle_shards, Sampling sampling,
                  std::vector<std::uint64_t> limits, bool stop_at_limit,
                  std::uint64_t batch_size, std::uint64_t micro_batches,
                  std::uint64_t world_size, std::uint64_t rank,
                  const Int64Array& units, std::optional<unsigned> threads) {
                 return std::make_unique<PyStreamer>(
                     domains,
                     CorpusOptions{seq_len,
                                   vocab_size,
                                   {inputs, targets, shared, boundaries, eot,
                                    mask_targets},
                                   mmap ? ReadMode::kMmap : ReadMode::kPread},
                     seed, to_shuffle(shuffle, shuffle_shards),
                     PlanRules{sampling, std::move(limits), stop_at_limit},
                     Layout{batch_size, micro_batches, world_size, rank}, units,
                     to_threads(threads));
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
      .def("supply", &PyStreamer::supply, py::arg("ahead"))
      .def("submit", &PyStreamer::submit, py::arg("inputs"), py::arg("targets"),
           py::arg("domains"), py::arg("positions") = py::none(),
           py::arg("documents") = py::none(), py::arg("owner") = py::none())
      .def("next", &PyStreamer::next, py::arg("timeout") = 0.0,
           py::arg("consume") = true)
      .def("take", &PyStreamer::take, py::arg("fill"))
      .def("queued", &PyStreamer::queued)
      .def("position", &PyStreamer::position)
      .def("set_weights", &PyStreamer::set_weights, py::arg("units"),
           py::arg("step") = py::none())
      .def("peek", &PyStreamer::peek)
      .def("skip", &PyStreamer::skip, py::arg("n"))
      .def("step", &PyStreamer::step)
      .def("locate", &PyStreamer::locate, py::arg("domain"), py::arg("window"))
      .def("weights_at", &PyStreamer::weights_at, py::arg("step"))
      .def("state", &PyStreamer::state)
      .def("load_state", &PyStreamer::load_state, py::arg("state"))
      .def("provide", &PyStreamer::provide, py::arg("shard"), py::arg("path"))
      .def("fail", &PyStreamer::fail, py::arg("shard"), py::arg("message"))
      .def("withdraw", &PyStreamer::withdraw, py::arg("shard"))
      .def("wanted", &PyStreamer::wanted, py::arg("timeout_ms"))
      .def("upcoming", &PyStreamer::upcoming, py::arg("limit"))
      .def("close", &PyStreamer::close);
}

}  // namespace mixloader
