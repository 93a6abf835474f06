// The loss in vectors of 8, with AVX2, FMA and F16C: x86-64 since about 2013.
#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>

#include "loss_kernels.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace mixloader {
namespace avx2 {
namespace {

constexpr std::size_t kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef std::int32_t Ints __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(32)));
typedef std::uint16_t Halves __attribute__((vector_size(16)));

inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats from_half(Halves v) { return _mm256_cvtph_ps((__m128i)v); }
inline Halves to_half(Floats v) {
  return (Halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

#include "loss_row.h"

}  // namespace
}  // namespace avx2

constexpr LossLevel kLossAvx2{
    "avx2",
    {avx2::kernels_of<float>(), avx2::kernels_of<avx2::Bfloat16>(),
     avx2::kernels_of<avx2::Float16>()}};

}  // namespace mixloader

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
