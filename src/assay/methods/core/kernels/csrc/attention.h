// What the attention kernels share: vectors of floats, exponentials, the micro kernel, views of tensors, packing, the grid of blocks.
//
// The micro kernel computes rows x columns of 32-bit words: a word is one float, or two neighbouring bfloat16 of the summed
// dimension where the processor multiplies those (AVX512-BF16). The left side is broadcast word by word from its natural layout;
// the right side is packed so that one register holds one word of kLanes columns:
//   keys   (group of kLanes keys, word of the head dimension, lane)      values   (word of keys, head dimension)
//
// Sixteen words of sixteen columns of either are what AMX calls a tile, so the same memory serves processors that have it: there
// rows are taken by 32 and 16, and what is left by the micro kernel.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ASSAY_AVX512 1
#if defined(__AVX512BF16__)
#define ASSAY_BF16 1
#endif
#endif

#include "amx.h"

#if defined(__GNUC__) && !defined(__clang__)  // false alarms of GCC 12 from inside its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

using at::BFloat16;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr int64_t kMostDim = 1024;  // of queries, keys and values

// ---- vectors of floats -----------------------------------------------------------------------------------------------------

constexpr int kRows = 6;  // rows computed together: with kWide registers of columns they fill the register file

#ifdef ASSAY_AVX512
constexpr int kLanes = 16;
constexpr int kWide = 4;
using Vec = __m512;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline bool any_above(Vec v, float x) { return _mm512_cmp_ps_mask(v, all(x), _CMP_GT_OQ) != 0; }
// v in the lanes [from, to), -infinity in the others.
inline Vec only(Vec v, int64_t from, int64_t to) {
  const auto before = [](int64_t lanes) { return (1u << std::clamp<int64_t>(lanes, 0, kLanes)) - 1; };
  return _mm512_mask_mov_ps(all(-kInfinity), static_cast<__mmask16>(before(to) & ~before(from)), v);
}
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
#else
constexpr int kLanes = 8;
constexpr int kWide = 2;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t IntVec __attribute__((vector_size(32)));
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BFloat16* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return Vec{} + x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec only(Vec v, int64_t from, int64_t to) {
  for (int64_t i = 0; i < kLanes; ++i) v[i] = from <= i && i < to ? v[i] : -kInfinity;
  return v;
}
inline bool any_above(Vec v, float x) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= v[i] > x;
  return found;
}
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, v[i]);
  return most;
}
#endif

// Lane i of the result is the sum of v[i].
inline Vec sums_of(const Vec (&v)[kLanes]) {
#ifdef ASSAY_AVX512
  Vec pairs[8], fours[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  const Vec low = _mm512_shuffle_f32x4(fours[0], fours[1], 0x88) + _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd);
  const Vec high = _mm512_shuffle_f32x4(fours[2], fours[3], 0x88) + _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
#else
  Vec total;
  for (int i = 0; i < kLanes; ++i) total[i] = sum(v[i]);
  return total;
#endif
}

// 2^x; relative error 8e-8, or 8e-5 where `Rough` (for results that become bfloat16). -inf gives 0 and NaN stays NaN.
template <bool Rough>
inline Vec exp2(Vec x) {
#ifdef ASSAY_AVX512
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x); 0 for an infinity
#else
  const Vec given = x;
  x = x < -126.0f ? all(-126.0f) : x;
  x = x > 127.0f ? all(127.0f) : x;
  Vec whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the nearest integer
  whole = whole > x ? whole - 1.0f : whole;
  const Vec f = x - whole;
#endif
  Vec p;
  if constexpr (Rough) {
    p = ((all(0.07802452f) * f + 0.22606718f) * f + 0.69583352f) * f + 0.99992522f;
  } else {
    p = ((all(0.00187758f) * f + 0.00898934f) * f + 0.05582632f) * f + 0.24015362f;
    p = (p * f + 0.69315307f) * f + 0.99999993f;
  }
#ifdef ASSAY_AVX512
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
#else
  const IntVec power = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  p = p * scale;
  return given < -126.0f ? Vec{} : p;
#endif
}

// ---- the micro kernel ------------------------------------------------------------------------------------------------------

template <bool Half>
inline Vec multiply_add(Vec total, uint32_t a, Vec b) {
#ifdef ASSAY_BF16
  if constexpr (Half) return _mm512_dpbf16_ps(total, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
  float value;
  std::memcpy(&value, &a, 4);
  return all(value) * b + total;
}

// total[m][n] += sum over words s of a[m][s] * b[s][n]; rows of `a` lie `row_bytes` apart, strides of `b` are in words. Always
// inline: `total` has to stay in registers.
template <bool Half, int M, int N>
__attribute__((always_inline)) inline void multiply(Vec (&total)[M][N], const char* a, int64_t row_bytes, const float* b, int64_t word_stride,
                     int64_t column_stride, int64_t words) {
  for (int64_t s = 0; s < words; ++s) {
    Vec column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) column[n] = load(b + s * word_stride + n * column_stride);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      uint32_t word;
      std::memcpy(&word, a + m * row_bytes + 4 * s, 4);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m][n] = multiply_add<Half>(total[m][n], word, column[n]);
    }
  }
}

// ---- tiles: AMX ------------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 16;  // rows of a tile, and words of a row
constexpr int64_t kPair = 2 * kTile;

#ifdef ASSAY_AMX
// out[r][c] = (Add ? out[r][c] : 0) + sum over words s of a[r][s] * b[s][c], for R tiles of rows and C tiles of columns; words are
// pairs of bfloat16, or (Codes) unsigned codes of `a` and signed ones of `b` by fours, whose sums are int32. `words` is a multiple
// of 16. Strides of `b` and `out` are in words.
template <bool Codes, int R, int C, bool Add = false>
inline void multiply_tiles(const char* a, int64_t row_bytes, const void* right, int64_t word_stride, int64_t column_stride,
                           int64_t words, void* result, int64_t out_stride) {
  const auto* b = static_cast<const char*>(right);
  auto* out = static_cast<char*>(result);
  const int64_t out_bytes = 4 * out_stride, b_bytes = 4 * word_stride;
  asm volatile("" ::: "memory");  // the compiler does not know that tiles read and write memory
  if constexpr (Add) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (C > 1) _tile_loadd(1, out + 64, out_bytes);
    if constexpr (R > 1) _tile_loadd(2, out + kTile * out_bytes, out_bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, out + kTile * out_bytes + 64, out_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t s = 0; s < words; s += kTile) {
    _tile_loadd(4, a + 4 * s, row_bytes);
    _tile_loadd(6, b + s * b_bytes, b_bytes);
    if constexpr (Codes) _tile_dpbusd(0, 4, 6);
    if constexpr (!Codes) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b + s * b_bytes + 4 * column_stride, b_bytes);
      if constexpr (Codes) _tile_dpbusd(1, 4, 7);
      if constexpr (!Codes) _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a + kTile * row_bytes + 4 * s, row_bytes);
      if constexpr (Codes) _tile_dpbusd(2, 5, 6);
      if constexpr (!Codes) _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) {
      if constexpr (Codes) _tile_dpbusd(3, 5, 7);
      if constexpr (!Codes) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (C > 1) _tile_stored(1, out + 64, out_bytes);
  if constexpr (R > 1) _tile_stored(2, out + kTile * out_bytes, out_bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, out + kTile * out_bytes + 64, out_bytes);
  asm volatile("" ::: "memory");
}
#endif

// Covers `count` registers of columns with tiles of 4 (or 2), 2 and 1: calls f(constant N, first register).
template <class F>
inline void for_tiles(int64_t count, F&& f) {
  int64_t at = 0;
  for (; at + kWide <= count; at += kWide) f(std::integral_constant<int, kWide>{}, at);
  for (; at + 2 <= count; at += 2) f(std::integral_constant<int, 2>{}, at);
  for (; at < count; ++at) f(std::integral_constant<int, 1>{}, at);
}

// Covers `count` rows with groups of 6, 4, 2 and 1, or first with 32 and 16 where `tiles`: calls f(constant M, first row).
template <class F>
inline void for_rows(int64_t count, F&& f, bool tiles = false) {
  int64_t at = 0;
#ifdef ASSAY_AMX
  if (tiles) {
    for (; at + kPair <= count; at += kPair) f(std::integral_constant<int, kPair>{}, at);
    for (; at + kTile <= count; at += kTile) f(std::integral_constant<int, kTile>{}, at);
  }
#endif
  while (at < count) {
    const int64_t left = count - at;
    if (left == 6 || left > 8) {
      f(std::integral_constant<int, 6>{}, at);
      at += 6;
    } else if (left >= 4) {
      f(std::integral_constant<int, 4>{}, at);
      at += 4;
    } else if (left >= 2) {
      f(std::integral_constant<int, 2>{}, at);
      at += 2;
    } else {
      f(std::integral_constant<int, 1>{}, at);
      at += 1;
    }
  }
}

// ---- tensors (batch, heads, tokens, dim): any strides but a unit one in the last dimension; float or bfloat16 --------------

struct View {
  char* data;
  int64_t batch, head, token;  // bytes
  bool half;

  explicit View(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())),
        batch(x.stride(0) * x.element_size()),
        head(x.stride(1) * x.element_size()),
        token(x.stride(2) * x.element_size()),
        half(x.scalar_type() == at::kBFloat16) {}
  char* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
  const BFloat16* halves(int64_t b, int64_t h, int64_t t) const { return reinterpret_cast<BFloat16*>(row(b, h, t)); }
  float* floats(int64_t b, int64_t h, int64_t t) const { return reinterpret_cast<float*>(row(b, h, t)); }
};

// A row of `dim` numbers as words; null gives zeros.
template <bool Half>
inline void to_words(const char* row, bool half, int64_t dim, float* words) {
  if (row == nullptr) {
    std::memset(words, 0, dim * (Half ? 2 : 4));
  } else if (half == Half) {
    std::memcpy(words, row, dim * (Half ? 2 : 4));
  } else if constexpr (Half) {
    for (int64_t i = 0; i < dim; ++i)
      reinterpret_cast<BFloat16*>(words)[i] = static_cast<BFloat16>(reinterpret_cast<const float*>(row)[i]);
  } else {
    for (int64_t i = 0; i < dim; ++i) words[i] = static_cast<float>(reinterpret_cast<const BFloat16*>(row)[i]);
  }
}

// Numbers as rows of words: N registers, from number `place` on.
template <bool Half, int N>
__attribute__((always_inline)) inline void store_words(float* words, int64_t place, const Vec (&v)[N]) {
#ifdef ASSAY_BF16
  if constexpr (Half) {
    auto* half = reinterpret_cast<BFloat16*>(words) + place;
#pragma GCC unroll 8
    for (int n = 0; n + 1 < N; n += 2)
      _mm512_storeu_si512(half + n * kLanes, (__m512i)_mm512_cvtne2ps_pbh(v[n + 1], v[n]));
    if constexpr (N % 2)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + (N - 1) * kLanes), (__m256i)_mm512_cvtneps_pbh(v[N - 1]));
    return;
  }
#endif
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(words + place + n * kLanes, v[n]);
}

// Packs kLanes rows into (word, lane); `row(lane)` is a pointer or null.
template <bool Half, class F>
void pack_columns(F&& row, bool half, int64_t dim, float* packed) {
  const int64_t words = Half ? dim / 2 : dim;
  float flat[kMostDim];
  for (int lane = 0; lane < kLanes; ++lane) {
    to_words<Half>(row(lane), half, dim, flat);
    for (int64_t s = 0; s < words; ++s) packed[s * kLanes + lane] = flat[s];
  }
}

// Packs kLanes rows into (word of rows, dim).
template <bool Half, class F>
void pack_rows(F&& row, bool half, int64_t dim, float* packed) {
  if constexpr (!Half) {
    for (int lane = 0; lane < kLanes; ++lane) to_words<false>(row(lane), half, dim, packed + lane * dim);
  } else {
    float even[kMostDim], odd[kMostDim];
    for (int lane = 0; lane < kLanes; lane += 2) {
      to_words<true>(row(lane), half, dim, even);
      to_words<true>(row(lane + 1), half, dim, odd);
      const auto* low = reinterpret_cast<const uint16_t*>(even);
      const auto* high = reinterpret_cast<const uint16_t*>(odd);
      auto* out = reinterpret_cast<uint32_t*>(packed + lane / 2 * dim);
      for (int64_t i = 0; i < dim; ++i) out[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    }
  }
}

// A thread's own floats, aligned to a cache line.
struct Workspace {
  std::vector<float> floats;
  float* next;
  explicit Workspace(int64_t count) : floats(count + 16) {
    next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats.data()) + 63) / 64 * 64);
  }
  float* take(int64_t count) { return std::exchange(next, next + (count + 15) / 16 * 16); }
};

// ---- the grid of blocks ----------------------------------------------------------------------------------------------------

// Queries are the last `queries` of `keys` positions, and blocks are those of the positions: query block i covers positions
// [(first_block + i) * block, + block), of which the first may begin before query 0.
struct Shape {
  int64_t batch, heads, key_heads, queries, keys, dim, block;
  bool causal;
  const int64_t* key_start;  // (batch,) keys before it are padding; or null
  int64_t window = 0;        // keys a position sees, its own included; 0: all. For causal attention

  int64_t offset() const { return keys - queries; }
  int64_t first_block() const { return offset() / block; }
  int64_t key_blocks() const { return (keys + block - 1) / block; }
  int64_t query_blocks() const { return key_blocks() - first_block(); }
  int64_t start(int64_t b) const { return key_start ? key_start[b] : 0; }
  // The first key that a position of row b sees.
  int64_t first_of(int64_t b, int64_t position) const {
    return window ? std::max(start(b), position - window + 1) : start(b);
  }
  int64_t group_of(int64_t h) const { return h / (heads / key_heads); }
};

struct Task {
  int64_t cost, b, h, i;
};

// Longest first, so that the threads finish together.
inline std::vector<Task> longest_first(std::vector<Task> tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });
  return tasks;
}

// ---- what the operators take ------------------------------------------------------------------------------------------------

// Checks the tensors and the grid that every operator takes; `more_queries`: there may be more queries than keys.
inline Shape checked(const Tensor& q, const Tensor& k, int64_t block, bool causal, const OptTensor& key_start, bool half,
                     int64_t window = 0, bool more_queries = false) {
  const auto check = [&](const char* name, const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.stride(3) == 1 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16), name,
                      " must be float32 or bfloat16 of (batch, heads, tokens, dim), dim last in memory, got ", x.scalar_type(), " ",
                      x.sizes(), " with strides ", x.strides());
    TORCH_CHECK_VALUE(x.scalar_type() == q.scalar_type(), name, " must have the dtype of q, ", q.scalar_type(), ", got ", x.scalar_type());
  };
  check("q", q);
  check("k", k);
  TORCH_CHECK_VALUE(k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "q ", q.sizes(), " and k ", k.sizes(), " do not fit together");
  TORCH_CHECK_VALUE(more_queries || q.size(2) <= k.size(2), "q must have at most as many tokens as k (", k.size(2), "), got ", q.size(2));
  TORCH_CHECK_VALUE(q.size(3) % 16 == 0 && q.size(3) > 0 && q.size(3) <= kMostDim,
                    "the head dimension must be a multiple of 16 up to ", kMostDim, ", got ", q.size(3));
  TORCH_CHECK_VALUE(block > 0 && block % 16 == 0, "block must be a positive multiple of 16, got ", block);
  TORCH_CHECK_VALUE(window >= 0 && (window == 0 || causal), "window must be 0 (none) or, for causal attention, positive, got ", window);
#ifndef ASSAY_BF16
  TORCH_CHECK_VALUE(!half, "half must be false: this processor has no bfloat16 dot product");
#endif
  const int64_t* start = nullptr;
  if (key_start.has_value()) {
    TORCH_CHECK_VALUE(key_start->scalar_type() == at::kLong && key_start->is_contiguous() &&
                          key_start->sizes() == at::IntArrayRef({q.size(0)}),
                      "key_start must be a contiguous int64 tensor of (batch,), got ", key_start->scalar_type(), " ", key_start->sizes());
    start = key_start->data_ptr<int64_t>();
    for (int64_t b = 0; b < q.size(0); ++b)
      TORCH_CHECK_VALUE(start[b] >= 0 && start[b] <= k.size(2), "key_start must lie in [0, ", k.size(2), "], got ", start[b]);
  }
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), block, causal, start, window};
}

inline void check_values(const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(v.dim() == 4 && v.stride(3) == 1 && v.scalar_type() == k.scalar_type() && v.size(0) == k.size(0) &&
                        v.size(1) == k.size(1) && v.size(2) == k.size(2) && v.size(3) % 16 == 0 && v.size(3) > 0 &&
                        v.size(3) <= kMostDim,
                    "v must be ", k.scalar_type(), " of (", k.size(0), ", ", k.size(1), ", ", k.size(2),
                    ", a multiple of 16 up to ", kMostDim, "), dim last in memory, got ", v.scalar_type(), " ", v.sizes());
}

// The blocks that are kept, or null for all.
inline const bool* checked_mask(const OptTensor& mask, const Shape& s) {
  if (!mask.has_value()) return nullptr;
  TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->is_contiguous() &&
                        mask->sizes() == at::IntArrayRef({s.batch, s.heads, s.query_blocks(), s.key_blocks()}),
                    "mask must be a contiguous bool tensor of (", s.batch, ", ", s.heads, ", ", s.query_blocks(), ", ", s.key_blocks(),
                    "), got ", mask->scalar_type(), " ", mask->sizes());
  return mask->data_ptr<bool>();
}

// The sinks: one logit a query head that takes part in the softmax and has no value; or null.
inline const float* checked_sinks(const OptTensor& sinks, const Shape& s) {
  if (!sinks.has_value()) return nullptr;
  TORCH_CHECK_VALUE(sinks->scalar_type() == at::kFloat && sinks->is_contiguous() && sinks->sizes() == at::IntArrayRef({s.heads}),
                    "sinks must be a contiguous float32 tensor of (", s.heads, "), got ", sinks->scalar_type(), " ", sinks->sizes());
  return sinks->data_ptr<float>();
}

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// ---- online softmax over segments of keys ----------------------------------------------------------------------------------

constexpr int64_t kSegmentBytes = 16384;  // of packed keys, and of values: both stay in the first-level cache
constexpr float kSlack = 8.0f;            // how far a score may pass the maximum that was found before it, in base 2

// Keys of a segment, of whose groups keys or values take so many bytes.
inline int64_t segment_of(int64_t group_bytes) {
  return std::max<int64_t>(kSegmentBytes / group_bytes * kLanes / kPair, 1) * kPair;
}

// What one thread carries through the key blocks for one query block.
struct State {
  float* sums;     // (rows, dim)
  float* weights;  // (rows, kLanes), partial sums
  float* shift;    // (rows,), subtracted from the scores: a maximum, 0 before there is one
  float* limit;    // (rows,), how far a score may pass `shift`: kSlack, -infinity before there is a maximum
};

// What a thread needs while it attends: all in floats, `scores` and most of `shares` for tiles only.
struct Scratch {
  float *exponents, *shares, *scores;

  static int64_t floats(int64_t segment) { return kRows * kWide * kLanes + kPair * (segment + kPair) / 2 + 2 * kPair * kPair + 48; }
  Scratch(Workspace& own, int64_t segment)
      : exponents(own.take(kRows * kWide * kLanes)),
        shares(own.take(kPair * (segment + kPair) / 2)),
        scores(own.take(2 * kPair * kPair)) {}
};

// Takes the maxima of M rows of exponents (score - shift) into account: moves the shift, and rescales what was summed with the
// old one: sums, weights, and the shares of this segment, (M, stride) of which `before` are there. Seldom needed: a maximum is
// only taken up when it is the first or passes the old one by kSlack, so that nothing has to wait for it.
template <bool Half, int M>
__attribute__((noinline)) void raise(float* exponents, int64_t width, float* shares, int64_t stride, int64_t before, int64_t dim,
                                     int64_t at, const State& state) {
  for (int m = 0; m < M; ++m) {
    float* row = exponents + m * width;
    float *shift = state.shift + at + m, *limit = state.limit + at + m;
    Vec most = load(row);
    for (int64_t i = kLanes; i < width; i += kLanes) most = larger(most, load(row + i));
    const float rise = largest(most);
    if (!(rise > std::min(*limit, 0.0f))) continue;
    if (*limit == kSlack) {
      const float fade = std::exp2(-rise);
      float *sums = state.sums + (at + m) * dim, *weights = state.weights + (at + m) * kLanes;
      store(weights, load(weights) * fade);
      for (int64_t c = 0; c < dim; c += kLanes) store(sums + c, load(sums + c) * fade);
      for (int64_t i = m * stride; i < m * stride + before; ++i) {
        auto* half = reinterpret_cast<BFloat16*>(shares);
        if constexpr (Half) half[i] = static_cast<BFloat16>(half[i] * fade);
        if constexpr (!Half) shares[i] *= fade;
      }
    }
    *shift += rise;
    *limit = kSlack;
    for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(row + i) - rise);
  }
}

// Turns M x N registers of scores, of the keys from `place` of a segment on, into shares: row m sees the keys [first[m], last[m])
// of the segment, the others are masked (neither falls from row to row); `scale` makes scores exponents of two. Rows of `shares` are `width` numbers apart.
template <bool Half, int M, int N>
__attribute__((always_inline)) inline void weigh(Vec (&total)[M][N], int64_t place, float scale, const int64_t* first,
                                                 const int64_t* last, int64_t dim, int64_t at, const State& state, float* exponents, float* shares,
                                                 int64_t width) {
  constexpr int64_t tile = N * kLanes;
  const bool edge = first[M - 1] > place || last[0] < place + tile;
  bool seldom = false;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    Vec most = all(-kInfinity);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      total[m][n] = total[m][n] * scale - state.shift[at + m];
      if (__builtin_expect(edge, false))
        total[m][n] = only(total[m][n], first[m] - place - n * kLanes, last[m] - place - n * kLanes);
      most = larger(most, total[m][n]);
    }
    seldom |= any_above(most, state.limit[at + m]);
  }
  if (__builtin_expect(seldom, false)) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* row = exponents + m * tile;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(row + n * kLanes, total[m][n]);
    }
    raise<Half, M>(exponents, tile, shares, width, place, dim, at, state);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m][n] = load(exponents + m * tile + n * kLanes);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    Vec weight = load(state.weights + (at + m) * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      total[m][n] = exp2<Half>(total[m][n]);
      weight = weight + total[m][n];
    }
    store_words<Half, N>(shares, m * width + place, total[m]);
    store(state.weights + (at + m) * kLanes, weight);
  }
}

// M rows against a segment of `groups` groups of kLanes keys: scores, online softmax, weighted values. `score(total, place)` adds to
// total[M][N] the products of the rows with the N * kLanes keys from `place` on. The rest is as in `weigh`.
template <bool Half, int M, class Score>
__attribute__((always_inline)) inline void attend_scores(Score&& score, const float* values, int64_t groups, int64_t dim, float scale,
                                                         const int64_t* first, const int64_t* last, int64_t at, const State& state,
                                                         const Scratch& scratch) {
  const int64_t width = groups * kLanes;
  float* shares = scratch.shares;
  for_tiles(groups, [&](auto n_, int64_t group) {
    constexpr int N = decltype(n_)::value;
    Vec total[M][N] = {};
    score(total, group * kLanes);
    weigh<Half, M, N>(total, group * kLanes, scale, first, last, dim, at, state, scratch.exponents, shares, width);
  });
  for_tiles(dim / kLanes, [&](auto n_, int64_t column) {
    constexpr int N = decltype(n_)::value;
    float* sums = state.sums + at * dim + column * kLanes;
    Vec total[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[m][n] = load(sums + m * dim + n * kLanes);
    multiply<Half, M, N>(total, reinterpret_cast<const char*>(shares), width * (Half ? 2 : 4), values + column * kLanes, dim,
                         kLanes, Half ? width / 2 : width);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(sums + m * dim + n * kLanes, total[m][n]);
  });
}

#ifdef ASSAY_AMX
constexpr int kSoftRows = 8;  // rows of a tile whose softmax is computed together

// R tiles of rows against a segment. `score(place, to)` writes the products of the rows with the 32 keys from `place` on to `to`
// (rows, 32), and `finish(r, place, total)` makes scores of those of the kSoftRows rows from r on. The next products are begun
// before the softmax of the last, so that both units work. Keys and values are read by 32: a group past the end of the segment has
// to be there, and its values must be finite, for they are multiplied by zeros.
template <int R, class Score, class Finish>
inline void attend_tiles(Score&& score, Finish&& finish, const float* values, int64_t groups, int64_t dim, float scale,
                         const int64_t* first, const int64_t* last, int64_t at, const State& state, const Scratch& scratch) {
  constexpr int64_t rows = R * kTile;
  const int64_t width = (groups + 1) / 2 * kPair;
  float *scores = scratch.scores, *shares = scratch.shares;
  score(0, scores);
  for (int64_t place = 0; place < width; place += kPair) {
    float* here = scores + place / kPair % 2 * rows * kPair;
    if (place + kPair < width) score(place + kPair, scores + (place / kPair + 1) % 2 * rows * kPair);
    for (int64_t r = 0; r < rows; r += kSoftRows) {
      Vec total[kSoftRows][2];
#pragma GCC unroll 8
      for (int m = 0; m < kSoftRows; ++m) {
        total[m][0] = load(here + (r + m) * kPair);
        total[m][1] = load(here + (r + m) * kPair + kLanes);
      }
      finish(r, place, total);
      weigh<true, kSoftRows, 2>(total, place, scale, first + r, last + r, dim, at + r, state, scratch.exponents,
                                shares + r * width / 2, width);
    }
  }
  const auto* left = reinterpret_cast<const char*>(shares);
  int64_t column = 0;
  for (; column + kPair <= dim; column += kPair)
    multiply_tiles<false, R, 2, true>(left, 2 * width, values + column, dim, kTile, width / 2, state.sums + at * dim + column, dim);
  if (column < dim)
    multiply_tiles<false, R, 1, true>(left, 2 * width, values + column, dim, kTile, width / 2, state.sums + at * dim + column, dim);
}
#endif

// M rows of float or bfloat16 words `q` against a segment of packed keys: word w of key i lies at keys[i / kLanes * group_stride +
// w * word_stride + i % kLanes]. M of 16 and 32 are for tiles.
template <bool Half, int M>
void attend(const char* q, int64_t q_bytes, const float* keys, int64_t word_stride, int64_t group_stride, const float* values,
            int64_t groups, int64_t words, int64_t dim, float scale, const int64_t* first, const int64_t* last,
            int64_t at, const State& state, const Scratch& scratch) {
#ifdef ASSAY_AMX
  if constexpr (Half && M >= kTile) {
    const auto score = [&](int64_t place, float* to) {
      multiply_tiles<false, M / kTile, 2>(q, q_bytes, keys + place / kLanes * group_stride, word_stride, group_stride, words, to, kPair);
    };
    attend_tiles<M / kTile>(score, [](auto&&...) {}, values, groups, dim, scale, first, last, at, state, scratch);
    return;
  }
#endif
  if constexpr (M < kTile) {
    const auto score = [&](auto& total, int64_t place) __attribute__((always_inline)) {
      constexpr int N = std::extent_v<std::remove_reference_t<decltype(total)>, 1>;
      multiply<Half, M, N>(total, q, q_bytes, keys + place / kLanes * group_stride, word_stride, group_stride, words);
    };
    attend_scores<Half, M>(score, values, groups, dim, scale, first, last, at, state, scratch);
  }
}

}  // namespace
