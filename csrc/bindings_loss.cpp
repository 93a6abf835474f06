// The loss for Python: arrays, checked against each other.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "loss.h"

namespace mixloader {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& expected) {
  throw py::value_error(std::string(name) + " are no " + expected);
}

// A contiguous array of T as a span; empty for None.
template <typename T>
std::span<T> to_span(const char* name, const py::object& object,
                     std::size_t size) {
  using Array = py::array_t<std::remove_const_t<T>>;
  if (object.is_none()) return {};
  if (!py::isinstance<Array>(object)) refuse(name, "array of their type");
  auto array = py::reinterpret_borrow<Array>(object);
  if (!(array.flags() & py::array::c_style) ||
      static_cast<std::size_t>(array.size()) != size) {
    refuse(name, "contiguous array of " + std::to_string(size));
  }
  if constexpr (std::is_const_v<T>) {
    return {array.data(), size};
  } else {
    return {array.mutable_data(), size};  // throws if it is read-only
  }
}

// Elements of an array; 0 for None.
std::size_t size_of(const char* name, const py::object& object) {
  if (object.is_none()) return 0;
  if (!py::isinstance<py::array>(object)) refuse(name, "array");
  return py::reinterpret_borrow<py::array>(object).size();
}

Ids to_ids(const char* name, const py::object& object) {
  if (object.is_none()) return {};
  const std::size_t size = size_of(name, object);
  if (py::isinstance<py::array_t<std::int32_t>>(object)) {
    return Ids(to_span<const std::int32_t>(name, object, size));
  }
  return Ids(to_span<const std::int64_t>(name, object, size));
}

// float32, float16, or int16 for the bits of bfloat16.
LogitType to_type(const py::array& logits) {
  switch (logits.dtype().char_()) {
    case 'f':
      return LogitType::kFloat32;
    case 'e':
      return LogitType::kFloat16;
    case 'h':
      return LogitType::kBfloat16;
    default:
      refuse("logits", "float32, float16 or int16 (bfloat16)");
  }
}

// [n, classes], of neighbouring elements of the dtype of `logits`.
template <typename Byte>
Rows<Byte> to_rows(const char* name, const py::array& array, std::size_t n,
                   const py::array& logits) {
  if (array.ndim() != 2 || static_cast<std::size_t>(array.shape(0)) != n ||
      array.shape(1) != logits.shape(1) ||
      array.dtype().char_() != logits.dtype().char_() ||
      (array.size() > 0 && array.shape(1) > 1 &&
       array.strides(1) != array.itemsize())) {
    refuse(name, "array [" + std::to_string(n) + ", " +
                     std::to_string(logits.shape(1)) +
                     "] with classes side by side");
  }
  if constexpr (std::is_const_v<Byte>) {
    return {static_cast<Byte*>(array.data()), array.strides(0)};
  } else {
    py::array writable = array;
    return {static_cast<Byte*>(writable.mutable_data()), array.strides(0)};
  }
}

const LossLevel& to_level(const std::string& name) {
  for (const LossLevel* level : loss_levels()) {
    if (name == level->name) return *level;
  }
  throw py::value_error("this machine has no " + name);
}

void loss_rows(const py::array& logits, const py::array& targets,
               const py::object& domain_ids, const py::object& token_weights,
               const py::object& domain_weights,
               const py::object& reference_losses,
               const py::object& token_bytes, const py::object& losses,
               const py::object& saved,
               const std::optional<py::array>& gradient,
               const py::object& scale, const py::object& sums,
               std::int64_t ignore_index, float label_smoothing, float z_loss,
               float softcap, bool distribution, const std::string& level,
               unsigned threads) {
  LossCall call;
  call.targets = to_ids("targets", targets);
  const std::size_t n = call.targets.size();
  call.type = to_type(logits);
  call.logits = to_rows<const std::byte>("logits", logits, n, logits);
  call.classes = static_cast<std::size_t>(logits.shape(1));
  if (call.classes == 0) refuse("logits", "rows of at least one class");
  call.domain_ids = to_ids("domain_ids", domain_ids);
  if (const std::size_t ids = call.domain_ids.size(); ids > 0) {
    call.rows_per_id = n / ids;
    if (ids * call.rows_per_id != n) refuse("domain_ids", "divisor of rows");
  }
  const auto of_rows = [n](const char* name, const py::object& object) {
    return to_span<const float>(name, object, n);
  };
  call.token_weights = of_rows("token_weights", token_weights);
  call.domain_weights =
      to_span<const float>("domain_weights", domain_weights,
                           size_of("domain_weights", domain_weights));
  call.reference_losses = of_rows("reference_losses", reference_losses);
  const std::size_t known = size_of("token_bytes", token_bytes);
  call.token_bytes =
      to_span<const std::int32_t>("token_bytes", token_bytes, known);
  if (known > 0 && known < call.classes) refuse("token_bytes", "[classes]");
  call.losses = to_span<float>("losses", losses, n);
  const auto of_both = to_span<float>("saved", saved, 2 * n);
  if (of_both.size() != 2 * n) refuse("saved", "array [2, rows]");
  call.tops = of_both.first(n);
  call.totals = of_both.last(n);
  if (gradient) {
    call.gradient = to_rows<std::byte>("gradients", *gradient, n, logits);
    call.scale =
        to_span<const float>("scales", scale, size_of("scales", scale));
    if (call.scale.size() != 1 && call.scale.size() != n) {
      refuse("scales", "array of one, or one for each row");
    }
  }
  call.sums = to_span<std::int64_t>("sums", sums, size_of("sums", sums));
  if (!call.sums.empty() &&
      (call.sums.size() % kStatistics != 0 || domain_ids.is_none())) {
    refuse("sums", "array [domains + 1, 9] beside domain_ids");
  }
  call.options = {ignore_index, label_smoothing, z_loss, softcap, distribution};
  const LossLevel& kernels = to_level(level);
  const py::gil_scoped_release release;
  compute_loss(call, kernels, threads);
}

}  // namespace

void bind_loss(py::module_& m) {
  m.def("loss_rows", &loss_rows, py::arg("logits"), py::arg("targets"),
        py::arg("domain_ids"), py::arg("token_weights"),
        py::arg("domain_weights"), py::arg("reference_losses"),
        py::arg("token_bytes"), py::kw_only(), py::arg("losses"),
        py::arg("saved"), py::arg("gradient"), py::arg("scale"),
        py::arg("sums"), py::arg("ignore_index"), py::arg("label_smoothing"),
        py::arg("z_loss"), py::arg("softcap"), py::arg("distribution"),
        py::arg("level"), py::arg("threads"),
        "One pass of mixloader.loss_cpu over the rows.");
  m.def(
      "loss_levels",
      [] {
        std::vector<std::string> names;
        for (const LossLevel* level : loss_levels()) {
          names.emplace_back(level->name);
        }
        return names;
      },
      "Sets of instructions that this machine has a loss for, fastest last.");
}

}  // namespace mixloader
