// Checksums, and failures of system calls to order.
#include <map>

#include "bindings.h"
#include "checksum.h"
#include "faults.h"

namespace mixloader {
namespace {

faults::Call call_named(const std::string& name) {
  static const std::map<std::string, faults::Call> calls{
      {"open", faults::Call::kOpen},     {"stat", faults::Call::kStat},
      {"read", faults::Call::kRead},     {"map", faults::Call::kMap},
      {"advise", faults::Call::kAdvise}, {"write", faults::Call::kWrite}};
  const auto found = calls.find(name);
  if (found == calls.end()) throw py::value_error("no call named " + name);
  return found->second;
}

}  // namespace

void bind_files(py::module_& m) {
  m.def(
      "xxh64",
      [](const py::bytes& data, std::uint64_t seed) {
        const std::string_view view = data;
        return xxh64(std::as_bytes(std::span(view)), seed);
      },
      py::arg("data"), py::arg("seed") = 0, "XXH64 of bytes.");
  m.def("write_checksums", &write_checksums, py::arg("path"),
        py::arg("sidecar"), py::arg("block_bytes") = 4096,
        py::call_guard<py::gil_scoped_release>(),
        "Writes the sidecar of block checksums of a file. Raises ShardError.");
  m.def(
      "verify",
      [](const std::string& path, const std::string& sidecar) {
        const Checksums checksums(
            std::make_shared<const File>(sidecar, "checksums " + sidecar));
        checksums.verify(File(path));
      },
      py::arg("path"), py::arg("sidecar"),
      py::call_guard<py::gil_scoped_release>(),
      "Checks a file against its sidecar. Raises ShardError, naming the block "
      "that is damaged.");
  m.def(
      "_fail_io",
      [](const std::string& call, std::uint64_t nth, std::uint64_t times,
         int error, bool is_short, unsigned delay_ms) {
        faults::arm({call_named(call), nth, times, error, is_short, delay_ms});
      },
      py::arg("call"), py::kw_only(), py::arg("nth") = 1, py::arg("times") = 1,
      py::arg("error") = 0, py::arg("is_short") = false,
      py::arg("delay_ms") = 0,
      "For tests: what the nth of the calls of one kind meets from now on.");
  m.def("_heal_io", &faults::disarm,
        "Ends _fail_io; how many calls of the kind there were.");
}

}  // namespace mixloader
