#include "batch_memory.h"

#include <utility>

#include "widen.h"

namespace mixloader {
namespace {

using Sizes = std::array<std::size_t, BatchMemory::kBuffers>;

constexpr std::size_t kAlignment = 64;

Sizes buffer_sizes(const Layout& layout, const CorpusOptions& options) {
  const RowFormat& format = options.format;
  const std::size_t rows = layout.batch_size;
  const std::size_t size = rows * options.seq_len;
  const bool documents = format.boundaries != Boundaries::kNone;
  return {(size + (format.shared ? rows : 0)) * width_of(format.inputs),
          format.shared ? 0 : size * width_of(format.targets),
          rows * sizeof(std::int64_t),
          documents ? size * sizeof(std::int64_t) : 0,
          documents ? size * sizeof(std::int32_t) : 0};
}

Sizes buffer_offsets(const Sizes& sizes) {
  Sizes offsets{};
  for (std::size_t i = 1; i < sizes.size(); ++i) {
    const std::size_t end = offsets[i - 1] + sizes[i - 1];
    offsets[i] = (end + kAlignment - 1) / kAlignment * kAlignment;
  }
  return offsets;
}

// A tensor with all that it needs to live.
struct Tensor {
  DLManagedTensor managed;
  BufferPool::Block block;
  std::array<std::int64_t, 2> shape;
  std::array<std::int64_t, 2> strides;
};

// `columns` 0: of one dimension. `stride`: elements from row to row.
OwnedTensor make_tensor(const BufferPool::Block& block, std::size_t offset,
                        TokenType type, std::int64_t rows, std::int64_t columns,
                        std::int64_t stride) {
  auto tensor =
      std::make_unique<Tensor>(Tensor{{}, block, {rows, columns}, {stride, 1}});
  const auto bits = static_cast<std::uint8_t>(8 * width_of(type));
  const std::uint8_t is_unsigned = type == TokenType::kUint16;
  tensor->managed = {{block.get() + offset,
                      1,
                      0,
                      columns == 0 ? 1 : 2,
                      {is_unsigned, bits, 1},
                      tensor->shape.data(),
                      tensor->strides.data(),
                      0},
                     tensor.get(),
                     [](DLManagedTensor* self) {
                       delete static_cast<Tensor*>(self->context);
                     }};
  return OwnedTensor(&tensor.release()->managed);
}

}  // namespace

BatchMemory::BatchMemory(const Layout& layout, const CorpusOptions& options)
    : rows_(static_cast<std::int64_t>(layout.batch_size)),
      length_(static_cast<std::int64_t>(options.seq_len)),
      format_(options.format),
      sizes_(buffer_sizes(layout, options)),
      offsets_(buffer_offsets(sizes_)),
      pool_(offsets_.back() + sizes_.back()) {}

BatchBuffers BatchMemory::buffers(std::byte* block) const {
  const auto part = [&](std::size_t i) {
    return std::span<std::byte>(block + offsets_[i], sizes_[i]);
  };
  const auto numbers = [&]<typename T>(std::size_t i, T*) {
    return std::span<T>(reinterpret_cast<T*>(part(i).data()),
                        sizes_[i] / sizeof(T));
  };
  return {part(0), part(1), numbers(2, static_cast<std::int64_t*>(nullptr)),
          numbers(3, static_cast<std::int64_t*>(nullptr)),
          numbers(4, static_cast<std::int32_t*>(nullptr))};
}

std::array<OwnedTensor, BatchMemory::kBuffers> BatchMemory::tensors(
    const BufferPool::Block& block) const {
  const bool shared = format_.shared;
  const bool documents = sizes_[3] > 0;
  const auto make = [&](std::size_t i, TokenType type) {
    return make_tensor(block, offsets_[i], type, rows_, length_, length_);
  };
  const auto make_view = [&](std::size_t first) {
    return make_tensor(block, first * width_of(format_.inputs), format_.inputs,
                       rows_, length_, length_ + 1);
  };
  return {shared ? make_view(0) : make(0, format_.inputs),
          shared ? make_view(1) : make(1, format_.targets),
          make_tensor(block, offsets_[2], TokenType::kInt64, rows_, 0, 1),
          documents ? make(3, TokenType::kInt64) : nullptr,
          documents ? make(4, TokenType::kInt32) : nullptr};
}

}  // namespace mixloader
