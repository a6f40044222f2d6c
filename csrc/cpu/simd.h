// Vectors of floats as wide as the instruction set that the including file is compiled for. GCC's vector extension
// gives the arithmetic, so that one loop body serves every instruction set; only what it lacks is named here.
//
// No standard header with inline templates may come in through here: each file that includes this is compiled with
// flags of its own, and a weak symbol of an AVX-512 file could be the one that the linker keeps for all.
#pragma once

#include <stdint.h>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#ifndef VQFAST_LANES
#error "define VQFAST_LANES (4, 8 or 16) and VQFAST_ISA before including simd.h"
#endif

namespace vqfast::VQFAST_ISA {

constexpr int kLanes = VQFAST_LANES;

typedef float vf __attribute__((vector_size(4 * VQFAST_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * VQFAST_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * VQFAST_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * VQFAST_LANES), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * VQFAST_LANES), aligned(4), may_alias));

// As many floats and doubles as a register has doubles.
typedef float vfw __attribute__((vector_size(2 * VQFAST_LANES)));
typedef double vd __attribute__((vector_size(4 * VQFAST_LANES)));
typedef double vd_unaligned __attribute__((vector_size(4 * VQFAST_LANES), aligned(8), may_alias));

static inline __attribute__((always_inline)) vd to_doubles(vfw v) {
#if defined(__AVX512F__)
  return (vd)_mm512_maskz_cvtps_pd(0xff, (__m256)v);  // GCC 12 converts one half after the other
#else
  return __builtin_convertvector(v, vd);
#endif
}

static inline __attribute__((always_inline)) vf load(const float *p) { return *(const vf_unaligned *)p; }
static inline __attribute__((always_inline)) vi load(const int32_t *p) { return *(const vi_unaligned *)p; }
static inline __attribute__((always_inline)) void store(float *p, vf v) { *(vf_unaligned *)p = v; }
static inline __attribute__((always_inline)) void store(int32_t *p, vi v) { *(vi_unaligned *)p = v; }
static inline __attribute__((always_inline)) vf splat(float a) { return a - (vf){}; }
static inline __attribute__((always_inline)) vf max(vf a, vf b) { return a > b ? a : b; }
static inline __attribute__((always_inline)) vf min(vf a, vf b) { return a < b ? a : b; }

}  // namespace vqfast::VQFAST_ISA
