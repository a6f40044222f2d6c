// Vectors of each element type: widened on load, rounded to nearest even on store.
#pragma once

#include "convert.h"
#include "simd.h"

namespace vqfast::VQFAST_ISA {

typedef uint16_t vs __attribute__((vector_size(2 * VQFAST_LANES)));
typedef uint16_t vs_unaligned __attribute__((vector_size(2 * VQFAST_LANES), aligned(2), may_alias));

// What values of type T are computed in.
template <class T>
struct Wide {
  typedef vf vector;
  typedef float scalar;
};
template <>
struct Wide<double> {
  typedef vd vector;
  typedef double scalar;
};
template <class T>
static constexpr int kWidth = sizeof(typename Wide<T>::vector) / sizeof(typename Wide<T>::scalar);

static inline __attribute__((always_inline)) vd load(const double *p) { return *(const vd_unaligned *)p; }
static inline __attribute__((always_inline)) void store(double *p, vd v) { *(vd_unaligned *)p = v; }
static inline __attribute__((always_inline)) vd splat(double a) { return a - (vd){}; }

static inline __attribute__((always_inline)) vf load(const bf16 *p) {
  return (vf)(__builtin_convertvector(*(const vs_unaligned *)p, vu) << 16);
}
static inline __attribute__((always_inline)) void store(bf16 *p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  // A NaN could round up to an infinity: it keeps its upper bits and is made quiet.
  const vu quiet = bits >> 16 | 0x40;
  *(vs_unaligned *)p = __builtin_convertvector(v == v ? rounded : quiet, vs);
}

#if defined(__AVX512F__)
static inline __attribute__((always_inline)) vf load(const f16 *p) {
  // The form without a mask warns of its own undefined operand in GCC 12.
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)p));
}
static inline __attribute__((always_inline)) void store(f16 *p, vf v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
static inline __attribute__((always_inline)) vf load(const f16 *p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline __attribute__((always_inline)) void store(f16 *p, vf v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline __attribute__((always_inline)) vf load(const f16 *p) {
  const vu half = __builtin_convertvector(*(const vs_unaligned *)p, vu);
  const vu sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  const vu normal = (magnitude << 13) + (112u << 23);
  const vu special = magnitude << 13 | 0x7f800000u;
  const vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-24f);
  const vu exponent = magnitude >> 10;
  return (vf)((exponent == 0 ? subnormal : exponent == 31 ? special : normal) | sign);
}
static inline __attribute__((always_inline)) void store(f16 *p, vf v) {
  const vu sign = (vu)v & 0x80000000u, bits = (vu)v ^ sign;
  const vu normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  // Added to 1/2, whose last place is 2^-24, a small value is rounded to a multiple of it: a subnormal half's bits.
  const vu subnormal = (vu)((vf)bits + 0.5f) - (vu)((vf){} + 0.5f);
  const vu nan_or_infinity = bits > 0x7f800000u ? (vu){} + 0x7e00u : (vu){} + 0x7c00u;
  const vu half = bits >= 0x477ff000u ? nan_or_infinity : bits < 0x38800000u ? subnormal : normal;
  *(vs_unaligned *)p = __builtin_convertvector(half | sign >> 16, vs);
}
#endif

// kLanes elements as two vectors of float64.
template <class T>
static inline __attribute__((always_inline)) void load_doubles(const T *p, vd out[2]) {
  if constexpr (sizeof(T) == 8) {
    out[0] = load(p);
    out[1] = load(p + kLanes / 2);
  } else {
    const vf v = load(p);
    vfw parts[2];
    __builtin_memcpy(parts, &v, sizeof v);
    out[0] = to_doubles(parts[0]);
    out[1] = to_doubles(parts[1]);
  }
}

// The first n elements, zeros behind them.
template <class T>
static inline __attribute__((always_inline)) typename Wide<T>::vector load_part(const T *p, int n) {
  T part[kWidth<T>] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
static inline __attribute__((always_inline)) void store_part(T *p, typename Wide<T>::vector v, int n) {
  T part[kWidth<T>];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// A store that goes past the caches; p is aligned to whole vectors.
static inline __attribute__((always_inline)) void stream(float *p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

// Sum of the lanes, in an order that depends on their number only.
template <class Vector>
static inline __attribute__((always_inline)) auto sum(Vector v) {
  constexpr int lanes = sizeof v / sizeof v[0];
  decltype(v[0] + v[0]) lane[lanes];
  store(lane, v);
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

}  // namespace vqfast::VQFAST_ISA
