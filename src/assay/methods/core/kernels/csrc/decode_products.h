// Packed weights times the rows of a decoding step (panels.h), such that a row's floats do not depend on how many rows there are.
//
// The integer kinds sum exactly and then add one block after the other in written-out instructions: one row and many give the same
// floats. So do the dot products of bfloat16. The other loops of panels.h leave it to the compiler which product goes into which
// fused addition, once for one row and once for several: here float32 has its instructions written out too, and where there are
// none every row is computed by itself.

#pragma once
#include "panels.h"

namespace {

#if defined(ASSAY_VNNI)
// As panel_int_one does it, asking early for what the core reads next: a row alone waits for memory.
template <bool FOUR>
inline void product_of_one(const uint8_t* weight, const Input& in, float* tile) {
  constexpr int64_t size = FOUR ? INT4_BLOCK : INT8_BLOCK, early = 4096;  // bytes, also beyond the end of the panel
  __m512 y0 = _mm512_setzero_ps(), y1 = _mm512_setzero_ps();
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < in.width / GROUP; ++g) {
    const uint8_t* block = weight + g * size;
    const int8_t* x = in.code + g * GROUP;
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, b0 = a0, b1 = a0;
#pragma GCC unroll 16
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(block + early + i);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      const __m512i xa = _mm512_set1_epi32(load<int32_t>(x + 4 * i)), xb = _mm512_set1_epi32(load<int32_t>(x + 4 * i + 4));
      if constexpr (FOUR) {
        const __m512i va = _mm512_loadu_si512(block + 64 * i), vb = _mm512_loadu_si512(block + 64 * i + 64);
        a0 = _mm512_dpbusd_epi32(a0, _mm512_and_si512(va, nibble), xa);
        a1 = _mm512_dpbusd_epi32(a1, _mm512_and_si512(_mm512_srli_epi16(va, 4), nibble), xa);
        b0 = _mm512_dpbusd_epi32(b0, _mm512_and_si512(vb, nibble), xb);
        b1 = _mm512_dpbusd_epi32(b1, _mm512_and_si512(_mm512_srli_epi16(vb, 4), nibble), xb);
      } else {
        a0 = _mm512_dpbusd_epi32(a0, _mm512_loadu_si512(block + 128 * i), xa);
        a1 = _mm512_dpbusd_epi32(a1, _mm512_loadu_si512(block + 128 * i + 64), xa);
        b0 = _mm512_dpbusd_epi32(b0, _mm512_loadu_si512(block + 128 * i + 128), xb);
        b1 = _mm512_dpbusd_epi32(b1, _mm512_loadu_si512(block + 128 * i + 192), xb);
      }
    }
    const __m512 scale = _mm512_set1_ps(in.scale[g]), sum = _mm512_set1_ps(FOUR ? in.sum[g] : -128.0f * in.sum[g]);
    const __m512 d0 = _mm512_cvtepi32_ps(_mm512_add_epi32(a0, b0)), d1 = _mm512_cvtepi32_ps(_mm512_add_epi32(a1, b1));
    const uint8_t* tail = block + (FOUR ? 512 : 1024);
    const __m512 s0 = (__m512)from_fp16(tail), s1 = (__m512)from_fp16(tail + 32);
    if constexpr (FOUR) {
      y0 = _mm512_fmadd_ps(_mm512_mul_ps(d0, scale), s0, _mm512_fmadd_ps((__m512)from_fp16(tail + 64), sum, y0));
      y1 = _mm512_fmadd_ps(_mm512_mul_ps(d1, scale), s1, _mm512_fmadd_ps((__m512)from_fp16(tail + 96), sum, y1));
    } else {
      y0 = _mm512_fmadd_ps(_mm512_fmadd_ps(d0, scale, sum), s0, y0);
      y1 = _mm512_fmadd_ps(_mm512_fmadd_ps(d1, scale, sum), s1, y1);
    }
  }
  _mm512_storeu_ps(tile, y0);
  _mm512_storeu_ps(tile + 16, y1);
}
#endif

#if defined(__AVX512F__)
template <int R>
inline void product_fp32(const uint8_t* weight, const Input& in, int64_t row, float* tile) {
  const float* w = reinterpret_cast<const float*>(weight);
  __m512 a[R][2];
  for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < in.width; ++k) {
    const __m512 w0 = _mm512_loadu_ps(w + k * PANEL), w1 = _mm512_loadu_ps(w + k * PANEL + 16);
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(in.x[(row + r) * in.width + k]);
      a[r][0] = _mm512_fmadd_ps(w0, x, a[r][0]);
      a[r][1] = _mm512_fmadd_ps(w1, x, a[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(tile + (row + r) * PANEL, a[r][0]);
    _mm512_storeu_ps(tile + (row + r) * PANEL + 16, a[r][1]);
  }
}
#endif

// Part of a row of inputs: one piece of code, wherever it is asked for.
[[gnu::noinline]] void set_inputs(Input& in, int64_t row, int64_t first, int64_t count, const float* values) {
  in.set(row, first, count, values);
}

// One panel times the first `count` rows: tile[row][32].
void product(const uint8_t* weight, const Input& in, int64_t count, float* tile) {
  if (integer(in.kind)) {
#if defined(ASSAY_VNNI)
    if (count == 1 && in.rows == 1)
      return in.kind == INT4 ? product_of_one<true>(weight, in, tile) : product_of_one<false>(weight, in, tile);
#endif
    return panel(weight, in, count, tile);
  }
  int64_t row = 0;
  if (in.kind == BF16) {
#if defined(__AVX512BF16__)
    return panel(weight, in, count, tile);
#else
    for (; row < count; ++row) panel_bf16<1>(weight, in, row, tile);
    return;
#endif
  }
#if defined(__AVX512F__)
  for (; row + 8 <= count; row += 8) product_fp32<8>(weight, in, row, tile);
  for (; row < count; ++row) product_fp32<1>(weight, in, row, tile);
#else
  for (; row < count; ++row) panel_fp32<1>(weight, in, row, tile);
#endif
}

}  // namespace
