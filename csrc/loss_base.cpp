// The loss in vectors of 4 that any compiler can make something of.
#include <cstdint>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "loss_kernels.h"

namespace mixloader {
namespace base {
namespace {

constexpr std::size_t kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));
typedef std::uint16_t Halves __attribute__((vector_size(8)));

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats fused(Floats a, Floats b, Floats c) {
#ifdef __aarch64__
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// In integers, so that no mode of the processor can lose the smallest halves.
inline Floats from_half(Halves v) {
  const Words h = __builtin_convertvector(v, Words);
  const Words sign = (h & 0x8000) << 16;
  const Words size = h & 0x7fff;
  const Floats small =
      __builtin_convertvector((Ints)size, Floats) * 0x1p-24f;  // subnormal
  const Words normal = (size << 13) + ((127 - 15) << 23);
  const Words endless = (size << 13) | 0x7f800000;  // infinite or NaN
  const Words bits = size < 0x400    ? (Words)small
                     : size < 0x7c00 ? normal
                                     : endless;
  return (Floats)(bits | sign);
}

inline Halves to_half(Floats v) {
  const Words sign = (Words)v >> 16 & 0x8000;
  const Words size = (Words)v & 0x7fffffff;
  // Of the smallest, one half is the last bit, so that adding rounds.
  const Words small = (Words)((Floats)size + 0.5f) - 0x3f000000;
  const Words normal =
      (size + (0xfff - ((127 - 15) << 23)) + (size >> 13 & 1)) >> 13;
  const Words endless = size > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words bits = size < 0x38800000    ? small
                     : size >= 0x47800000 ? endless
                                          : normal;
  return __builtin_convertvector(bits | sign, Halves);
}

#include "loss_row.h"

}  // namespace
}  // namespace base

constexpr LossLevel kLossBase{
    "base",
    {base::kernels_of<float>(), base::kernels_of<base::Bfloat16>(),
     base::kernels_of<base::Float16>()}};

}  // namespace mixloader
