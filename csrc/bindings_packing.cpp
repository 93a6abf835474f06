// Packed rows: the builder of sidecars, and a reader for tools and tests.
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "bindings.h"
#include "packer.h"
#include "packing.h"

namespace mixloader {
namespace {

py::tuple pack_shard_as(const py::dict& shard, std::uint64_t seq_len,
                        Boundaries boundaries, std::uint64_t eot,
                        const py::bytes& fingerprint, int descriptor,
                        const std::string& path) {
  const std::string bytes = fingerprint;
  std::array<std::uint64_t, 2> words;
  if (bytes.size() != sizeof words) {
    throw py::value_error("a fingerprint has 16 bytes");
  }
  std::memcpy(words.data(), bytes.data(), sizeof words);
  const Shard source = to_shard(shard);
  PackingHeader header;
  {
    const py::gil_scoped_release release;
    header =
        pack_shard(source, seq_len, boundaries, eot, words, descriptor, path);
  }
  return py::make_tuple(header.rows, header.targets);
}

std::vector<std::pair<std::uint64_t, std::uint64_t>> packed_row(
    const PackedRows& packed, std::uint64_t row) {
  if (row >= packed.header().rows) throw py::index_error("no such row");
  std::vector<Piece> pieces;
  packed.read(row, pieces);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> result;
  for (const Piece& piece : pieces) {
    result.emplace_back(piece.token, piece.tokens);
  }
  return result;
}

py::bytes fingerprint(const PackedRows& packed) {
  const auto& words = packed.header().fingerprint;
  return {reinterpret_cast<const char*>(words.data()), sizeof words};
}

}  // namespace

void bind_packing(py::module_& m) {
  m.def("pack_shard", &pack_shard_as, py::arg("shard"), py::arg("seq_len"),
        py::arg("boundaries"), py::arg("eot"), py::arg("fingerprint"),
        py::arg("descriptor"), py::arg("path"),
        "Writes a shard's packed rows to a file; gives (rows, targets).");
  py::class_<PackedRows>(m, "PackedRows")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def_property_readonly(
          "rows", [](const PackedRows& p) { return p.header().rows; })
      .def_property_readonly(
          "targets", [](const PackedRows& p) { return p.header().targets; })
      .def_property_readonly("fingerprint", &fingerprint)
      .def("row", &packed_row, py::arg("row"))
      .def("verify", &PackedRows::verify,
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace mixloader
