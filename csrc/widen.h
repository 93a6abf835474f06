// Token ids as they lie on disk, 1, 2, 4 or 8 bytes each, to the types that a
// batch may have.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixloader {

enum class TokenType { kInt64, kInt32, kUint16 };

// Bytes an id.
std::size_t width_of(TokenType type);

// Ids below this fit.
std::uint64_t capacity_of(TokenType type);

// Writes n ids to `out`, and returns the largest as it was before (0 if n is
// 0): those that do not fit come out wrong. All are read as unsigned, so that a
// negative id is larger than any that its width can hold. Neither side need be
// aligned. `next`: ids that will be widened soon, brought into the cache
// meanwhile; or null.
using Widen = std::uint64_t (*)(const std::byte* ids, std::size_t n,
                                std::byte* out, const std::byte* next);

// For ids of `width` bytes; the fastest that this machine can run.
Widen widen_from(std::size_t width, TokenType type);

// The i-th id.
std::uint64_t id_at(const std::byte* ids, std::size_t width, std::size_t i);

// out[i] = value, for an array of `type`.
void store(TokenType type, std::byte* out, std::size_t i, std::int64_t value);

}  // namespace mixloader
