// Domains and shards from Python.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "corpus.h"

namespace mixloader {
namespace {

// (key, shards): see Domain. A shard is a dict of Shard's fields; those it does
// not have keep their defaults.
using DomainTuple = std::pair<std::uint64_t, std::vector<py::dict>>;

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

std::unique_ptr<const Corpus> make_corpus(const py::object& domains,
                                          CorpusOptions options) {
  std::vector<Domain> result;
  for (const auto& [key, shards] : domains.cast<std::vector<DomainTuple>>()) {
    Domain& domain = result.emplace_back(Domain{key, {}});
    for (const py::dict& shard : shards) {
      domain.shards.push_back(to_shard(shard));
    }
  }
  return std::make_unique<const Corpus>(std::move(result), options);
}

void bind_corpus(py::module_& m) {
  py::enum_<TokenType>(m, "TokenType")
      .value("INT64", TokenType::kInt64)
      .value("INT32", TokenType::kInt32)
      .value("UINT16", TokenType::kUint16);
  py::enum_<Boundaries>(m, "Boundaries")
      .value("NONE", Boundaries::kNone)
      .value("INDEX", Boundaries::kIndex)
      .value("AFTER_EOT", Boundaries::kAfterEot)
      .value("AT_EOT", Boundaries::kAtEot);
}

}  // namespace mixloader
