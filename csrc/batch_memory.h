// Memory for the tensors of micro-batches: one recycled block each, and the
// tensors over it in the form that every array library takes (DLPack).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "buffers.h"
#include "corpus.h"
#include "streamer.h"
#include "timeline.h"

namespace mixloader {

// The C structures of DLPack 0.x, as its specification lays them out.
// https://dmlc.github.io/dlpack/latest/c_api.html
struct DLDataType {
  std::uint8_t code;  // 0: signed, 1: unsigned integers
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  std::int32_t device_type;  // 1: CPU
  std::int32_t device_id;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);  // called once, on any thread
};
struct CallDeleter {
  void operator()(DLManagedTensor* tensor) const { tensor->deleter(tensor); }
};
using OwnedTensor = std::unique_ptr<DLManagedTensor, CallDeleter>;

class BatchMemory {
 public:
  // In the order of the members of BatchBuffers.
  static constexpr std::size_t kBuffers = 5;

  BatchMemory(const Layout& layout, const CorpusOptions& options);

  // Bytes of each buffer; 0: the format does not ask for it.
  const std::array<std::size_t, kBuffers>& sizes() const { return sizes_; }

  // A block that goes back to the pool when the last tensor over it dies.
  BufferPool::Block take() { return pool_.take(); }

  BatchBuffers buffers(std::byte* block) const;

  // inputs, targets, domain ids, positions, documents, each of which keeps the
  // block; null: not asked for. Targets that share the inputs' buffer are a
  // view of it, one token further.
  std::array<OwnedTensor, kBuffers> tensors(
      const BufferPool::Block& block) const;

 private:
  std::int64_t rows_;
  std::int64_t length_;
  RowFormat format_;
  std::array<std::size_t, kBuffers> sizes_;
  std::array<std::size_t, kBuffers> offsets_;
  BufferPool pool_;
};

}  // namespace mixloader
