// Decoding of llama-family models with packed weights, many tokens in one call, and the packed linear layer itself.
//
// A matrix (out, in) is stored as panels of 32 outputs, each panel one contiguous stream that a core reads once per step:
//   fp32  [in][32] float
//   bf16  [in/2][32][2] bfloat16
//   int8  [in/32] blocks of { [8 quads][2 halves][16 outputs][4] uint8 = code + 128, [32] fp16 scale }
//   int4  [in/32] blocks of { [8 quads][16 outputs][4] uint8, low nibble = output o, high nibble = output o + 16,
//                             [32] fp16 scale, [32] fp16 minimum }
// (a quad is four consecutive inputs: what one lane of a byte dot product takes). weight_only.py packs them.
// For the integer kinds the inputs of a product are quantised on the fly to int8 with one scale per 32 values; for bf16 they
// are split in a high and a low bfloat16 half, so that only the weights are rounded.
//
// One decode call is one OpenMP parallel region: the threads meet at spin barriers between the phases of a layer.
// Vectors of 16 floats are written with GCC's vector extension, which compiles for any instruction set; only the dot products
// and the fp16 conversion use AVX-512 intrinsics, with plain loops beside them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <omp.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

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

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
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

// ---- threads ---------------------------------------------------------------------------------------------------------------

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 2000) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Range {
  int64_t begin, end;
};
Range share(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// ---- choosing a token --------------------------------------------------------------------------------------------------------

// Temperature, then top-k, then top-p, as transformers orders them; of what is left, the token where the cumulative
// probability in index order passes u (0 <= u < 1). top_k 0 and top_p 1 mean off.
int64_t draw(const float* logits, int64_t n, double temperature, int64_t top_k, double top_p, double u) {
  float cut = -std::numeric_limits<float>::infinity();
  std::vector<float> best;
  if (top_k > 0 && top_k < n) {
    best.resize(top_k);
    std::partial_sort_copy(logits, logits + n, best.begin(), best.end(), std::greater<float>());
    cut = best.back();
  }
  const float top = best.empty() ? *std::max_element(logits, logits + n) : best.front();
  const v16f inverse = splat(static_cast<float>(1.0 / temperature));
  std::vector<int32_t> index;
  std::vector<float> weight;
  if (cut > -std::numeric_limits<float>::infinity()) {
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] >= cut) index.push_back(static_cast<int32_t>(i)), weight.push_back(logits[i]);
  } else {
    weight.assign(logits, logits + n);
  }
  const int64_t kept = weight.size();
  weight.resize((kept + 15) / 16 * 16, -std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < weight.size(); i += 16)
    store(&weight[i], vexp((load<v16f>(&weight[i]) - splat(top)) * inverse));
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) total += weight[i];
  if (top_p < 1.0) {
    float smallest = 0;
    for (int64_t m = std::min<int64_t>(kept, 64);; m = std::min<int64_t>(kept, m * 16)) {
      best.resize(m);
      std::partial_sort_copy(weight.begin(), weight.begin() + kept, best.begin(), best.end(), std::greater<float>());
      double before = 0;
      int64_t i = 0;
      for (; i < m && (i == 0 || before < top_p * total); ++i) before += best[i];
      smallest = best[i - 1];
      if (i < m || m == kept) break;
    }
    total = 0;
    for (int64_t i = 0; i < kept; ++i) {
      if (weight[i] < smallest) weight[i] = 0;
      total += weight[i];
    }
  }
  double left = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < kept; ++i) {
    if (weight[i] == 0) continue;
    last = i;
    left -= weight[i];
    if (left < 0) break;
  }
  return index.empty() ? last : index[last];
}

// ---- the model ---------------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t layers, hidden, inner, heads, kv_heads, head, vocab, kind, head_kind;
  float eps;
  int64_t q() const { return heads * head; }
  int64_t kv() const { return kv_heads * head; }
};

struct Choice {
  double temperature;
  int64_t top_k;
  double top_p;
};

template <typename T>
class Decoder {  // T: float or uint16_t (bfloat16), the element of the cache
 public:
  Shape shape;
  std::vector<const uint8_t*> weights;  // q k v o gate up down per layer, then the head
  const float* norms;                   // [2 * layers + 1][hidden]
  const float* bias;                    // [layers][q + 2 kv] or null
  const uint8_t* embedding;
  bool embedding_bf16;
  const float* frequencies;  // [head / 2]
  float rope_scale;
  T *keys, *values;  // [layers][slots][kv_heads][blocks][head][16] and [layers][slots][kv_heads][blocks * 16][head]
  int64_t slots, blocks;
  int64_t* lengths;            // [slots]
  std::vector<int64_t> slot;   // of each row
  std::vector<int64_t> token;  // that each row feeds next
  std::vector<int64_t> eos;
  int64_t forbid;              // steps at the start in which no row may end
  bool sample;
  Choice choice;
  const double* uniforms;  // [rows][steps]
  int64_t* out;            // [rows][steps], -1 where nothing was produced
  float* logits;           // [rows][vocab] of the last step, or null
  int64_t steps;

  void run() {
    const int64_t rows = slot.size();
    const int64_t tasks = std::max<int64_t>(panels_of(shape.vocab), 1);
    const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), tasks));
    x_ = Buffer_(rows * shape.hidden);
    qkv_ = Buffer_(rows * (shape.q() + 2 * shape.kv()));
    angles_ = Buffer_(rows * shape.head);
    if (sample && !logits) own_logits_ = Buffer_(rows * shape.vocab), scores_ = own_logits_.data;
    if (logits) scores_ = logits;
    active_.resize(rows);
    for (int64_t i = 0; i < rows; ++i) active_[i] = i;
    setup(rows, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier_ = std::make_unique<Barrier>(omp_get_num_threads());
      worker(omp_get_thread_num(), omp_get_num_threads());
    }
    TORCH_CHECK_VALUE(!failed_.load(), "the logits are not finite: the weights or the cache hold NaN");
  }

 private:
  struct Buffer_ : Buffer<float> {
    explicit Buffer_(int64_t n = 0) : Buffer<float>(n) {}
    Buffer_& operator=(Buffer_&& o) noexcept {
      std::swap(data, o.data);
      return *this;
    }
  };
  Buffer_ x_, qkv_, angles_, partial_, own_logits_;
  float* scores_ = nullptr;
  std::vector<int64_t> active_;  // rows still running, in order
  std::vector<float> best_value_;
  std::vector<int64_t> best_index_;
  std::vector<Input> shared_;  // hidden, attention output, inner, hidden for the head
  std::unique_ptr<Barrier> barrier_;
  std::atomic<bool> failed_{false};
  int64_t part_ = 0;

  struct Local {  // what each thread has to itself; with one row also its own copy of the inputs
    Buffer<float> line, tile, scratch;
    std::vector<Input> inputs;
  };
  std::vector<Local> locals_;

  void setup(int64_t rows, int threads) {
    const int64_t group = shape.heads / shape.kv_heads;
    for (int t = 0; t < threads; ++t) {
      locals_.push_back({Buffer<float>(std::max(shape.hidden, shape.q())), Buffer<float>(2 * rows * PANEL),
                         Buffer<float>(group * (shape.head + CHUNK)), {}});
      if (rows > 1) continue;
      locals_.back().inputs.emplace_back(shape.kind, 1, shape.hidden);
      locals_.back().inputs.emplace_back(shape.kind, 1, shape.q());
      locals_.back().inputs.emplace_back(shape.head_kind, 1, shape.hidden);
    }
    shared_.emplace_back(shape.kind, rows, shape.hidden);
    shared_.emplace_back(shape.kind, rows, shape.q());
    shared_.emplace_back(shape.kind, rows, shape.inner);
    shared_.emplace_back(shape.head_kind, rows, shape.hidden);
    part_ = group * (shape.head + 2);  // running maximum, sum and output of the heads of a group
    part_ = (part_ + 15) / 16 * 16;
    partial_ = Buffer_(rows * shape.kv_heads * threads * part_);
    best_value_.resize(rows * threads);
    best_index_.resize(rows * threads);
  }

  const uint8_t* weight(int64_t layer, int64_t which) const { return weights[layer * 7 + which]; }

  // A few kilobytes of what a core reads next, asked for before it waits at a barrier.
  static void warm(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < std::min<int64_t>(bytes, 4096); i += 64) __builtin_prefetch(p + i, 0, 2);
  }

  void worker(int t, int threads) {
    const int64_t rows = slot.size(), H = shape.hidden;
    // With one row every thread prepares the inputs of a product for itself: that is cheaper than meeting once more.
    const bool alone = rows == 1;
    Local& local = locals_[t];
    Input& hidden = alone ? local.inputs[0] : shared_[0];
    Input& attended = alone ? local.inputs[1] : shared_[1];
    Input& inner = shared_[2];
    Input& last = alone ? local.inputs[2] : shared_[3];
    float *line = local.line, *tile = local.tile, *scratch = local.scratch;

    for (int64_t step = 0; step < steps && !active_.empty() && !failed_.load(std::memory_order_relaxed); ++step) {
      const int64_t n = active_.size();
      const Range mine = alone ? Range{0, 1} : share(n, t, threads);
      const Range embed = share(n, t, threads);
      for (int64_t i = embed.begin; i < embed.end; ++i) start_row(active_[i], x_ + i * H, angles_ + i * shape.head);
      barrier_->wait();

      for (int64_t layer = 0; layer < shape.layers; ++layer) {
        for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + 2 * layer * H, line, hidden, i);
        if (!alone) barrier_->wait();
        project_qkv(layer, t, threads, hidden, n, tile);
        barrier_->wait();
        attend(layer, t, threads, n, scratch);
        const int64_t o_bytes = panel_bytes(shape.kind, shape.q());
        warm(weight(layer, 3) + share(panels_of(H), t, threads).begin * o_bytes, o_bytes);
        barrier_->wait();
        for (int64_t i = mine.begin; i < mine.end; ++i) merge(i, n, threads, line, attended);
        if (!alone) barrier_->wait();
        project_add(weight(layer, 3), t, threads, attended, n, tile);
        barrier_->wait();
        for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + (2 * layer + 1) * H, line, hidden, i);
        if (!alone) barrier_->wait();
        gate_up(layer, t, threads, hidden, inner, n, tile);
        barrier_->wait();
        project_add(weight(layer, 6), t, threads, inner, n, tile);
        barrier_->wait();
      }

      for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + 2 * shape.layers * H, line, last, i);
      if (!alone) barrier_->wait();
      head(t, threads, last, n, step < forbid, tile);
      barrier_->wait();
      const Range pick = share(n, t, threads);
      for (int64_t i = pick.begin; i < pick.end; ++i) select(i, step, threads);
      barrier_->wait();
#pragma omp master
      {
        std::vector<int64_t> going;
        for (const int64_t row : active_)
          if (std::find(eos.begin(), eos.end(), token[row]) == eos.end()) going.push_back(row);
        active_ = std::move(going);
      }
      barrier_->wait();
    }
  }

  void start_row(int64_t row, float* x, float* angle) {
    const int64_t H = shape.hidden, half = shape.head / 2;
    if (embedding_bf16) {
      const uint16_t* e = reinterpret_cast<const uint16_t*>(embedding) + token[row] * H;
      for (int64_t i = 0; i < H; ++i) x[i] = of_bf16(e[i]);
    } else {
      std::memcpy(x, reinterpret_cast<const float*>(embedding) + token[row] * H, H * sizeof(float));
    }
    const float position = static_cast<float>(lengths[slot[row]]);
    for (int64_t i = 0; i < half; ++i) {
      const double a = position * frequencies[i];
      angle[i] = static_cast<float>(std::cos(a)) * rope_scale;
      angle[half + i] = static_cast<float>(std::sin(a)) * rope_scale;
    }
  }

  void norm(const float* x, const float* gain, float* line, Input& in, int64_t row) {
    const int64_t H = shape.hidden, whole = H / 16 * 16;
    v16f squares = {};
    for (int64_t i = 0; i < whole; i += 16) {
      const v16f v = load<v16f>(x + i);
      squares += v * v;
    }
    float sum = hsum(squares);
    for (int64_t i = whole; i < H; ++i) sum += x[i] * x[i];
    const float r = 1.0f / std::sqrt(sum / static_cast<float>(H) + shape.eps);
    for (int64_t i = 0; i < H; ++i) line[i] = x[i] * r * gain[i];
    in.set(row, 0, H, line);
  }

  void project_qkv(int64_t layer, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t outputs[3] = {shape.q(), shape.kv(), shape.kv()}, ld = shape.q() + 2 * shape.kv();
    const int64_t bytes = panel_bytes(shape.kind, shape.hidden);
    const int64_t pq = panels_of(shape.q()), pk = panels_of(shape.kv());
    const Range mine = share(pq + 2 * pk, t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t which = p < pq ? 0 : p < pq + pk ? 1 : 2;
      const int64_t local = p - (which == 0 ? 0 : which == 1 ? pq : pq + pk);
      const int64_t column = (which == 0 ? 0 : which == 1 ? shape.q() : shape.q() + shape.kv()) + local * PANEL;
      const int64_t count = std::min(PANEL, outputs[which] - local * PANEL);
      panel(weight(layer, which) + local * bytes, in, n, tile);
      for (int64_t i = 0; i < n; ++i) {
        float* y = qkv_ + i * ld + column;
        for (int64_t o = 0; o < count; ++o) y[o] = tile[i * PANEL + o];
        if (bias)
          for (int64_t o = 0; o < count; ++o) y[o] += bias[layer * ld + column + o];
      }
    }
  }

  void project_add(const uint8_t* w, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t H = shape.hidden, bytes = panel_bytes(shape.kind, in.width);
    const Range mine = share(panels_of(H), t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(w + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, H - p * PANEL);
      for (int64_t i = 0; i < n; ++i) {
        float* y = x_ + i * H + p * PANEL;
        for (int64_t o = 0; o < count; ++o) y[o] += tile[i * PANEL + o];
      }
    }
  }

  void gate_up(int64_t layer, int t, int threads, const Input& in, Input& inner, int64_t n, float* tile) {
    const int64_t bytes = panel_bytes(shape.kind, shape.hidden);
    const Range mine = share(panels_of(shape.inner), t, threads);
    float* up = tile + n * PANEL;
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(weight(layer, 4) + p * bytes, in, n, tile);
      panel(weight(layer, 5) + p * bytes, in, n, up);
      const int64_t count = std::min(PANEL, shape.inner - p * PANEL);
      for (int64_t i = 0; i < n; ++i) {
        float *g = tile + i * PANEL, *u = up + i * PANEL;
        for (int o = 0; o < PANEL; o += 16) {
          const v16f v = load<v16f>(g + o);
          // silu, written so that neither side overflows
          const v16f positive = v > v16f{} ? v : -v;
          const v16f e = vexp(-positive);
          const v16f sigmoid = (v > v16f{} ? splat(1.0f) : e) / (splat(1.0f) + e);
          store(g + o, v * sigmoid * load<v16f>(u + o));
        }
        inner.set(i, p * PANEL, count, g);
      }
    }
  }

  // -- attention: the positions of all (row, kv head) pairs lie in one line of blocks of 16, cut evenly between the threads

  static constexpr int64_t CHUNK = 256;

  int64_t blocks_of(int64_t i) const { return lengths[slot[active_[i]]] / 16 + 1; }  // with the new position

  void attend(int64_t layer, int t, int threads, int64_t n, float* scratch) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += blocks_of(i) * shape.kv_heads;
    const Range mine = share(total, t, threads);
    int64_t at = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t count = blocks_of(i);
      for (int64_t h = 0; h < shape.kv_heads; ++h, at += count) {
        float* part = partial_ + ((i * shape.kv_heads + h) * threads + t) * part_;
        const int64_t begin = std::max<int64_t>(mine.begin - at, 0), end = std::min<int64_t>(mine.end - at, count);
        if (begin < end)
          attend_head(layer, i, h, begin, end, end == count, part, scratch);
        else
          std::fill_n(part, shape.heads / shape.kv_heads, -std::numeric_limits<float>::infinity());
      }
    }
  }

  void rotate(const float* from, const float* angle, float scale, float* to) const {
    const int64_t half = shape.head / 2;
    for (int64_t d = 0; d < half; ++d) {
      to[d] = (from[d] * angle[d] - from[half + d] * angle[half + d]) * scale;
      to[half + d] = (from[half + d] * angle[d] + from[d] * angle[half + d]) * scale;
    }
  }

  template <int R>
  static void scores(const T* k, const float* q, int64_t head, float* s) {  // one block of 16 positions, R heads
    v16f even[R] = {}, odd[R] = {};
    for (int64_t d = 0; d < head; d += 2) {
      const v16f k0 = load_values(k + d * 16), k1 = load_values(k + d * 16 + 16);
      for (int r = 0; r < R; ++r) {
        even[r] += k0 * splat(q[r * head + d]);
        odd[r] += k1 * splat(q[r * head + d + 1]);
      }
    }
    for (int r = 0; r < R; ++r) store(s + r * CHUNK, even[r] + odd[r]);
  }

  template <int R, int V>
  static void add_values(const T* v, const float* p, int64_t count, int64_t head, float* out) {  // V vectors of 16 of R heads
    v16f a[R][V];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) a[r][j] = load<v16f>(out + r * head + 16 * j);
    for (int64_t i = 0; i < count; ++i) {
      v16f x[V];
      for (int j = 0; j < V; ++j) x[j] = load_values(v + i * head + 16 * j);
      for (int r = 0; r < R; ++r) {
        const v16f w = splat(p[r * CHUNK + i]);
        for (int j = 0; j < V; ++j) a[r][j] += w * x[j];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) store(out + r * head + 16 * j, a[r][j]);
  }

  template <int R>
  void heads(const T* k, const T* v, int64_t first, int64_t count, const float* q, float* s, float* m, float* l, float* out) {
    const int64_t D = shape.head, padded = (count + 15) / 16 * 16;
    for (int64_t b = 0; b < padded; b += 16) {
      const char* later_keys = reinterpret_cast<const char*>(k + (first + b + 32) * D);
      const char* these_values = reinterpret_cast<const char*>(v + (first + b) * D);
      for (int64_t i = 0; i < 16 * D * static_cast<int64_t>(sizeof(T)); i += 64) {
        __builtin_prefetch(later_keys + i);
        __builtin_prefetch(these_values + i);
      }
      scores<R>(k + (first + b) * D, q, D, s + b);
    }
    for (int r = 0; r < R; ++r) {
      float* p = s + r * CHUNK;
      for (int64_t i = count; i < padded; ++i) p[i] = -std::numeric_limits<float>::infinity();
      v16f top = splat(m[r]);
      for (int64_t b = 0; b < padded; b += 16) top = vmax(top, load<v16f>(p + b));
      const float largest = hmax(top), fade = m[r] == largest ? 1.0f : std::exp(m[r] - largest);
      v16f sum = {};
      for (int64_t b = 0; b < padded; b += 16) {
        const v16f e = vexp(load<v16f>(p + b) - splat(largest));
        store(p + b, e);
        sum += e;
      }
      m[r] = largest;
      l[r] = l[r] * fade + hsum(sum);
      if (fade != 1.0f)
        for (int64_t d = 0; d < D; ++d) out[r * D + d] *= fade;
    }
    int64_t d = 0;
    for (; d + 64 <= D; d += 64) add_values<R, 4>(v + first * D + d, s, count, D, out + d);
    for (; d < D; d += 16) add_values<R, 1>(v + first * D + d, s, count, D, out + d);
  }

  void attend_head(int64_t layer, int64_t i, int64_t h, int64_t begin, int64_t end, bool newest, float* part, float* scratch) {
    const int64_t D = shape.head, group = shape.heads / shape.kv_heads, s = slot[active_[i]], position = lengths[s];
    const float *angle = angles_ + i * D, *qkv = qkv_ + i * (shape.q() + 2 * shape.kv());
    T* k = keys + ((layer * slots + s) * shape.kv_heads + h) * blocks * 16 * D;
    T* v = values + ((layer * slots + s) * shape.kv_heads + h) * blocks * 16 * D;
    float *q = scratch, *score = scratch + group * D;
    float *m = part, *l = part + group, *out = part + 2 * group;
    if (newest) {
      rotate(qkv + shape.q() + h * D, angle, 1.0f, q);
      T* column = k + position / 16 * 16 * D + position % 16;
      for (int64_t d = 0; d < D; ++d) put(column + d * 16, q[d]);
      const float* value = qkv + shape.q() + shape.kv() + h * D;
      for (int64_t d = 0; d < D; ++d) put(v + position * D + d, value[d]);
    }
    const float scaling = 1.0f / std::sqrt(static_cast<float>(D));
    for (int64_t r = 0; r < group; ++r) {
      rotate(qkv + (h * group + r) * D, angle, scaling, q + r * D);
      m[r] = -std::numeric_limits<float>::infinity();
      l[r] = 0;
    }
    std::memset(out, 0, group * D * sizeof(float));
    const int64_t stop = std::min(end * 16, position + 1);
    for (int64_t first = begin * 16; first < stop; first += CHUNK) {
      const int64_t count = std::min(CHUNK, stop - first);
      int64_t r = 0;
      for (; r + 3 <= group; r += 3) heads<3>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
      if (group - r == 2) heads<2>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
      if (group - r == 1) heads<1>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
    }
  }

  void merge(int64_t i, int64_t, int threads, float* line, Input& in) {
    const int64_t D = shape.head, group = shape.heads / shape.kv_heads;
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const float* parts = partial_ + (i * shape.kv_heads + h) * threads * part_;
      for (int64_t r = 0; r < group; ++r) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int t = 0; t < threads; ++t) largest = std::max(largest, parts[t * part_ + r]);
        float* to = line + (h * group + r) * D;
        std::memset(to, 0, D * sizeof(float));
        for (int t = 0; t < threads; ++t) {
          const float* part = parts + t * part_;
          if (part[r] == -std::numeric_limits<float>::infinity()) continue;
          const float w = std::exp(part[r] - largest);
          total += w * part[group + r];
          for (int64_t d = 0; d < D; ++d) to[d] += w * part[2 * group + r * D + d];
        }
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < D; ++d) to[d] *= inverse;
      }
    }
    in.set(i, 0, shape.q(), line);
  }

  void head(int t, int threads, const Input& in, int64_t n, bool no_end, float* tile) {
    const int64_t bytes = panel_bytes(shape.head_kind, shape.hidden);
    const Range mine = share(panels_of(shape.vocab), t, threads);
    float* value = best_value_.data() + t * n;
    int64_t* index = best_index_.data() + t * n;
    for (int64_t i = 0; i < n; ++i) value[i] = -std::numeric_limits<float>::infinity(), index[i] = -1;
    const uint8_t* w = weights.back();
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(w + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, shape.vocab - p * PANEL);
      for (const int64_t e : eos)
        if (no_end && e / PANEL == p)
          for (int64_t i = 0; i < n; ++i) tile[i * PANEL + e % PANEL] = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < n; ++i) {
        const float* y = tile + i * PANEL;
        if (scores_) std::memcpy(scores_ + active_[i] * shape.vocab + p * PANEL, y, count * sizeof(float));
        if (count == PANEL && !(hmax(vmax(load<v16f>(y), load<v16f>(y + 16))) > value[i])) continue;
        for (int64_t o = 0; o < count; ++o)
          if (y[o] > value[i]) value[i] = y[o], index[i] = p * PANEL + o;
      }
    }
  }

  void select(int64_t i, int64_t step, int threads) {
    const int64_t n = active_.size(), row = active_[i];
    float value = -std::numeric_limits<float>::infinity();
    int64_t index = -1;
    for (int t = 0; t < threads; ++t)
      if (best_value_[t * n + i] > value) value = best_value_[t * n + i], index = best_index_[t * n + i];
    if (index < 0 || !std::isfinite(value)) {
      failed_.store(true);
      index = 0;
    } else if (sample) {
      index = draw(scores_ + row * shape.vocab, shape.vocab, choice.temperature, choice.top_k, choice.top_p,
                   uniforms[row * steps + step]);
    }
    token[row] = index;
    out[row * steps + step] = index;
    ++lengths[slot[row]];
  }
};

// ---- operators -----------------------------------------------------------------------------------------------------------------

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

template <typename T>
void decode_as(Shape& shape, at::TensorList weights, const at::Tensor& norms, const at::Tensor& bias,
               const at::Tensor& embedding, const at::Tensor& frequencies, double rope_scale, at::Tensor& keys,
               at::Tensor& values, at::Tensor& lengths, const at::Tensor& rows, const at::Tensor& tokens, int64_t steps,
               at::IntArrayRef eos, int64_t forbid, bool sample, Choice choice, const at::Tensor& uniforms, at::Tensor& out,
               at::Tensor& logits) {
  Decoder<T> d;
  d.shape = shape;
  for (const at::Tensor& w : weights) d.weights.push_back(w.const_data_ptr<uint8_t>());
  d.norms = norms.const_data_ptr<float>();
  d.bias = bias.numel() ? bias.const_data_ptr<float>() : nullptr;
  d.embedding = static_cast<const uint8_t*>(embedding.const_data_ptr());
  d.embedding_bf16 = embedding.scalar_type() == at::kBFloat16;
  d.frequencies = frequencies.const_data_ptr<float>();
  d.rope_scale = static_cast<float>(rope_scale);
  d.keys = static_cast<T*>(keys.data_ptr());
  d.values = static_cast<T*>(values.data_ptr());
  d.slots = keys.size(1);
  d.blocks = keys.size(3);
  d.lengths = lengths.data_ptr<int64_t>();
  const int64_t *r = rows.const_data_ptr<int64_t>(), *tok = tokens.const_data_ptr<int64_t>();
  d.slot.assign(r, r + rows.numel());
  d.token.assign(tok, tok + tokens.numel());
  d.eos.assign(eos.begin(), eos.end());
  d.forbid = forbid;
  d.sample = sample;
  d.choice = choice;
  d.uniforms = sample ? uniforms.const_data_ptr<double>() : nullptr;
  d.out = out.data_ptr<int64_t>();
  d.logits = logits.numel() ? logits.data_ptr<float>() : nullptr;
  d.steps = steps;
  d.run();
}

std::tuple<at::Tensor, at::Tensor> llama_decode(
    at::TensorList weights, int64_t kind, int64_t head_kind, const at::Tensor& norms, const at::Tensor& bias,
    const at::Tensor& embedding, const at::Tensor& frequencies, double rope_scale, int64_t heads, int64_t inner, double eps,
    at::Tensor keys, at::Tensor values, at::Tensor lengths, const at::Tensor& rows, const at::Tensor& tokens, int64_t steps,
    at::IntArrayRef eos, int64_t forbid, bool want_logits, bool sample, double temperature, int64_t top_k, double top_p,
    const at::Tensor& uniforms) {
  TORCH_CHECK_VALUE(keys.dim() == 6 && keys.size(5) == 16, "keys must be (layers, slots, kv heads, blocks, head, 16), got ",
                    keys.sizes());
  check(keys, "keys", keys.scalar_type(), 6);
  check(values, "values", keys.scalar_type(), 5);
  check(lengths, "lengths", at::kLong, 1);
  check(rows, "rows", at::kLong, 1);
  check(tokens, "tokens", at::kLong, 1);
  check(norms, "norms", at::kFloat, 2);
  check(embedding, "embedding", embedding.scalar_type(), 2);
  check(frequencies, "frequencies", at::kFloat, 1);
  Shape shape{keys.size(0), embedding.size(1), inner, heads, keys.size(2), keys.size(4), embedding.size(0), kind, head_kind,
              static_cast<float>(eps)};
  const int64_t capacity = keys.size(3) * 16;
  TORCH_CHECK_VALUE(keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kBFloat16,
                    "keys must be float32 or bfloat16, got ", keys.scalar_type());
  TORCH_CHECK_VALUE(embedding.scalar_type() == at::kFloat || embedding.scalar_type() == at::kBFloat16,
                    "embedding must be float32 or bfloat16, got ", embedding.scalar_type());
  TORCH_CHECK_VALUE(values.size(0) == shape.layers && values.size(1) == keys.size(1) && values.size(2) == shape.kv_heads &&
                        values.size(3) == capacity && values.size(4) == shape.head,
                    "values do not match keys: ", values.sizes(), " and ", keys.sizes());
  TORCH_CHECK_VALUE(shape.head % 16 == 0 && heads % shape.kv_heads == 0, "head size must be a multiple of 16 and heads of kv heads");
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == 7 * shape.layers + 1, "weights must be 7 per layer and the head, got ",
                    weights.size());
  const int64_t outputs[7] = {shape.q(), shape.kv(), shape.kv(), shape.hidden, inner, inner, shape.hidden};
  const int64_t widths[7] = {shape.hidden, shape.hidden, shape.hidden, shape.q(), shape.hidden, shape.hidden, inner};
  for (size_t i = 0; i + 1 < weights.size(); ++i) check_packed(weights[i], "weights", kind, outputs[i % 7], widths[i % 7]);
  check_packed(weights.back(), "head", head_kind, shape.vocab, shape.hidden);
  TORCH_CHECK_VALUE(norms.size(0) == 2 * shape.layers + 1 && norms.size(1) == shape.hidden, "norms: got ", norms.sizes());
  TORCH_CHECK_VALUE(frequencies.numel() == shape.head / 2, "frequencies: got ", frequencies.sizes());
  TORCH_CHECK_VALUE(bias.numel() == 0 || bias.numel() == shape.layers * (shape.q() + 2 * shape.kv()), "bias: got ", bias.sizes());
  if (bias.numel()) check(bias, "bias", at::kFloat, 2);
  const int64_t n = rows.numel();
  TORCH_CHECK_VALUE(n > 0 && tokens.numel() == n, "tokens must have one entry per row, got ", tokens.numel(), " for ", n);
  TORCH_CHECK_VALUE(steps > 0, "steps must be positive, got ", steps);
  std::vector<bool> seen(keys.size(1));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows.const_data_ptr<int64_t>()[i], token = tokens.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(row >= 0 && row < keys.size(1) && row < lengths.numel() && !seen[row],
                      "rows must name different slots of the cache, got ", row);
    seen[row] = true;
    TORCH_CHECK_VALUE(token >= 0 && token < shape.vocab, "tokens must lie in 0..", shape.vocab - 1, ", got ", token);
    const int64_t length = lengths.const_data_ptr<int64_t>()[row];
    TORCH_CHECK_VALUE(length >= 0 && length + steps <= capacity, "the cache holds ", capacity, " positions, not ",
                      length + steps);
  }
  if (sample) {
    check(uniforms, "uniforms", at::kDouble, 2);
    TORCH_CHECK_VALUE(uniforms.size(0) == n && uniforms.size(1) == steps, "uniforms must be (rows, steps), got ", uniforms.sizes());
    TORCH_CHECK_VALUE(temperature > 0 && top_k >= 0 && top_p > 0, "temperature and top_p must be positive, top_k not negative");
  }
  at::Tensor out = at::full({n, steps}, -1, lengths.options());
  at::Tensor logits = at::empty({want_logits ? n : 0, shape.vocab}, norms.options());
  const Choice choice{temperature, top_k, top_p};
  if (keys.scalar_type() == at::kBFloat16)
    decode_as<uint16_t>(shape, weights, norms, bias, embedding, frequencies, rope_scale, keys, values, lengths, rows, tokens, steps,
                        eos, forbid, sample, choice, uniforms, out, logits);
  else
    decode_as<float>(shape, weights, norms, bias, embedding, frequencies, rope_scale, keys, values, lengths, rows, tokens, steps,
                     eos, forbid, sample, choice, uniforms, out, logits);
  return {out, logits};
}

at::Tensor draw_tokens(const at::Tensor& logits, double temperature, int64_t top_k, double top_p, const at::Tensor& uniforms) {
  check(logits, "logits", at::kFloat, 2);
  check(uniforms, "uniforms", at::kDouble, 1);
  TORCH_CHECK_VALUE(uniforms.numel() == logits.size(0), "uniforms must have one entry per row, got ", uniforms.sizes());
  at::Tensor out = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  for (int64_t i = 0; i < logits.size(0); ++i)
    out.data_ptr<int64_t>()[i] = draw(logits.const_data_ptr<float>() + i * logits.size(1), logits.size(1), temperature, top_k,
                                      top_p, uniforms.const_data_ptr<double>()[i]);
  return out;
}

at::Tensor weight_only_linear(const at::Tensor& x, const at::Tensor& packed, int64_t kind, int64_t outputs) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
                    "x must be a (rows, in) CPU tensor of float32 or bfloat16, got ", x.sizes(), " ", x.scalar_type());
  const at::Tensor input = x.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  check_packed(packed, "packed", kind, outputs, K);
  at::Tensor out = at::empty({M, outputs}, x.options());
  if (M == 0) return out;
  const bool half = x.scalar_type() == at::kBFloat16;
  const int64_t ROWS = std::min<int64_t>(M, 64), chunks = (M + ROWS - 1) / ROWS, bytes = panel_bytes(kind, K);
  std::vector<Input> inputs;
  for (int64_t c = 0; c < chunks; ++c) inputs.emplace_back(kind, std::min(ROWS, M - c * ROWS), K);
  const uint8_t* w = packed.const_data_ptr<uint8_t>();
  const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), panels_of(outputs)));
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num(), all = omp_get_num_threads();
    Buffer<float> line(K), tile(ROWS * PANEL);
    const Range rows = share(M, t, all);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const float* from = static_cast<const float*>(input.const_data_ptr()) + (half ? 0 : i * K);
      if (half) {
        const uint16_t* h = static_cast<const uint16_t*>(input.const_data_ptr()) + i * K;
        for (int64_t k = 0; k < K; ++k) line[k] = of_bf16(h[k]);
        from = line;
      }
      inputs[i / ROWS].set(i % ROWS, 0, K, from);
    }
#pragma omp barrier
    const Range mine = share(panels_of(outputs), t, all);
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        const int64_t n = inputs[c].rows, count = std::min(PANEL, outputs - p * PANEL);
        panel(w + p * bytes, inputs[c], n, tile);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = (c * ROWS + i) * outputs + p * PANEL;
          if (half) {
            uint16_t* y = static_cast<uint16_t*>(out.data_ptr()) + at;
            for (int64_t o = 0; o < count; ++o) y[o] = to_bf16(tile[i * PANEL + o]);
          } else {
            std::memcpy(static_cast<float*>(out.data_ptr()) + at, tile + i * PANEL, count * sizeof(float));
          }
        }
      }
  }
  return out;
}

// ---- quantisation: the search of weight_only.quantize_groups ------------------------------------------------------------------

struct Fitted {
  float scale = 0, minimum = 0, error = std::numeric_limits<float>::infinity();
};

class GroupSearch {
 public:
  GroupSearch(const float* w, int64_t n, int bits, bool asymmetric)
      : w_(w), n_(n), levels_((1 << bits) - 1), half_(1 << (bits - 1)), asymmetric_(asymmetric) {}

  Fitted best;

  void run() {
    float low = w_[0], high = w_[0], power = 0;
    bool rounded = true;  // to bfloat16: then nothing lies on a grid exactly, and a small error says that the grid is found
    for (int64_t i = 0; i < n_; ++i) {
      low = std::min(low, w_[i]), high = std::max(high, w_[i]), power += w_[i] * w_[i];
      rounded = rounded && of_bf16(to_bf16(w_[i])) == w_[i];
    }
    if (asymmetric_) {
      refine((high - low) / levels_, low);
    } else {
      const float extreme = high > -low ? high : low;
      refine(std::abs(extreme) / (half_ - 1), 0);
      refine(-extreme / half_, 0);
    }
    if (half_ > 64 || best.error <= (rounded ? 1e-5f : 1e-12f) * power) return;
    for (const float f : {0.95f, 0.9f, 0.85f, 0.8f, 0.75f}) {
      if (asymmetric_)
        refine((high - low) * f / levels_, low + (high - low) * (1 - f) / 2);
      else if (f > 0.75f)
        refine(std::max(high, -low) * f / (half_ - 1), 0);
    }
    if (!asymmetric_) return;
    std::vector<float> sorted(w_, w_ + n_);
    std::sort(sorted.begin(), sorted.end());
    if (std::unique(sorted.begin(), sorted.end()) - sorted.begin() <= levels_)
      for (int steps = 1; steps < levels_; ++steps)  // perhaps a grid of which not all codes are used
        for (int first = 0; first <= levels_ - steps; ++first) refine((high - low) / steps, low - (high - low) / steps * first);
  }

  void codes(uint8_t* out) const {
    const float inverse = best.scale == 0 ? 0 : 1 / best.scale;
    for (int64_t i = 0; i < n_; ++i) out[i] = static_cast<uint8_t>(code((w_[i] - best.minimum) * inverse));
  }

 private:
  const float* w_;
  const int64_t n_;
  const int levels_, half_;
  const bool asymmetric_;
  float mean_code_ = 0, slope_ = 0, mean_ = 0, spread_ = 0;

  float code(float steps) const {
    const float rounded = (steps + 12582912.0f) - 12582912.0f;
    return std::min(std::max(rounded, 0.0f), static_cast<float>(levels_));
  }

  static float half_precision(float x) { return c10::detail::fp16_ieee_to_fp32_value(c10::detail::fp16_ieee_from_fp32_value(x)); }

  void refine(float scale, float minimum) {
    consider(scale, minimum);
    if (asymmetric_)
      consider(spread_ > 0 ? slope_ : 0, spread_ > 0 ? mean_ - slope_ * mean_code_ : mean_);
    else
      consider(spread_ > 0 ? slope_ : 0, 0);
  }

  // Takes (scale, minimum), rounded to fp16, if its error is the smallest so far; leaves the least-squares refit of its codes.
  void consider(float scale, float minimum) {
    scale = half_precision(scale);
    minimum = asymmetric_ ? half_precision(minimum) : -half_ * scale;
    const float inverse = scale == 0 ? 0 : 1 / scale, shift = asymmetric_ ? 0 : static_cast<float>(half_);
    v16f c1 = {}, c2 = {}, w1 = {}, cw = {}, e2 = {};
    for (int64_t i = 0; i < n_; i += 16) {
      const v16f w = load<v16f>(w_ + i);
      v16f c = round_even((w - splat(minimum)) * splat(inverse));
      c = vmax(c, v16f{});
      c = c < splat(static_cast<float>(levels_)) ? c : splat(static_cast<float>(levels_));
      const v16f e = c * splat(scale) + splat(minimum) - w, s = c - splat(shift);
      e2 += e * e, c1 += s, c2 += s * s, w1 += w, cw += s * w;
    }
    const float n = static_cast<float>(n_), error = hsum(e2), sc = hsum(c1), sw = hsum(w1);
    if (error < best.error) best = {scale, minimum, error};
    mean_code_ = sc / n, mean_ = sw / n;
    spread_ = asymmetric_ ? hsum(c2) - sc * mean_code_ : hsum(c2);
    slope_ = (asymmetric_ ? hsum(cw) - sc * mean_ : hsum(cw)) / std::max(spread_, 1e-30f);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_groups(const at::Tensor& weight, int64_t bits, int64_t group,
                                                               bool asymmetric) {
  check(weight, "weight", at::kFloat, 2);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, "bits must be 2 to 8, got ", bits);
  TORCH_CHECK_VALUE(group >= 16 && group % 16 == 0 && weight.size(1) % group == 0,
                    "group must be a multiple of 16 that divides the inputs, got ", group);
  const int64_t groups = weight.numel() / group;
  at::Tensor codes = at::empty(weight.sizes(), weight.options().dtype(at::kByte));
  at::Tensor scale = at::empty({weight.size(0), weight.size(1) / group}, weight.options().dtype(at::kHalf));
  at::Tensor minimum = at::empty_like(scale);
  const float* w = weight.const_data_ptr<float>();
  uint8_t* c = codes.data_ptr<uint8_t>();
  uint16_t *s = static_cast<uint16_t*>(scale.data_ptr()), *m = static_cast<uint16_t*>(minimum.data_ptr());
#pragma omp parallel for num_threads(at::get_num_threads())
  for (int64_t g = 0; g < groups; ++g) {
    GroupSearch search(w + g * group, group, static_cast<int>(bits), asymmetric);
    search.run();
    search.codes(c + g * group);
    s[g] = c10::detail::fp16_ieee_from_fp32_value(search.best.scale);
    m[g] = c10::detail::fp16_ieee_from_fp32_value(search.best.minimum);
  }
  return {codes, scale, minimum};
}

// Memory for packed weights, on large pages where the system grants them: streaming through it then misses no page table.
at::Tensor weight_memory(int64_t bytes) {
  constexpr int64_t page = int64_t{1} << 21;
  const int64_t size = (std::max<int64_t>(bytes, 1) + page - 1) / page * page;
  void* p = std::aligned_alloc(page, size);
  TORCH_CHECK(p != nullptr, "out of memory");
#if defined(MADV_HUGEPAGE)
  madvise(p, size, MADV_HUGEPAGE);
#endif
  return at::from_blob(p, {bytes}, [](void* q) { std::free(q); }, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def(
      "llama_decode(Tensor[] weights, int kind, int head_kind, Tensor norms, Tensor bias, Tensor embedding, Tensor frequencies, "
      "float rope_scale, int heads, int inner, float eps, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor rows, "
      "Tensor tokens, int steps, int[] eos, int forbid, bool want_logits, bool sample, float temperature, int top_k, float top_p, "
      "Tensor uniforms) -> (Tensor, Tensor)");
  m.def("draw_tokens(Tensor logits, float temperature, int top_k, float top_p, Tensor uniforms) -> Tensor");
  m.def("weight_only_linear(Tensor x, Tensor packed, int kind, int outputs) -> Tensor");
  m.def("quantize_groups(Tensor weight, int bits, int group, bool asymmetric) -> (Tensor, Tensor, Tensor)");
  m.def("weight_memory(int bytes) -> Tensor");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("llama_decode", llama_decode);
  m.impl("draw_tokens", draw_tokens);
  m.impl("weight_only_linear", weight_only_linear);
  m.impl("quantize_groups", quantize_groups);
}

TORCH_LIBRARY_IMPL(assay, CompositeExplicitAutograd, m) { m.impl("weight_memory", weight_memory); }
