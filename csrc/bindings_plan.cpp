// The plan for Python: what stands in each row, without reading anything.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "error.h"
#include "mixture.h"
#include "order.h"
#include "permute.h"
#include "philox.h"
#include "planner.h"

namespace py = pybind11;

namespace mixloader {
namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Counts = std::vector<std::uint64_t>;

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The plan of a stream, step by step. Not for several threads at once.
class Planner {
 public:
  Planner(std::uint64_t seed, Counts keys, std::vector<Counts> windows,
          std::uint64_t rows, const Int64Array& units, Shuffle shuffle,
          PlanRules rules)
      : seed_(seed),
        rows_(rows),
        rules_(std::move(rules)),
        window_ends_(std::move(windows)) {
    const std::size_t domains = window_ends_.size();
    if (domains == 0 || keys.size() != domains ||
        (!rules_.limits.empty() && rules_.limits.size() != domains)) {
      throw py::value_error(
          "keys, windows and limits must have an entry for each domain");
    }
    if (rows == 0 || rows > kMaxRows) {
      throw py::value_error("rows must be in [1, " + std::to_string(kMaxRows) +
                            "]");
    }
    orders_.reserve(domains);
    for (std::size_t i = 0; i < domains; ++i) {
      std::uint64_t end = 0;
      for (std::uint64_t& shard : window_ends_[i]) shard = end += shard;
      if (end == 0) {
        throw py::value_error("domain " + std::to_string(i) +
                              " has no window in any shard");
      }
      orders_.emplace_back(seed, keys[i], window_ends_[i], shuffle);
    }
    caches_.resize(domains);
    state_.cursors.assign(domains, 0);
    state_.residuals.assign(domains, 0);
    set_weights(units);
  }

  void set_weights(const Int64Array& units) {
    std::vector<std::int64_t> next(units.data(), units.data() + units.size());
    std::int64_t sum = 0;
    bool usable = next.size() == orders_.size();
    for (const std::int64_t unit : next) {
      usable = usable && unit >= 0 && unit <= kWeightOne;
      sum += usable ? unit : 0;
    }
    if (!usable || sum != kWeightOne) {
      throw WeightsError("expected integer weights >= 0, one for each of " +
                         std::to_string(orders_.size()) +
                         " domains, that sum to " + std::to_string(kWeightOne));
    }
    units_ = std::move(next);
  }

  // (domain uint32, draw uint64, window uint64), each [steps, rows], of the
  // next steps: fewer than asked for where the stream ends.
  py::tuple plan(std::uint64_t steps) {
    std::vector<std::uint32_t> domains;
    Counts draws, windows;
    {
      const py::gil_scoped_release release;
      for (std::uint64_t i = 0; i < steps; ++i) {
        const auto rows = next();
        if (!rows) break;
        for (const auto& [domain, draw] : *rows) {
          domains.push_back(domain);
          draws.push_back(draw);
          windows.push_back(orders_[domain].window(draw, caches_[domain]));
        }
      }
    }
    const auto table = [&](auto column) {
      return column.reshape({static_cast<py::ssize_t>(domains.size() / rows_),
                             static_cast<py::ssize_t>(rows_)});
    };
    return py::make_tuple(table(to_array(domains)), table(to_array(draws)),
                          table(to_array(windows)));
  }

  std::uint64_t skip(std::uint64_t steps) {
    const py::gil_scoped_release release;
    std::uint64_t done = 0;
    while (done < steps && next()) ++done;
    return done;
  }

  Int64Array effective() const {
    return to_array(effective_units(units_, rules_, state_.cursors));
  }

  std::uint64_t window(std::uint32_t domain, std::uint64_t draw) {
    return orders_.at(domain).window(draw, caches_[domain]);
  }

  std::vector<std::pair<std::uint64_t, std::uint32_t>> upcoming(
      std::uint32_t domain, std::uint64_t draw, std::uint64_t limit) {
    std::vector<std::pair<std::uint64_t, std::uint32_t>> result;
    for (const auto& [ahead, shard] :
         orders_.at(domain).upcoming(draw, limit, caches_[domain])) {
      result.emplace_back(ahead, shard);
    }
    return result;
  }

  py::dict state() const {
    py::dict result;
    result["step"] = state_.step;
    result["cursors"] = state_.cursors;
    result["residuals"] = state_.residuals;
    return result;
  }

  void load_state(const py::dict& dict) {
    PlanState state{dict["step"].cast<std::uint64_t>(),
                    dict["cursors"].cast<Counts>(),
                    dict["residuals"].cast<std::vector<std::int64_t>>()};
    if (state.cursors.size() != orders_.size() ||
        state.residuals.size() != orders_.size()) {
      throw StateError("the state has " + std::to_string(state.cursors.size()) +
                       " cursors and " +
                       std::to_string(state.residuals.size()) +
                       " residuals, but the plan has " +
                       std::to_string(orders_.size()) + " domains");
    }
    state_ = std::move(state);
  }

 private:
  std::optional<std::vector<PlannedRow>> next() {
    return plan_step(seed_, rows_, units_, rules_, state_);
  }

  std::uint64_t seed_;
  std::uint64_t rows_;
  PlanRules rules_;
  std::vector<Counts> window_ends_;
  std::vector<WindowOrder> orders_;
  std::vector<WindowOrder::Cache> caches_;
  std::vector<std::int64_t> units_;
  PlanState state_;
};

}  // namespace

void bind_plan(py::module_& m) {
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
  m.def(
      "quantize",
      [](const py::array_t<double, py::array::c_style | py::array::forcecast>&
             weights) {
        return to_array(quantize(
            {weights.data(), static_cast<std::size_t>(weights.size())}));
      },
      py::arg("weights"),
      "Normalises float64 [D], finite, >= 0 and not all zero, to int64 [D] "
      "that sum to WEIGHT_ONE, by\nlargest remainder; equal remainders go to "
      "the lower index. A positive weight may round to zero,\nnever the "
      "reverse. Raises WeightsError.");

  py::enum_<Sampling>(m, "Sampling")
      .value("QUOTA", Sampling::kQuota)
      .value("MULTINOMIAL", Sampling::kMultinomial)
      .value("EXACT", Sampling::kExact);

  py::class_<Planner>(m, "Planner")
      .def(py::init([](std::uint64_t seed, Counts keys,
                       std::vector<Counts> windows, std::uint64_t rows,
                       const Int64Array& units, bool shuffle,
                       std::uint64_t shuffle_shards, Sampling sampling,
                       Counts limits, bool stop_at_limit) {
             return std::make_unique<Planner>(
                 seed, std::move(keys), std::move(windows), rows, units,
                 to_shuffle(shuffle, shuffle_shards),
                 PlanRules{sampling, std::move(limits), stop_at_limit});
           }),
           py::kw_only(), py::arg("seed"), py::arg("keys"), py::arg("windows"),
           py::arg("rows"), py::arg("units"), py::arg("shuffle") = true,
           py::arg("shuffle_shards") = 0,
           py::arg("sampling") = Sampling::kQuota, py::arg("limits") = Counts(),
           py::arg("stop_at_limit") = false)
      .def("plan", &Planner::plan, py::arg("steps"))
      .def("skip", &Planner::skip, py::arg("steps"))
      .def("set_weights", &Planner::set_weights, py::arg("units"))
      .def("effective_units", &Planner::effective)
      .def("window", &Planner::window, py::arg("domain"), py::arg("draw"))
      .def("upcoming", &Planner::upcoming, py::arg("domain"), py::arg("draw"),
           py::arg("limit"))
      .def("state", &Planner::state)
      .def("load_state", &Planner::load_state, py::arg("state"));
}

}  // namespace mixloader
