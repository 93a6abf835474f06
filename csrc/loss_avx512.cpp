// The loss in vectors of 16, with AVX-512.
#ifdef __x86_64__

#include <immintrin.h>

#include <cstdint>

#include "loss_kernels.h"

#ifdef __clang__
#pragma clang attribute push(                                         \
    __attribute__((                                                   \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace mixloader {
namespace avx512 {
namespace {

constexpr std::size_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

// The intrinsics with masks, because GCC 12 warns of its own in the others.
constexpr __mmask16 kWhole = 0xffff;

inline Floats fused(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Floats larger(Floats a, Floats b) {
  return _mm512_mask_max_ps(b, kWhole, a, b);
}
inline Floats from_half(Halves v) {
  return _mm512_maskz_cvtph_ps(kWhole, (__m256i)v);
}
inline Halves to_half(Floats v) {
  return (Halves)_mm512_maskz_cvtps_ph(kWhole, v, _MM_FROUND_TO_NEAREST_INT);
}

#include "loss_row.h"

}  // namespace
}  // namespace avx512

constexpr LossLevel kLossAvx512{
    "avx512",
    {avx512::kernels_of<float>(), avx512::kernels_of<avx512::Bfloat16>(),
     avx512::kernels_of<avx512::Float16>()}};

}  // namespace mixloader

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
