// W8A8 linear layers on the CPU: int8 weights per output channel, int8 activations per token, one pass over memory.
//
// Rows are quantised (after an optional RMSNorm), multiplied with VNNI (u8 x s8 -> s32), scaled back and finished (bias, SiLU
// gate, rotary embedding) while they are in the cache; the int32 product never reaches memory. The weight is packed as
// (panels, k / 4, 64, 4): 64 output channels side by side, four consecutive inputs of each, zeros where it does not fill up.
// Activations are stored as value + 128, which VNNI wants unsigned; `offset` = -128 * (sum of a channel's weights) undoes it.
//
// Where the processor has AMX (tiles of 16 rows of 64 bytes, and one instruction for 16 x 16 sums over 64 inputs), many rows go
// through it. Codes and packed weights are read as they lie: 16 rows of codes are the left tile, 16 channels of 16 groups of four
// inputs the right one. Two by two of each make 32 rows x 32 channels. The sums of all whole 64 inputs go to a scratch of one
// panel in the L1 cache; the VNNI code takes them up from there, adds the inputs that are left and finishes the rows, so that
// every result has the bits it would have without AMX. Tiles are set up when a thread begins and given up when it ends, because
// oneDNN and ATen configure the same registers in the same threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <tuple>

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define ASSAY_VNNI 1
#endif

#include "amx.h"

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kPanel = 64;      // output channels computed side by side: four 512-bit registers
constexpr int64_t kTileRows = 6;    // rows computed together: 6 x 4 accumulators of the 32 registers
constexpr int64_t kBlockRows = 48;  // rows a thread carries through all panels: their activations stay in L2
constexpr int64_t kAmxRow = 16;     // rows of an AMX tile; fewer cost as much

// From how many rows on AMX pays: one more than VNNI handles in one pass over the weight. For 576 x 1536 on a Xeon with both, up
// to 3 rows VNNI was faster, 4 to 6 were within 15 %, 7 took 0.7 of its time, 16 half and 200 less than half.
constexpr int64_t kAmxMin = kTileRows + 1;
constexpr int64_t kAmxBlockRows = 128;  // as kBlockRows, with AMX: the weights are read half as often as with 64

// ---- scalars ---------------------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float load(const float* p) { return *p; }
inline float load(const at::Half* p) { return static_cast<float>(*p); }
inline float load(const at::BFloat16* p) { return bits_to_float(static_cast<uint32_t>(p->x) << 16); }

inline void store(float* p, float value) { *p = value; }
inline void store(at::Half* p, float value) { *p = static_cast<at::Half>(value); }
inline void store(at::BFloat16* p, float value) {  // round half to even; NaN stays NaN
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// exp for the SiLU gate, relative error below 1e-7 * a few; written so that the compiler vectorises it.
inline float fast_exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // the integer part of x / ln 2 sits in the low mantissa bits
  const float whole = shifted - 12582912.0f;
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * rest + 1.38888889e-3f;
  p = p * rest + 8.33333333e-3f;
  p = p * rest + 4.16666667e-2f;
  p = p * rest + 1.66666667e-1f;
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

// ---- one row to int8 -------------------------------------------------------------------------------------------------------

// The unnormalised Hadamard transform of every k / size apart: x viewed as (size, k / size), transformed down the columns.
void rotate(float* x, int64_t k, int64_t size) {
  for (int64_t half = k / 2; half >= k / size && half > 0; half /= 2)
    for (int64_t base = 0; base < k; base += 2 * half) {
      float *left = x + base, *right = x + base + half;
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float a = left[j], b = right[j];
        left[j] = a + b;
        right[j] = a - b;
      }
    }
}

// row * multiplier (after dividing by its root mean square when eps >= 0), rotated -> codes round(127 * row / max|row|) + 128;
// those that fill up to a multiple of four are left alone (the weights there are zero). Returns the scale max|row| / 127; a row
// that holds NaN or infinity gets a scale of NaN or infinity, so that its outputs are not finite either.
template <typename T>
float quantise_row(const T* row, int64_t k, const float* multiplier, float eps, int64_t rotation, float* buffer,
                   uint8_t* codes) {
  float norm = 1.0f;
  if (eps >= 0) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < k; ++i) {
      buffer[i] = load(row + i);
      squares += buffer[i] * buffer[i];
    }
    norm = 1.0f / std::sqrt(squares / static_cast<float>(k) + eps);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) buffer[i] = load(row + i);
  }
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) buffer[i] *= norm * multiplier[i];
  if (rotation > 1) rotate(buffer, k, rotation);
  int32_t largest = 0;  // of the bit patterns of |x|, which order like the numbers, with NaN above infinity
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, static_cast<int32_t>(float_to_bits(buffer[i]) & 0x7fffffffu));
  const float peak = bits_to_float(static_cast<uint32_t>(largest));
  const float inverse = 127.0f / peak;
  const float step = inverse <= std::numeric_limits<float>::max() ? inverse : 0.0f;  // a row of zeros stays one
#pragma omp simd
  for (int64_t i = 0; i < k; ++i)  // adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits
    codes[i] = static_cast<uint8_t>(float_to_bits(buffer[i] * step + 12582912.0f) + 128u);
  return peak / 127.0f;
}

// ---- the product -----------------------------------------------------------------------------------------------------------

struct Weight {
  const int8_t* packed;
  const int32_t* offset;
  const float* scale;
  const float* bias;        // null when there is none
  const float* multiplier;  // of the inputs
  float eps;                // of the RMSNorm before; negative when there is none
  int64_t rotation;         // size of the Hadamard transform of the inputs; 1 when there is none
  int64_t n, k, quads, panels;

  int64_t stride() const { return quads * 4; }  // bytes of a quantised row
};

#ifdef ASSAY_VNNI
// sum += the four u8 x s8 products of each lane. The intrinsic would do, but for it gcc 12 keeps the accumulators on the stack.
inline void dot(__m512i& sum, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}
#endif

// `Rows` rows times one panel: out[r * out_stride + 0..63] = (codes_r . weight - 128 * sum(weight)) * scales + bias.
// start[r * start_stride + 0..63] holds the offset and what the first `begin` quads of inputs add to it.
template <int Rows>
void tile(const uint8_t* codes, const float* row_scale, const Weight& w, int64_t panel, const int32_t* start,
          int64_t start_stride, int64_t begin, float* out, int64_t out_stride) {
  const int64_t stride = w.stride();
  const int8_t* b = w.packed + panel * kPanel * stride;
  const float* scale = w.scale + panel * kPanel;
  const float* bias = w.bias ? w.bias + panel * kPanel : nullptr;
#ifdef ASSAY_VNNI
  __m512i sum[Rows][4];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_loadu_si512(start + r * start_stride + 16 * j);
  for (int64_t q = begin; q < w.quads; ++q) {
    __m512i column[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) column[j] = _mm512_loadu_si512(b + 256 * q + 64 * j);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, codes + r * stride + 4 * q, 4);
      const __m512i value = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) dot(sum[r][j], value, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const __m512 row = _mm512_set1_ps(row_scale[r]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 both = _mm512_mul_ps(row, _mm512_loadu_ps(scale + 16 * j));
      const __m512 value = _mm512_cvtepi32_ps(sum[r][j]);
      const __m512 done = bias ? _mm512_fmadd_ps(value, both, _mm512_loadu_ps(bias + 16 * j)) : _mm512_mul_ps(value, both);
      _mm512_storeu_ps(out + r * out_stride + 16 * j, done);
    }
  }
#else
  for (int r = 0; r < Rows; ++r) {
    int32_t sum[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) sum[j] = start[r * start_stride + j];
    for (int64_t q = begin; q < w.quads; ++q)
      for (int64_t j = 0; j < kPanel; ++j)
        for (int64_t i = 0; i < 4; ++i) sum[j] += int32_t(codes[r * stride + 4 * q + i]) * int32_t(b[256 * q + 4 * j + i]);
    for (int64_t j = 0; j < kPanel; ++j)
      out[r * out_stride + j] = static_cast<float>(sum[j]) * (row_scale[r] * scale[j]) + (bias ? bias[j] : 0.0f);
  }
#endif
}

// Some rows times one panel.
void vnni_multiply(const uint8_t* codes, const float* row_scale, int64_t rows, const Weight& w, int64_t panel,
                   const int32_t* start, int64_t start_stride, int64_t begin, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const uint8_t* c = codes + r * w.stride();
    const float* s = row_scale + r;
    const int32_t* f = start + r * start_stride;
    float* o = out + r * out_stride;
    switch (std::min(kTileRows, rows - r)) {
      case 6: tile<6>(c, s, w, panel, f, start_stride, begin, o, out_stride); break;
      case 5: tile<5>(c, s, w, panel, f, start_stride, begin, o, out_stride); break;
      case 4: tile<4>(c, s, w, panel, f, start_stride, begin, o, out_stride); break;
      case 3: tile<3>(c, s, w, panel, f, start_stride, begin, o, out_stride); break;
      case 2: tile<2>(c, s, w, panel, f, start_stride, begin, o, out_stride); break;
      default: tile<1>(c, s, w, panel, f, start_stride, begin, o, out_stride);
    }
  }
}

bool amx_pays(int64_t rows) { return rows >= kAmxMin && tiles_allowed(); }

#ifdef ASSAY_AMX
// 16 * `Count` rows times the first 16 * `steps` groups of inputs of one panel: sums[64 * r + 0..63] = offset + codes_r . weight.
template <int Count>
void amx_sums(const uint8_t* codes, const Weight& w, int64_t panel, int64_t steps, int32_t* sums) {
  const int64_t stride = w.stride();
  asm volatile("" ::: "memory");  // gcc 12 does not know that tile loads read memory
  for (int64_t j = 0; j < kPanel; j += 32) {
    const int32_t* offset = w.offset + panel * kPanel + j;
    _tile_loadd(0, offset, 0);  // the same 16 in all rows
    _tile_loadd(1, offset + 16, 0);
    if constexpr (Count == 2) {
      _tile_loadd(2, offset, 0);
      _tile_loadd(3, offset + 16, 0);
    }
    const uint8_t* a = codes;
    const int8_t* b = w.packed + panel * kPanel * stride + 4 * j;
    for (int64_t step = 0; step < steps; ++step, a += 64, b += 64 * kPanel) {
      _tile_loadd(4, a, stride);
      _tile_loadd(6, b, 4 * kPanel);
      _tile_loadd(7, b + 64, 4 * kPanel);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      if constexpr (Count == 2) {
        _tile_loadd(5, a + kAmxRow * stride, stride);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    }
    _tile_stored(0, sums + j, 4 * kPanel);
    _tile_stored(1, sums + j + 16, 4 * kPanel);
    if constexpr (Count == 2) {
      _tile_stored(2, sums + kAmxRow * kPanel + j, 4 * kPanel);
      _tile_stored(3, sums + kAmxRow * kPanel + j + 16, 4 * kPanel);
    }
  }
}

// As many rows as pay, from the first on, times one panel; returns how many.
int64_t amx_multiply(const uint8_t* codes, const float* row_scale, int64_t rows, const Weight& w, int64_t panel, float* out,
                     int64_t out_stride) {
  const int64_t steps = w.quads / 16;
  alignas(64) int32_t sums[2 * kAmxRow * kPanel];
  int64_t r = 0;
  for (int64_t here; steps > 0 && rows - r >= kAmxMin; r += here) {
    here = std::min(2 * kAmxRow, rows - r);
    const uint8_t* c = codes + r * w.stride();
    if (here > kAmxRow)
      amx_sums<2>(c, w, panel, steps, sums);
    else
      amx_sums<1>(c, w, panel, steps, sums);
    vnni_multiply(c, row_scale + r, here, w, panel, sums, kPanel, 16 * steps, out + r * out_stride, out_stride);
  }
  return r;
}
#else
int64_t amx_multiply(const uint8_t*, const float*, int64_t, const Weight&, int64_t, float*, int64_t) { return 0; }
#endif

// Some rows times one panel. AMX needs `Tiles` in the calling thread, and readable codes (of any value) up to whole tiles.
void multiply(const uint8_t* codes, const float* row_scale, int64_t rows, const Weight& w, int64_t panel, float* out,
              int64_t out_stride) {
  const int64_t done = amx_pays(rows) ? amx_multiply(codes, row_scale, rows, w, panel, out, out_stride) : 0;
  if (done < rows)
    vnni_multiply(codes + done * w.stride(), row_scale + done, rows - done, w, panel, w.offset + panel * kPanel, 0, 0,
                  out + done * out_stride, out_stride);
}

// ---- work sharing ----------------------------------------------------------------------------------------------------------

template <typename T>
struct Buffer {  // uninitialised, on a cache line
  explicit Buffer(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  operator T*() const { return data; }
  T* data;
};

struct Quantised {  // rows of codes and their scales
  Quantised(int64_t rows, const Weight& w)
      : stride(w.stride()), codes((amx_pays(rows) ? (rows + kAmxRow - 1) / kAmxRow * kAmxRow : rows) * stride), scale(rows) {}

  template <typename T>
  void fill(int64_t first, int64_t count, const T* x, const Weight& w) {
    Buffer<float> buffer(w.k);
    for (int64_t r = first; r < first + count; ++r)
      scale[r] = quantise_row(x + (r - first) * w.k, w.k, w.multiplier, w.eps, w.rotation, buffer, codes + r * stride);
  }

  int64_t stride;
  Buffer<uint8_t> codes;
  Buffer<float> scale;
};

// Rows per block so that every thread gets equally many blocks, or 0 when there are so few rows that the threads had better
// share the columns of one block: a decode step then reads the weights once, not once a thread.
int64_t block_rows(int64_t rows, int threads) {
  if (rows < 16 * threads) return 0;
  const int64_t most = amx_pays(rows) ? kAmxBlockRows : kBlockRows;
  const int64_t blocks = ((rows + most - 1) / most + threads - 1) / threads * threads;
  return (rows + blocks - 1) / blocks;
}

// Panels [first, first + count) of some quantised rows; out is (rows, 64 * count).
void multiply(const Quantised& x, int64_t rows, const Weight& w, int64_t first, int64_t count, float* out) {
  for (int64_t p = 0; p < count; ++p)
    multiply(x.codes, x.scale, rows, w, first + p, out + p * kPanel, count * kPanel);
}

// Quantise x (m, k), multiply, and call `finish(first row, rows, first panel, panels, result)` for every group of panels.
template <typename T, typename Finish>
void linear(const T* x, int64_t m, const Weight& w, int64_t group, const Finish& finish) {
  const int threads = at::get_num_threads();
  const int64_t block = block_rows(m, threads);
  if (block == 0) {
    Quantised rows(m, w);
#pragma omp parallel num_threads(threads)
    {
      const Tiles registers(amx_pays(m));
      Buffer<float> out(m * group * kPanel);
#pragma omp for
      for (int64_t r = 0; r < m; ++r) rows.fill(r, 1, x + r * w.k, w);
#pragma omp for
      for (int64_t p = 0; p < w.panels; p += group) {
        const int64_t count = std::min(group, w.panels - p);
        multiply(rows, m, w, p, count, out);
        finish(0, m, p, count, out);
      }
    }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const Tiles registers(amx_pays(block));
    Quantised rows(block, w);
    Buffer<float> out(block * group * kPanel);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < m; r += block) {
      const int64_t here = std::min(block, m - r);
      rows.fill(0, here, x + r * w.k, w);
      for (int64_t p = 0; p < w.panels; p += group) {
        const int64_t count = std::min(group, w.panels - p);
        multiply(rows, here, w, p, count, out);
        finish(r, here, p, count, out);
      }
    }
  }
}

// hidden = silu(gate) * up for 64 channels of some rows; hidden has `width` columns.
void gate_up(const Quantised& x, int64_t rows, const Weight& w, int64_t panel, float* pair, float* hidden, int64_t width) {
  multiply(x.codes, x.scale, rows, w, panel, pair, 2 * kPanel);
  multiply(x.codes, x.scale, rows, w, panel + w.panels / 2, pair + kPanel, 2 * kPanel);
  const int64_t columns = std::min(kPanel, width - panel * kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = pair + r * 2 * kPanel;
    float* to = hidden + r * width + panel * kPanel;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) to[j] = silu(in[j]) * in[kPanel + j];
  }
}

// out = down(silu(gate(x)) * up(x)); the hidden activations of a block of rows never leave the cache.
template <typename T>
void mlp(const T* x, int64_t m, const Weight& first, const Weight& second, T* out) {
  const int threads = at::get_num_threads();
  const int64_t block = block_rows(m, threads), width = second.k, panels = first.panels / 2;
  const auto finish = [&](const float* tile, int64_t row, int64_t rows, int64_t panel) {
    const int64_t columns = std::min(kPanel, second.n - panel * kPanel);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = out + (row + r) * second.n + panel * kPanel;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) store(to + j, tile[r * kPanel + j]);
    }
  };
  if (block == 0) {
    Quantised rows(m, first), inner(m, second);
    Buffer<float> hidden(m * width);
#pragma omp parallel num_threads(threads)
    {
      const Tiles registers(amx_pays(m));
      Buffer<float> tile(m * 2 * kPanel);
#pragma omp for
      for (int64_t r = 0; r < m; ++r) rows.fill(r, 1, x + r * first.k, first);
#pragma omp for
      for (int64_t p = 0; p < panels; ++p) gate_up(rows, m, first, p, tile, hidden, width);
#pragma omp for
      for (int64_t r = 0; r < m; ++r) inner.fill(r, 1, hidden + r * width, second);
#pragma omp for
      for (int64_t p = 0; p < second.panels; ++p) {
        multiply(inner, m, second, p, 1, tile);
        finish(tile, 0, m, p);
      }
    }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const Tiles registers(amx_pays(block));
    Quantised rows(block, first), inner(block, second);
    Buffer<float> hidden(block * width), tile(block * 2 * kPanel);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < m; r += block) {
      const int64_t here = std::min(block, m - r);
      rows.fill(0, here, x + r * first.k, first);
      for (int64_t p = 0; p < panels; ++p) gate_up(rows, here, first, p, tile, hidden, width);
      inner.fill(0, here, hidden.data, second);
      for (int64_t p = 0; p < second.panels; ++p) {
        multiply(inner, here, second, p, 1, tile);
        finish(tile, r, here, p);
      }
    }
  }
}

// ---- operators -------------------------------------------------------------------------------------------------------------

const float* floats(const OptTensor& t, const char* name, int64_t count) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == count, name, " must be ", count,
              " contiguous float32 values");
  return t->const_data_ptr<float>();
}

Weight weight_of(const Tensor& packed, const Tensor& scale, const Tensor& offset, const OptTensor& bias, const Tensor& multiplier,
                 double eps, int64_t rotation, int64_t n, int64_t k) {
  TORCH_CHECK(packed.scalar_type() == at::kChar && packed.is_contiguous() && packed.dim() == 4 &&
                  packed.size(1) == (k + 3) / 4 && packed.size(2) == kPanel && packed.size(3) == 4,
              "packed must be contiguous int8 (panels, ", (k + 3) / 4, ", 64, 4), got ", packed.sizes());
  const int64_t columns = packed.size(0) * kPanel;
  TORCH_CHECK(n > 0 && n <= columns, "out_features must lie in 1..", columns, ", got ", n);
  TORCH_CHECK(offset.scalar_type() == at::kInt && offset.is_contiguous() && offset.numel() == columns, "offset must be ",
              columns, " contiguous int32 values");
  TORCH_CHECK(rotation > 0 && (rotation & (rotation - 1)) == 0 && k % rotation == 0,
              "rotation must be a power of two that divides ", k, ", got ", rotation);
  return {packed.const_data_ptr<int8_t>(), offset.const_data_ptr<int32_t>(),
          floats(scale, "scale", columns), floats(bias, "bias", columns),
          floats(multiplier, "multiplier", k), static_cast<float>(eps),
          rotation, n, k, packed.size(1), packed.size(0)};
}

template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case at::kFloat: return body(x.const_data_ptr<float>());
    case at::kBFloat16: return body(x.const_data_ptr<at::BFloat16>());
    case at::kHalf: return body(x.const_data_ptr<at::Half>());
    default: TORCH_CHECK(false, "input must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// x (..., k) -> (..., n) in the dtype of x.
Tensor w8a8_linear(const Tensor& input, const Tensor& packed, const Tensor& scale, const Tensor& offset, const OptTensor& bias,
                   const Tensor& multiplier, double eps, int64_t rotation, int64_t n) {
  const Tensor x = input.contiguous();
  const int64_t k = x.size(-1), m = x.numel() / k;
  const Weight w = weight_of(packed, scale, offset, bias, multiplier, eps, rotation, n, k);
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor out = at::empty(sizes, x.options());
  for_dtype(x, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    T* to = out.mutable_data_ptr<T>();
    linear(data, m, w, 1, [&](int64_t row, int64_t rows, int64_t panel, int64_t, const float* tile) {
      const int64_t columns = std::min(kPanel, n - panel * kPanel);
      for (int64_t r = 0; r < rows; ++r) {
        T* line = to + (row + r) * n + panel * kPanel;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) store(line + j, tile[r * kPanel + j]);
      }
    });
  });
  return out;
}

// x (..., k) -> down(silu(gate(norm(x))) * up(norm(x))) of the same shape as a linear layer's output.
Tensor w8a8_mlp(const Tensor& input, const Tensor& packed1, const Tensor& scale1, const Tensor& offset1, const OptTensor& bias1,
                const Tensor& multiplier1, double eps1, int64_t rotation1, const Tensor& packed2, const Tensor& scale2,
                const Tensor& offset2, const OptTensor& bias2, const Tensor& multiplier2, double eps2, int64_t rotation2,
                int64_t hidden, int64_t n) {
  const Tensor x = input.contiguous();
  const int64_t k = x.size(-1), m = x.numel() / k;
  const Weight first = weight_of(packed1, scale1, offset1, bias1, multiplier1, eps1, rotation1, packed1.size(0) * kPanel, k);
  const Weight second = weight_of(packed2, scale2, offset2, bias2, multiplier2, eps2, rotation2, n, hidden);
  TORCH_CHECK(first.panels == 2 * ((hidden + kPanel - 1) / kPanel), "gate and up must be packed one after the other");
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  Tensor out = at::empty(sizes, x.options());
  for_dtype(x, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    mlp(data, m, first, second, out.mutable_data_ptr<T>());
  });
  return out;
}

// x (batch, tokens, k) -> q (batch, heads, tokens, d), k and v (batch, kv_heads, tokens, d); q and k rotated by cos and sin,
// (1 or batch, tokens, d) in the dtype of x: y = x * cos + rotate_half(x) * sin. q is a view of (batch, tokens, heads, d), the
// layout attention wants its output in; k and v are contiguous, as the cache keeps them.
std::tuple<Tensor, Tensor, Tensor> w8a8_qkv_rope(const Tensor& input, const Tensor& packed, const Tensor& scale,
                                                 const Tensor& offset, const OptTensor& bias, const Tensor& multiplier,
                                                 double eps, int64_t rotation, const Tensor& cosine, const Tensor& sine, int64_t heads,
                                                 int64_t kv_heads) {
  TORCH_CHECK(input.dim() == 3, "input must be (batch, tokens, features), got ", input.sizes());
  const Tensor x = input.contiguous(), cos = cosine.contiguous(), sin = sine.contiguous();
  const int64_t batch = x.size(0), tokens = x.size(1), d = cos.size(-1), all = heads + 2 * kv_heads;
  TORCH_CHECK(cos.sizes() == sin.sizes() && cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == batch) &&
                  cos.size(1) == tokens && cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type() &&
                  d % 2 == 0,
              "cos and sin must be (1 or batch, tokens, head_dim) in the dtype of the input, got ", cos.sizes());
  const Weight w = weight_of(packed, scale, offset, bias, multiplier, eps, rotation, all * d, x.size(2));
  int64_t group = 1;
  while (group * kPanel % d) ++group;
  Tensor q = at::empty({batch, tokens, heads, d}, x.options());
  Tensor k = at::empty({batch, kv_heads, tokens, d}, x.options());
  Tensor v = at::empty({batch, kv_heads, tokens, d}, x.options());
  for_dtype(x, [&](const auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    T *q_to = q.mutable_data_ptr<T>(), *k_to = k.mutable_data_ptr<T>(), *v_to = v.mutable_data_ptr<T>();
    const T *cos_from = cos.const_data_ptr<T>(), *sin_from = sin.const_data_ptr<T>();
    const int64_t half = d / 2;
    linear(data, batch * tokens, w, group, [&](int64_t row, int64_t rows, int64_t panel, int64_t count, const float* tile) {
      const int64_t from = panel * kPanel / d, to = std::min(all, from + count * kPanel / d);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = (row + r) / tokens, t = (row + r) % tokens;
        const T* c = cos_from + ((cos.size(0) == 1 ? 0 : b) * tokens + t) * d;
        const T* s = sin_from + ((cos.size(0) == 1 ? 0 : b) * tokens + t) * d;
        for (int64_t h = from; h < to; ++h) {
          const float* in = tile + r * count * kPanel + (h - from) * d;
          if (h >= heads + kv_heads) {
            T* line = v_to + ((b * kv_heads + h - heads - kv_heads) * tokens + t) * d;
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(line + j, in[j]);
            continue;
          }
          T* line = h < heads ? q_to + ((row + r) * heads + h) * d : k_to + ((b * kv_heads + h - heads) * tokens + t) * d;
#pragma omp simd
          for (int64_t j = 0; j < half; ++j) {
            store(line + j, in[j] * load(c + j) - in[j + half] * load(s + j));
            store(line + j + half, in[j + half] * load(c + j + half) + in[j] * load(s + j + half));
          }
        }
      }
    });
  });
  return {q.transpose(1, 2), k, v};
}

// From how many rows on AMX computes (-1: never), and whether VNNI does below that.
std::tuple<int64_t, bool> w8a8_paths() {
#ifdef ASSAY_VNNI
  constexpr bool vnni = true;
#else
  constexpr bool vnni = false;
#endif
  return {tiles_allowed() ? kAmxMin : -1, vnni};
}

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("w8a8_paths() -> (int, bool)", w8a8_paths);
  m.def(
      "w8a8_linear(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, Tensor multiplier, float eps, int rotation, "
      "int out_features) -> Tensor");
  m.def(
      "w8a8_mlp(Tensor x, Tensor packed1, Tensor scale1, Tensor offset1, Tensor? bias1, Tensor multiplier1, float eps1, int rotation1, "
      "Tensor packed2, Tensor scale2, Tensor offset2, Tensor? bias2, Tensor multiplier2, float eps2, int rotation2, int hidden_features, "
      "int out_features) -> Tensor");
  m.def(
      "w8a8_qkv_rope(Tensor x, Tensor packed, Tensor scale, Tensor offset, Tensor? bias, Tensor multiplier, float eps, int rotation, "
      "Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("w8a8_linear", w8a8_linear);
  m.impl("w8a8_mlp", w8a8_mlp);
  m.impl("w8a8_qkv_rope", w8a8_qkv_rope);
}

}  // namespace
