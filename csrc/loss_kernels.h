// What is done with each logit of a row, compiled once for each level of SIMD.
//
// Arithmetic is float32 with NaN and infinities as IEEE 754 has them. A row is
// computed in one fixed order, which depends on its number of classes and on
// the level alone: not on its address, its neighbours or the thread.
#pragma once

#include <cstddef>
#include <span>

namespace mixloader {

enum class LogitType { kFloat32, kBfloat16, kFloat16 };

// Over the logits x of a row, after softcap.
struct RowSums {
  float top;     // the largest x, or the lowest float if all are -inf
  float total;   // sum of exp(x - top)
  float target;  // the x of the target
  // These only if asked for, else 0.
  float first;   // sum of (x - top) exp(x - top)
  float second;  // sum of exp(2 (x - top))
  float spread;  // mean of top - x
};

// The gradient at a logit is exp(x - top) * of_p - everywhere, minus at_target
// at the target, times the slope of the softcap; rounded once.
struct RowGradient {
  float top;
  float of_p;
  float everywhere;
  float at_target;
  std::size_t target;
};

// Rows begin at `row` and `out`, which need be aligned to an element only, and
// may be the same. softcap: 0 for none.
struct RowKernels {
  RowSums (*sums)(const void* row, std::size_t classes, std::size_t target,
                  float softcap, bool all);
  void (*gradient)(const void* row, void* out, std::size_t classes,
                   const RowGradient& factors, float softcap);
};

struct LossLevel {
  const char* name;
  RowKernels kernels[3];  // by LogitType
};

extern const LossLevel kLossBase;
#ifdef __x86_64__
extern const LossLevel kLossAvx2;
extern const LossLevel kLossAvx512;
#endif

// The levels that this machine can run, the fastest last.
std::span<const LossLevel* const> loss_levels();

}  // namespace mixloader
