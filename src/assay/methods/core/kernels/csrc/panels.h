// Packed weights and the product with them: what the packed linear layer (weight_only.cpp) and the decode loop share.
//
// A matrix (out, in) is stored as panels of 32 outputs, each panel one contiguous stream that a core reads once per step:
//   fp32  [in][32] float
//   bf16  [in/2][32][2] bfloat16
//   int8  [in/32] blocks of { [8 quads][2 halves][16 outputs][4] uint8 = code + 128, [32] fp16 scale }
//   int4  [in/32] blocks of { [8 quads][16 outputs][4] uint8, low nibble = output o, high nibble = output o + 16,
//                             [32] fp16 scale, [32] fp16 minimum }
// (a quad is four consecutive inputs: what one lane of a byte dot product takes). formats.py packs them.
// For the integer kinds the inputs of a product are quantised on the fly to int8 with one scale per 32 values; for bf16 they
// are split in a high and a low bfloat16 half, so that only the weights are rounded.
//
// Vectors of 16 floats are written with GCC's vector extension, which compiles for any instruction set; only the dot products
// and the fp16 conversion use AVX-512 intrinsics, with plain loops beside them.

#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "formats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ASSAY_VNNI 1
#endif

namespace {

using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int64_t FP32 = kFp32, BF16 = kBf16, INT8 = kInt8, INT4 = kInt4;
constexpr int64_t PANEL = 32, GROUP = 32;
constexpr int64_t INT8_BLOCK = 32 * 32 + 64, INT4_BLOCK = 16 * 32 + 128;

bool integer(int64_t kind) { return kind == INT8 || kind == INT4; }

int64_t panel_bytes(int64_t kind, int64_t width) {
  switch (kind) {
    case FP32: return width * PANEL * 4;
    case BF16: return width * PANEL * 2;
    case INT8: return width / GROUP * INT8_BLOCK;
    default: return width / GROUP * INT4_BLOCK;
  }
}

int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// ---- small vectors -------------------------------------------------------------------------------------------------------

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef int8_t v16b __attribute__((vector_size(16)));

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
inline v16f splat(float x) { return x - v16f{}; }

inline float hmax(v16f v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = std::max(m, v[i]);
  return m;
#endif
}

inline float hsum(v16f v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
#endif
}

inline v16f vmax(v16f a, v16f b) { return a > b ? a : b; }

inline v16f round_even(v16f v) {  // to the nearest integer, for |v| < 2^22
  const v16f magic = splat(12582912.0f);
  return (v + magic) - magic;
}

// exp for arguments <= 0 or moderate; relative error about 1e-7; below -87 it gives 0
inline v16f vexp(v16f x) {
  const v16f n = round_even(vmax(x, splat(-88.0f)) * splat(1.44269504f));
  v16f r = vmax(x, splat(-88.0f)) - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  v16f p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const v16i power = (__builtin_convertvector(n, v16i) + 127) << 23;
  const v16f y = p * (v16f)power;
  return x < splat(-87.0f) ? v16f{} : y;
}

inline v16f from_bf16(const uint16_t* p) { return (v16f)(__builtin_convertvector(load<v16h>(p), v16u) << 16); }
inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float of_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline v16f from_fp16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  v16f v;
  for (int i = 0; i < 16; ++i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    v[i] = c10::detail::fp16_ieee_to_fp32_value(h);
  }
  return v;
#endif
}

inline v16f load_values(const float* p) { return load<v16f>(p); }
inline v16f load_values(const uint16_t* p) { return from_bf16(p); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = to_bf16(x); }

template <typename T>
struct Buffer {  // aligned, uninitialised
  T* data = nullptr;
  explicit Buffer(int64_t n = 0) {
    if (n > 0) {
      data = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64));
      TORCH_CHECK(data != nullptr, "out of memory");
    }
  }
  Buffer(Buffer&& o) noexcept : data(o.data) { o.data = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  operator T*() const { return data; }
};

// ---- inputs of a product -------------------------------------------------------------------------------------------------

struct Input {  // up to `rows` vectors of `width` values, in the form that weights of `kind` want
  int64_t kind, rows, width;
  Buffer<float> x;            // FP32 [rows][width]
  Buffer<uint16_t> high, low;  // BF16 [rows][width] each
  Buffer<int8_t> code;        // INT  [width/32][rows][32]
  Buffer<float> scale, sum;   // INT  [width/32][rows]; sum = scale * sum of codes

  Input(int64_t kind, int64_t rows, int64_t width)
      : kind(kind),
        rows(rows),
        width(width),
        x(kind == FP32 ? rows * width : 0),
        high(kind == BF16 ? rows * width : 0),
        low(kind == BF16 ? rows * width : 0),
        code(integer(kind) ? rows * width : 0),
        scale(integer(kind) ? rows * (width / GROUP) : 0),
        sum(integer(kind) ? rows * (width / GROUP) : 0) {}

  void set(int64_t row, int64_t first, int64_t count, const float* values) {
    if (kind == FP32) {
      std::memcpy(x + row * width + first, values, count * sizeof(float));
    } else if (kind == BF16) {
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t h = to_bf16(values[i]);
        high[row * width + first + i] = h;
        low[row * width + first + i] = to_bf16(values[i] - of_bf16(h));
      }
    } else {
      for (int64_t i = 0; i < count; i += GROUP) set_group(row, (first + i) / GROUP, values + i);
    }
  }

  void set_group(int64_t row, int64_t group, const float* values) {
    const v16f a = load<v16f>(values), b = load<v16f>(values + 16);
    const v16i mask = v16i{} + 0x7fffffff;
    const float largest = hmax(vmax((v16f)((v16i)a & mask), (v16f)((v16i)b & mask)));
    const v16f inverse = splat(largest > 0 ? 127.0f / largest : 0.0f);
    const v16f ra = round_even(a * inverse), rb = round_even(b * inverse);
    int8_t* out = code + (group * rows + row) * GROUP;
    store(out, __builtin_convertvector(__builtin_convertvector(ra, v16i), v16b));
    store(out + 16, __builtin_convertvector(__builtin_convertvector(rb, v16i), v16b));
    const float s = largest / 127.0f;
    scale[group * rows + row] = s;
    sum[group * rows + row] = s * hsum(ra + rb);
  }
};

// ---- one panel times some inputs: tile[row][32] ----------------------------------------------------------------

template <int R>
inline void panel_fp32(const uint8_t* weight, const Input& in, int64_t row, float* tile) {
  const float* w = reinterpret_cast<const float*>(weight);
  v16f a[R][2] = {};
  for (int64_t k = 0; k < in.width; ++k) {
    const v16f w0 = load<v16f>(w + k * PANEL), w1 = load<v16f>(w + k * PANEL + 16);
    for (int r = 0; r < R; ++r) {
      const v16f x = splat(in.x[(row + r) * in.width + k]);
      a[r][0] += w0 * x;
      a[r][1] += w1 * x;
    }
  }
  for (int r = 0; r < R; ++r) {
    store(tile + (row + r) * PANEL, a[r][0]);
    store(tile + (row + r) * PANEL + 16, a[r][1]);
  }
}

template <int R>
inline void panel_bf16(const uint8_t* weight, const Input& in, int64_t row, float* tile) {
#if defined(__AVX512BF16__)
  __m512 a[R][2], b[R][2];
  for (int r = 0; r < R; ++r)
    a[r][0] = a[r][1] = b[r][0] = b[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < in.width; k += 2) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(weight + k * PANEL * 2);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(weight + k * PANEL * 2 + 64);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * in.width + k;
      const __m512bh h = (__m512bh)_mm512_set1_epi32(load<int32_t>(in.high + at));
      const __m512bh l = (__m512bh)_mm512_set1_epi32(load<int32_t>(in.low + at));
      a[r][0] = _mm512_dpbf16_ps(a[r][0], w0, h);
      a[r][1] = _mm512_dpbf16_ps(a[r][1], w1, h);
      b[r][0] = _mm512_dpbf16_ps(b[r][0], w0, l);
      b[r][1] = _mm512_dpbf16_ps(b[r][1], w1, l);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(tile + (row + r) * PANEL, _mm512_add_ps(a[r][0], b[r][0]));
    _mm512_storeu_ps(tile + (row + r) * PANEL + 16, _mm512_add_ps(a[r][1], b[r][1]));
  }
#else
  v16f a[R][2] = {};
  for (int64_t k = 0; k < in.width; k += 2) {
    const v16u p0 = load<v16u>(weight + k * PANEL * 2), p1 = load<v16u>(weight + k * PANEL * 2 + 64);
    const v16f e0 = (v16f)(p0 << 16), o0 = (v16f)(p0 & 0xffff0000u);
    const v16f e1 = (v16f)(p1 << 16), o1 = (v16f)(p1 & 0xffff0000u);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * in.width + k;
      const v16f xe = splat(of_bf16(in.high[at]) + of_bf16(in.low[at]));
      const v16f xo = splat(of_bf16(in.high[at + 1]) + of_bf16(in.low[at + 1]));
      a[r][0] += e0 * xe + o0 * xo;
      a[r][1] += e1 * xe + o1 * xo;
    }
  }
  for (int r = 0; r < R; ++r) {
    store(tile + (row + r) * PANEL, a[r][0]);
    store(tile + (row + r) * PANEL + 16, a[r][1]);
  }
#endif
}

#if defined(ASSAY_VNNI)
template <bool FOUR>
inline void unpack(const uint8_t* block, __m512i (&w)[16]) {
  if constexpr (FOUR) {
    const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i v = _mm512_loadu_si512(block + 64 * i);
      w[2 * i] = _mm512_and_si512(v, nibble);
      w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) w[i] = _mm512_loadu_si512(block + 64 * i);
  }
}

template <bool FOUR>
inline void panel_int_one(const uint8_t* weight, const Input& in, float* tile) {  // a single input, sums kept in registers
  __m512 y0 = _mm512_setzero_ps(), y1 = _mm512_setzero_ps();
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < in.width / GROUP; ++g) {
    const uint8_t* block = weight + g * (FOUR ? INT4_BLOCK : INT8_BLOCK);
    const int8_t* x = in.code + g * GROUP;
    __m512i a0 = _mm512_setzero_si512(), a1 = a0, b0 = a0, b1 = a0;
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
    __m512 d0 = _mm512_cvtepi32_ps(_mm512_add_epi32(a0, b0)), d1 = _mm512_cvtepi32_ps(_mm512_add_epi32(a1, b1));
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

constexpr int64_t AHEAD = 4;  // blocks of weights asked for before they are needed, also beyond the end of the panel

template <bool FOUR>
inline void panel_int(const uint8_t* weight, const Input& in, int64_t first, int64_t count, float* tile) {
  if (count == 1 && in.rows == 1) return panel_int_one<FOUR>(weight, in, tile);
  std::memset(tile, 0, count * PANEL * sizeof(float));
  for (int64_t g = 0; g < in.width / GROUP; ++g) {
    constexpr int64_t size = FOUR ? INT4_BLOCK : INT8_BLOCK;
    const uint8_t* block = weight + g * size;
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(block + AHEAD * size + i);
    __m512i w[16];
    unpack<FOUR>(block, w);
    const uint8_t* tail = block + (FOUR ? 512 : 1024);
    const __m512 s0 = (__m512)from_fp16(tail), s1 = (__m512)from_fp16(tail + 32);
    __m512 m0 = s0, m1 = s1;
    if constexpr (FOUR) m0 = (__m512)from_fp16(tail + 64), m1 = (__m512)from_fp16(tail + 96);
    const int8_t* x = in.code + (g * in.rows + first) * GROUP;
    const float *scales = in.scale + g * in.rows + first, *sums = in.sum + g * in.rows + first;
    for (int64_t r = 0; r < count; ++r, x += GROUP) {
      __m512i a0 = _mm512_setzero_si512(), a1 = a0;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i v = _mm512_set1_epi32(load<int32_t>(x + 4 * i));
        a0 = _mm512_dpbusd_epi32(a0, w[2 * i], v);
        a1 = _mm512_dpbusd_epi32(a1, w[2 * i + 1], v);
      }
      const __m512 scale = _mm512_set1_ps(scales[r]), sum = _mm512_set1_ps(FOUR ? sums[r] : -128.0f * sums[r]);
      const __m512 d0 = _mm512_cvtepi32_ps(a0), d1 = _mm512_cvtepi32_ps(a1);
      float* y = tile + r * PANEL;
      __m512 y0 = _mm512_loadu_ps(y), y1 = _mm512_loadu_ps(y + 16);
      if constexpr (FOUR) {
        y0 = _mm512_fmadd_ps(_mm512_mul_ps(d0, scale), s0, _mm512_fmadd_ps(m0, sum, y0));
        y1 = _mm512_fmadd_ps(_mm512_mul_ps(d1, scale), s1, _mm512_fmadd_ps(m1, sum, y1));
      } else {
        y0 = _mm512_fmadd_ps(_mm512_fmadd_ps(d0, scale, sum), s0, y0);
        y1 = _mm512_fmadd_ps(_mm512_fmadd_ps(d1, scale, sum), s1, y1);
      }
      _mm512_storeu_ps(y, y0);
      _mm512_storeu_ps(y + 16, y1);
    }
  }
}
#else
template <bool FOUR>
inline void panel_int(const uint8_t* weight, const Input& in, int64_t first, int64_t count, float* tile) {
  std::memset(tile, 0, count * PANEL * sizeof(float));
  for (int64_t g = 0; g < in.width / GROUP; ++g) {
    const uint8_t* block = weight + g * (FOUR ? INT4_BLOCK : INT8_BLOCK);
    const uint8_t* tail = block + (FOUR ? 512 : 1024);
    alignas(64) int16_t w[8][2][16][4];
    for (int q = 0; q < 8; ++q)
      for (int i = 0; i < 64; ++i) {
        w[q][0][i / 4][i % 4] = FOUR ? block[q * 64 + i] & 15 : block[q * 128 + i] - 128;
        w[q][1][i / 4][i % 4] = FOUR ? block[q * 64 + i] >> 4 : block[q * 128 + 64 + i] - 128;
      }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = g * in.rows + first + r;
      const int8_t* x = in.code + at * GROUP;
      for (int half = 0; half < 2; ++half) {
        v16i dot = {};
        for (int q = 0; q < 8; ++q) {
          int32_t part[16];
          for (int o = 0; o < 16; ++o) {
            const int16_t* c = w[q][half][o];
            part[o] = c[0] * x[4 * q] + c[1] * x[4 * q + 1] + c[2] * x[4 * q + 2] + c[3] * x[4 * q + 3];
          }
          dot += load<v16i>(part);
        }
        float* y = tile + r * PANEL + half * 16;
        v16f sum = load<v16f>(y) + __builtin_convertvector(dot, v16f) * splat(in.scale[at]) * from_fp16(tail + half * 32);
        if (FOUR) sum += from_fp16(tail + 64 + half * 32) * splat(in.sum[at]);
        store(y, sum);
      }
    }
  }
}
#endif

void panel(const uint8_t* weight, const Input& in, int64_t count, float* tile) {
  constexpr int64_t BLOCK = 64;  // rows whose sums stay in the first-level cache
  int64_t row = 0;
  switch (in.kind) {
    case INT4:
      for (; row < count; row += BLOCK) panel_int<true>(weight, in, row, std::min(BLOCK, count - row), tile + row * PANEL);
      break;
    case INT8:
      for (; row < count; row += BLOCK) panel_int<false>(weight, in, row, std::min(BLOCK, count - row), tile + row * PANEL);
      break;
    case BF16:
      for (; row + 4 <= count; row += 4) panel_bf16<4>(weight, in, row, tile);
      for (; row < count; ++row) panel_bf16<1>(weight, in, row, tile);
      break;
    default:
      for (; row + 8 <= count; row += 8) panel_fp32<8>(weight, in, row, tile);
      for (; row < count; ++row) panel_fp32<1>(weight, in, row, tile);
  }
}

struct Range {
  int64_t begin, end;
};
Range share(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// ---- what operators ask of their arguments ----------------------------------------------------------------------------------

void check(const at::Tensor& t, const char* name, at::ScalarType type, int64_t dims) {
  TORCH_CHECK_VALUE(t.scalar_type() == type && t.dim() == dims && t.is_contiguous() && t.device().is_cpu(), name,
                    " must be a contiguous CPU tensor of ", dims, " dimensions and type ", type, ", got ", t.sizes(), " ",
                    t.scalar_type());
}

void check_packed(const at::Tensor& t, const char* name, int64_t kind, int64_t outputs, int64_t width) {
  check(t, name, at::kByte, 2);
  TORCH_CHECK_VALUE(t.size(0) == panels_of(outputs) && t.size(1) == panel_bytes(kind, width), name,
                    " does not hold packed weights of ", outputs, " x ", width, ": got ", t.sizes());
}

}  // namespace
