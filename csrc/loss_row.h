// The body of a level: included by loss_base.cpp, loss_avx2.cpp and
// loss_avx512.cpp, each in a namespace and under a target of its own, hence
// without a guard. Before it stand, for vectors of kLanes numbers,
//   Floats, Ints, Words, Halves   float, int32, uint32 and uint16 vectors
//   fused(a, b, c)                a * b + c
//   larger(a, b)                  a if a > b, else b, so that NaN in a is lost
//   from_half, to_half            Halves <-> Floats, to nearest even
// No lambdas and nothing of the standard library: both would be compiled for
// the target of the rest of the program.

#define MIXLOADER_INLINE [[gnu::always_inline]] inline

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr float kLowest = -3.40282347e+38f;
constexpr float kInfinity = __builtin_inff();
// exp of this is 0 in float32, and 0 times this is 0.
constexpr float kVanishing = -200.0f;
// Vectors that share a running maximum, so that one exponential moves it.
constexpr std::size_t kBlock = 16;

MIXLOADER_INLINE Floats splat(float x) { return Floats{} + x; }

MIXLOADER_INLINE Floats load(const float* from) {
  Floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

MIXLOADER_INLINE Floats load(const Bfloat16* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

MIXLOADER_INLINE Floats load(const Float16* from) {
  Halves v;
  __builtin_memcpy(&v, from, sizeof v);
  return from_half(v);
}

MIXLOADER_INLINE Floats rounded(const float*, Floats v) { return v; }

MIXLOADER_INLINE Halves rounded(const Bfloat16*, Floats v) {
  const Words bits = (Words)v;
  const Words even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;  // rounding could carry out of a NaN
  return __builtin_convertvector(v == v ? even : quiet, Halves);
}

MIXLOADER_INLINE Halves rounded(const Float16*, Floats v) { return to_half(v); }

// exp of what is not above 0, within 1 unit in the last place (1.2 without
// fused operations); 0 where that is below 2^-126. The polynomial is the
// minimax one, off by 3e-9, whose first two coefficients are 1.
MIXLOADER_INLINE Floats exp_of(Floats x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Floats shifted = fused(x, splat(1.44269504f), splat(12582912.0f));
  const Floats n = shifted - 12582912.0f;
  // ln 2 in two parts, of which n times the first is exact.
  Floats r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  Floats p = fused(r, splat(1.3814540e-3f), splat(8.3687450e-3f));
  p = fused(p, r, splat(4.1668390e-2f));
  p = fused(p, r, splat(1.6666521e-1f));
  p = fused(p, r, splat(4.9999994e-1f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  // A product and not a sum of exponents, which would turn some NaN into
  // numbers. Where x is too low for it, or -inf, it is not taken.
  const Floats power = (Floats)(((Words)shifted + 127) << 23);
  return x < splat(-87.3365448f) ? splat(0.0f) : p * power;
}

// softcap * tanh(x / softcap), from one exponential, and its derivative:
// 1 - tanh^2 without its cancellation.
MIXLOADER_INLINE Floats capped(Floats x, float softcap, Floats& slope) {
  const Floats size = (Floats)((Words)x & 0x7fffffff);
  const Floats e = exp_of(size * (-2.0f / softcap));
  slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
  const Floats c = softcap * ((1.0f - e) / (1.0f + e));
  return (Floats)((Words)c | ((Words)x & 0x80000000));
}

template <typename T, bool kCapped>
MIXLOADER_INLINE Floats logits(const T* row, float softcap) {
  if constexpr (kCapped) {
    Floats slope;
    return capped(load(row), softcap, slope);
  }
  return load(row);
}

// The running sums of each lane, as in RowSums; spread is of x - pivot.
struct Running {
  Floats top, total, first, second, spread;
};

// Moves the sums to a higher maximum.
template <bool kAll>
MIXLOADER_INLINE void move(Running& sums, Floats top) {
  const Floats decay = exp_of(sums.top - top);
  if constexpr (kAll) {
    const Floats shift = larger(sums.top - top, splat(kVanishing));
    sums.first = decay * fused(shift, sums.total, sums.first);
    sums.second *= decay * decay;
  }
  sums.total *= decay;
  sums.top = top;
}

// Takes kVectors vectors of logits into the sums. Only the first `inside` of a
// single vector are of the row; the others are -inf.
template <typename T, bool kCapped, bool kAll, std::size_t kVectors>
MIXLOADER_INLINE void take(Running& sums, const T* row, float softcap,
                           float pivot, Ints inside) {
  Floats x[kVectors];
  Floats top = sums.top;
  Floats other = sums.top;
  for (std::size_t k = 0; k < kVectors; ++k) {
    x[k] = logits<T, kCapped>(row + k * kLanes, softcap);
    if constexpr (kVectors == 1) x[k] = inside ? x[k] : splat(-kInfinity);
    if (k % 2 == 0) {
      top = larger(x[k], top);
    } else {
      other = larger(x[k], other);
    }
  }
  move<kAll>(sums, larger(top, other));
  Floats total{}, first{}, second{}, spread{};
  for (std::size_t k = 0; k < kVectors; ++k) {
    const Floats d = x[k] - sums.top;
    const Floats e = exp_of(d);
    total += e;
    if constexpr (kAll) {
      first = fused(e, larger(d, splat(kVanishing)), first);
      second = fused(e, e, second);
      const Floats off = x[k] - pivot;
      spread += kVectors > 1 ? off : inside ? off : splat(0.0f);
    }
  }
  sums.total += total;
  sums.first += first;
  sums.second += second;
  sums.spread += spread;
}

MIXLOADER_INLINE float sum(Floats v) {
  float result = v[0];
  for (std::size_t i = 1; i < kLanes; ++i) result += v[i];
  return result;
}

// The first `count` elements at `row`, and zeros.
template <typename T>
struct Part {
  T elements[kLanes];
  MIXLOADER_INLINE Part(const T* row, std::size_t count) {
    __builtin_memset(elements, 0, sizeof elements);
    __builtin_memcpy(elements, row, count * sizeof(T));
  }
};

MIXLOADER_INLINE Ints first_lanes(std::size_t count) {
  Ints lanes{};
  for (std::size_t i = 0; i < kLanes; ++i) {
    lanes[i] = static_cast<std::int32_t>(i);
  }
  return lanes < static_cast<std::int32_t>(count);
}

template <typename T, bool kCapped, bool kAll>
RowSums sums_of(const T* row, std::size_t classes, std::size_t target,
                float softcap) {
  const Part<T> at_target(row + target, 1);
  const float x_target = logits<T, kCapped>(at_target.elements, softcap)[0];
  // Any number near the logits does, so that their sum loses no accuracy.
  const float pivot = __builtin_isfinite(x_target) ? x_target : 0.0f;
  Running sums{splat(kLowest), {}, {}, {}, {}};
  const Ints whole = first_lanes(kLanes);
  std::size_t i = 0;
  for (; classes - i >= kBlock * kLanes; i += kBlock * kLanes) {
    take<T, kCapped, kAll, kBlock>(sums, row + i, softcap, pivot, whole);
  }
  for (; classes - i >= kLanes; i += kLanes) {
    take<T, kCapped, kAll, 1>(sums, row + i, softcap, pivot, whole);
  }
  if (i < classes) {
    const Part<T> rest(row + i, classes - i);
    take<T, kCapped, kAll, 1>(sums, rest.elements, softcap, pivot,
                              first_lanes(classes - i));
  }
  float top = sums.top[0];
  for (std::size_t lane = 1; lane < kLanes; ++lane) {
    if (sums.top[lane] > top) top = sums.top[lane];
  }
  move<kAll>(sums, splat(top));
  return {top,
          sum(sums.total),
          x_target,
          sum(sums.first),
          sum(sums.second),
          kAll ? (top - pivot) - sum(sums.spread) / static_cast<float>(classes)
               : 0.0f};
}

template <typename T>
RowSums row_sums(const void* row, std::size_t classes, std::size_t target,
                 float softcap, bool all) {
  const auto* x = static_cast<const T*>(row);
  if (softcap > 0.0f) {
    return all ? sums_of<T, true, true>(x, classes, target, softcap)
               : sums_of<T, true, false>(x, classes, target, softcap);
  }
  return all ? sums_of<T, false, true>(x, classes, target, softcap)
             : sums_of<T, false, false>(x, classes, target, softcap);
}

// hit: at_target in the lane of the target, 0 in the others.
template <typename T, bool kCapped>
MIXLOADER_INLINE auto gradient_at(const T* row, const RowGradient& factors,
                                  Floats hit, float softcap) {
  Floats x = load(row);
  Floats slope{};
  if constexpr (kCapped) x = capped(x, softcap, slope);
  const Floats p = exp_of(x - factors.top) * factors.of_p;
  Floats g = p - hit - factors.everywhere;
  if constexpr (kCapped) g *= slope;
  return rounded(row, g);
}

template <typename T, bool kCapped>
MIXLOADER_INLINE void write_span(const T* row, T* out, std::size_t begin,
                                 std::size_t end, const RowGradient& factors,
                                 float softcap) {
  for (std::size_t i = begin; i < end; i += kLanes) {
    const auto g = gradient_at<T, kCapped>(row + i, factors, Floats{}, softcap);
    __builtin_memcpy(out + i, &g, sizeof g);
  }
}

// Writes fewer classes than a vector has, or those around the target.
template <typename T, bool kCapped>
MIXLOADER_INLINE void write_part(const T* row, T* out, std::size_t begin,
                                 std::size_t count, const RowGradient& factors,
                                 float softcap) {
  Floats hit{};
  if (factors.target - begin < count) {
    hit[factors.target - begin] = factors.at_target;
  }
  const Part<T> part(row + begin, count);
  const auto g = gradient_at<T, kCapped>(part.elements, factors, hit, softcap);
  __builtin_memcpy(out + begin, &g, count * sizeof(T));
}

template <typename T, bool kCapped>
void gradient_of(const T* row, T* out, std::size_t classes,
                 const RowGradient& factors, float softcap) {
  const std::size_t end = classes / kLanes * kLanes;
  const std::size_t around = factors.target / kLanes * kLanes;
  if (around < end) {
    write_span<T, kCapped>(row, out, 0, around, factors, softcap);
    write_part<T, kCapped>(row, out, around, kLanes, factors, softcap);
    write_span<T, kCapped>(row, out, around + kLanes, end, factors, softcap);
  } else {
    write_span<T, kCapped>(row, out, 0, end, factors, softcap);
  }
  if (end < classes) {
    write_part<T, kCapped>(row, out, end, classes - end, factors, softcap);
  }
}

template <typename T>
void row_gradient(const void* row, void* out, std::size_t classes,
                  const RowGradient& factors, float softcap) {
  const auto* x = static_cast<const T*>(row);
  auto* g = static_cast<T*>(out);
  if (softcap > 0.0f) {
    gradient_of<T, true>(x, g, classes, factors, softcap);
  } else {
    gradient_of<T, false>(x, g, classes, factors, softcap);
  }
}

template <typename T>
constexpr RowKernels kernels_of() {
  return {row_sums<T>, row_gradient<T>};
}

#undef MIXLOADER_INLINE
