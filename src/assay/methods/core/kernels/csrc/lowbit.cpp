// Products of packed ternary and binary weights with int8 activations, and the gated element-wise recurrence.
//
// A row of k weights takes E = ceil(k / P) bytes: P = 4 (ternary, 2 bits each), 5 (ternary in base 3) or 8 (binary, 1 bit). Digit j
// of byte b belongs to input j * E + b, so that a register of bytes yields P registers of weights for P runs of consecutive inputs.
// Digits are unsigned, as the byte dot product wants them: weight + 1 for ternary, (weight + 1) / 2 for binary; the sum of the
// inputs undoes the shift. A base-3 byte is ceil(number * 256 / 243): its leading digit is floor(3 byte / 256), the rest 3 byte mod 256.
// One row of activations is bound by reading weights: it takes few instructions a byte (`single`) and asks for the next rows ahead of
// time, because four rows read side by side are no stream that processors foresee.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "formats.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t per_byte(int64_t kind) { return kind == kTernary ? 4 : kind == kBase3 ? 5 : 8; }
constexpr int kRows = 4;   // weight rows computed side by side
constexpr int kBatch = 4;  // rows of activations that share a decoded weight
constexpr int64_t kPad = 64;

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// ---- registers of bytes ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
constexpr int64_t kWidth = 64;
using Bytes = __m512i;
using Sum = __m512i;
inline Sum zero() { return _mm512_setzero_si512(); }
inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes load_first(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8((1ull << n) - 1, p); }
template <int J>
inline Bytes crumb(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 2 * J), _mm512_set1_epi8(3)); }
template <int J>
inline Bytes bit(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, J), _mm512_set1_epi8(1)); }
inline Bytes leading_trit(Bytes v) {
  const Bytes one = _mm512_set1_epi8(1);
  const Bytes u = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(v, _mm512_set1_epi8(86)), one);
  return _mm512_mask_add_epi8(u, _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8(char(171))), u, one);
}
inline Bytes times_three(Bytes v) { return _mm512_add_epi8(v, _mm512_add_epi8(v, v)); }
// sum += the four u8 x s8 products of each lane; as an instruction, because gcc 12 spills the accumulators of the intrinsic
inline void dot(Sum& sum, Bytes u, Bytes x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x)); }
inline int32_t total(Sum sum) { return _mm512_reduce_add_epi32(sum); }
#elif defined(__AVX2__)
constexpr int64_t kWidth = 32;
using Bytes = __m256i;
using Sum = __m256i;
inline Sum zero() { return _mm256_setzero_si256(); }
inline Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bytes load_first(const uint8_t* p, int64_t n) {
  uint8_t part[32] = {};
  std::memcpy(part, p, n);
  return load(part);
}
template <int J>
inline Bytes crumb(Bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 2 * J), _mm256_set1_epi8(3)); }
template <int J>
inline Bytes bit(Bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, J), _mm256_set1_epi8(1)); }
inline Bytes leading_trit(Bytes v) {
  const Bytes one = _mm256_cmpeq_epi8(_mm256_max_epu8(v, _mm256_set1_epi8(86)), v);  // -1 where v >= 86
  const Bytes two = _mm256_cmpeq_epi8(_mm256_max_epu8(v, _mm256_set1_epi8(char(171))), v);
  return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(one, two));
}
inline Bytes times_three(Bytes v) { return _mm256_add_epi8(v, _mm256_add_epi8(v, v)); }
inline void dot(Sum& sum, Bytes u, Bytes x) {  // digits are at most 2: pairs fit 16 bits
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
}
inline int32_t total(Sum sum) {
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}
#else
constexpr int64_t kWidth = 16;
struct Bytes {
  uint8_t at[kWidth];
};
using Sum = int32_t;
inline Sum zero() { return 0; }
inline Bytes load(const void* p) {
  Bytes v;
  std::memcpy(v.at, p, kWidth);
  return v;
}
inline Bytes load_first(const uint8_t* p, int64_t n) {
  Bytes v = {};
  std::memcpy(v.at, p, n);
  return v;
}
template <class F>
inline Bytes each(const Bytes& v, F&& f) {
  Bytes u;
  for (int i = 0; i < kWidth; ++i) u.at[i] = f(v.at[i]);
  return u;
}
template <int J>
inline Bytes crumb(const Bytes& v) {
  return each(v, [](uint8_t b) { return uint8_t(b >> (2 * J) & 3); });
}
template <int J>
inline Bytes bit(const Bytes& v) {
  return each(v, [](uint8_t b) { return uint8_t(b >> J & 1); });
}
inline Bytes leading_trit(const Bytes& v) {
  return each(v, [](uint8_t b) { return uint8_t(3 * b >> 8); });
}
inline Bytes times_three(const Bytes& v) {
  return each(v, [](uint8_t b) { return uint8_t(3 * b); });
}
inline void dot(Sum& sum, const Bytes& u, const Bytes& x) {
  for (int i = 0; i < kWidth; ++i) sum += int32_t(u.at[i]) * int32_t(int8_t(x.at[i]));
}
inline int32_t total(Sum sum) { return sum; }
#endif

// ---- the product -------------------------------------------------------------------------------------------------------------

// Digit J of the bytes; for base 3 the digits come in order, and `v` moves on.
template <int64_t K, int J>
inline Bytes digit(Bytes& v) {
  if constexpr (K == kTernary) {
    return crumb<J>(v);
  } else if constexpr (K == kBinary) {
    return bit<J>(v);
  } else {
    const Bytes u = leading_trit(v);
    v = times_three(v);
    return u;
  }
}

template <int64_t K, int R, int J>
inline void digits(Bytes (&v)[kRows], const int8_t* const* x, int64_t bytes, int64_t b, Sum (&sum)[R][kRows]) {
  if constexpr (J < per_byte(K)) {
    Bytes inputs[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) inputs[r] = load(x[r] + J * bytes + b);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Bytes u = digit<K, J>(v[i]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot(sum[r][i], u, inputs[r]);
    }
    digits<K, R, J + 1>(v, x, bytes, b, sum);
  }
}

// The register of weights from byte b on; the same place kRows rows further on is fetched (a wish: never a fault beyond the end).
inline Bytes next(const uint8_t* row, int64_t bytes, int64_t b) {
  __builtin_prefetch(row + b + kRows * bytes);
  return bytes - b >= kWidth ? load(row + b) : load_first(row + b, bytes - b);
}

// R rows of activations times kRows rows of weights: the sums over digits, not yet shifted.
template <int64_t K, int R>
void tile(const uint8_t* const* w, const int8_t* const* x, int64_t bytes, int32_t* out) {
  Sum sum[R][kRows];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum[r][i] = zero();
  for (int64_t b = 0; b < bytes; b += kWidth) {
    Bytes v[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) v[i] = next(w[i], bytes, b);
    digits<K, R, 0>(v, x, bytes, b, sum);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) out[r * kRows + i] = total(sum[r][i]);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
// Base-3 bytes as the ternary byte of their first four digits, and their last digit: two tables instead of five divisions.
struct Trits {
  alignas(64) uint8_t first[256] = {}, last[256];
  Trits() {
    for (int byte = 0; byte < 256; ++byte) {
      int rest = byte;
      for (int j = 0; j < 4; ++j, rest = 3 * rest & 255) first[byte] |= (3 * rest >> 8) << (2 * j);
      last[byte] = 3 * rest >> 8;
    }
  }
};
const Trits kTrits;

struct Table {
  __m512i part[4];
  explicit Table(const uint8_t* from) {
    for (int i = 0; i < 4; ++i) part[i] = load(from + 64 * i);
  }
  Bytes at(Bytes v) const {
    const Bytes low = _mm512_permutex2var_epi8(part[0], v, part[1]), high = _mm512_permutex2var_epi8(part[2], v, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(v), low, high);
  }
};

// Adds four digits of each byte, left where they stand (so `Bits` * J higher), to a sum for each place.
template <int Bits>
inline void places(const Bytes (&v)[kRows], const int8_t* x, int64_t bytes, Sum (&sum)[kRows][4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Bytes inputs = load(x + j * bytes), mask = _mm512_set1_epi8(char(((1 << Bits) - 1) << (Bits * j)));
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) dot(sum[i][j], _mm512_and_si512(v[i], mask), inputs);
  }
}

// One row of activations: as `tile`, without a shift for each digit. A place's sum is a multiple of what it stands for: exact.
template <int64_t K>
void single(const uint8_t* const* w, const int8_t* x, int64_t bytes, int32_t* out) {
  constexpr int kBits = K == kBinary ? 1 : 2;
  Sum sum[kRows][4];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = zero();
  const Table first(kTrits.first), last(kTrits.last);
  for (int64_t b = 0; b < bytes; b += kWidth) {
    Bytes v[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) v[i] = next(w[i], bytes, b);
    if constexpr (K == kBase3) {
      const Bytes inputs = load(x + 4 * bytes + b);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        dot(sum[i][0], last.at(v[i]), inputs);
        v[i] = first.at(v[i]);
      }
    }
    places<kBits>(v, x + b, bytes, sum);
    if constexpr (K == kBinary) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) v[i] = _mm512_srli_epi16(v[i], 4);
      places<kBits>(v, x + 4 * bytes + b, bytes, sum);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    Sum all = sum[i][3];
#pragma GCC unroll 4
    for (int j = 2; j >= 0; --j) all = _mm512_add_epi32(_mm512_srai_epi32(all, kBits), sum[i][j]);
    out[i] = total(all);
  }
}
#else
template <int64_t K>
void single(const uint8_t* const* w, const int8_t* x, int64_t bytes, int32_t* out) {
  tile<K, 1>(w, &x, bytes, out);
}
#endif

// Rows of int8 activations with room to read beyond their ends, and their sums.
struct Inputs {
  int64_t m, k, stride;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;

  Inputs(int64_t m, int64_t k, int64_t bytes, int64_t per)
      : m(m), k(k), stride(bytes * per + kPad), codes(m * stride, 0), sums(m, 0) {}
  int8_t* row(int64_t r) { return codes.data() + r * stride; }
  void add_up(int64_t r) {
    const int8_t* from = row(r);
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < k; ++i) sum += from[i];
    sums[r] = sum;
  }
};

// finish(row of activations, row of weights, their integer product) for all pairs.
template <int64_t K, class Finish>
void product(Inputs& x, const Tensor& packed, Finish&& finish) {
  const int64_t n = packed.size(0), bytes = packed.size(1);
  const uint8_t* weights = packed.data_ptr<uint8_t>();
#pragma omp parallel for num_threads(threads()) schedule(static) if (n * bytes * x.m > 16384)
  for (int64_t first = 0; first < n; first += kRows) {
    const uint8_t* w[kRows];
    for (int i = 0; i < kRows; ++i) w[i] = weights + std::min(first + i, n - 1) * bytes;  // the last ones again at the end
    for (int64_t begin = 0; begin < x.m; begin += kBatch) {
      const int64_t rows = std::min<int64_t>(kBatch, x.m - begin);
      const int8_t* inputs[kBatch];
      for (int r = 0; r < rows; ++r) inputs[r] = x.row(begin + r);
      int32_t found[kBatch * kRows];
      switch (rows) {
        case 1: single<K>(w, inputs[0], bytes, found); break;
        case 2: tile<K, 2>(w, inputs, bytes, found); break;
        case 3: tile<K, 3>(w, inputs, bytes, found); break;
        default: tile<K, 4>(w, inputs, bytes, found);
      }
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < std::min<int64_t>(kRows, n - first); ++i)
          finish(begin + r, first + i, (K == kBinary ? 2 : 1) * found[r * kRows + i] - x.sums[begin + r]);
    }
  }
}

template <class Finish>
void product(Inputs& x, const Tensor& packed, int64_t kind, Finish&& finish) {
  if (kind == kTernary)
    product<kTernary>(x, packed, finish);
  else if (kind == kBase3)
    product<kBase3>(x, packed, finish);
  else
    product<kBinary>(x, packed, finish);
}

void check(const Tensor& x, const Tensor& packed, int64_t kind) {
  TORCH_CHECK_VALUE(kind == kTernary || kind == kBase3 || kind == kBinary, "kind must be ternary, base3 or binary, got ", kind);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (rows, features)");
  TORCH_CHECK_VALUE(packed.dim() == 2 && packed.is_contiguous() && packed.scalar_type() == at::kByte,
                    "packed must be contiguous uint8 (out, bytes)");
  const int64_t per = per_byte(kind);
  TORCH_CHECK_VALUE(packed.size(1) == (x.size(1) + per - 1) / per, "packed must hold as many inputs as x has features");
}

Tensor lowbit_product(const Tensor& codes, const Tensor& packed, int64_t kind) {
  check(codes, packed, kind);
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kChar, "codes must be int8");
  const int64_t m = codes.size(0), k = codes.size(1), n = packed.size(0);
  Inputs x(m, k, packed.size(1), per_byte(kind));
  for (int64_t r = 0; r < m; ++r) {
    std::memcpy(x.row(r), codes.data_ptr<int8_t>() + r * k, k);
    x.add_up(r);
  }
  Tensor out = at::empty({m, n}, codes.options().dtype(at::kInt));
  int32_t* to = out.data_ptr<int32_t>();
  product(x, packed, kind, [&](int64_t r, int64_t c, int32_t sum) { to[r * n + c] = sum; });
  return out;
}

// ---- with the quantisation of the inputs --------------------------------------------------------------------------------------

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// One row to int8: optionally RMSNorm, then round(127 x / max|x|), half to even; returns the step max|x| / 127.
float quantise(const float* from, int64_t k, const float* norm, float eps, float* buffer, int8_t* codes) {
  float factor = 1.0f;
  if (norm) {
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < k; ++i) squares += double(from[i]) * from[i];
    factor = 1.0f / std::sqrt(static_cast<float>(squares / k) + eps);
  }
  int32_t largest = 0;  // of the bit patterns of |x|, which order like the numbers, NaN above infinity
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < k; ++i) {
    buffer[i] = norm ? from[i] * factor * norm[i] : from[i];
    largest = std::max(largest, static_cast<int32_t>(as_bits(buffer[i]) & 0x7fffffffu));
  }
  float peak = as_float(largest);
  if (peak < 1e-5f) peak = 1e-5f;
  const float scale = 127.0f / peak;
#pragma omp simd
  for (int64_t i = 0; i < k; ++i)  // adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits
    codes[i] = static_cast<int8_t>(as_bits(buffer[i] * scale + 12582912.0f));
  return peak / 127.0f;
}

Tensor lowbit_linear(const Tensor& x, const Tensor& packed, int64_t kind, const Tensor& scale, const OptTensor& bias,
                     const OptTensor& norm, double eps) {
  check(x, packed, kind);
  const int64_t m = x.size(0), k = x.size(1), n = packed.size(0);
  const auto vector = [](const Tensor& t, int64_t size) {
    return t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == size;
  };
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "x must be float32");
  TORCH_CHECK_VALUE(vector(scale, 1) || vector(scale, n), "scale must be float32 with one value, or one per output");
  TORCH_CHECK_VALUE(!bias || vector(*bias, n), "bias must be float32 with one value per output");
  TORCH_CHECK_VALUE(!norm || vector(*norm, k), "norm must be float32 with one value per feature");
  Inputs inputs(m, k, packed.size(1), per_byte(kind));
  std::vector<float> steps(m);
  const float* weight = norm ? norm->data_ptr<float>() : nullptr;
#pragma omp parallel num_threads(threads()) if (m > 8)
  {
    std::vector<float> buffer(k);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; ++r) {
      steps[r] = quantise(x.data_ptr<float>() + r * k, k, weight, static_cast<float>(eps), buffer.data(), inputs.row(r));
      inputs.add_up(r);
    }
  }
  Tensor out = at::empty({m, n}, x.options());
  float* to = out.data_ptr<float>();
  const float *scales = scale.data_ptr<float>(), *shift = bias ? bias->data_ptr<float>() : nullptr;
  const int64_t step = scale.numel() > 1;
  product(inputs, packed, kind, [&](int64_t r, int64_t c, int32_t sum) {
    const float y = static_cast<float>(sum) * (steps[r] * scales[c * step]);
    to[r * n + c] = shift ? y + shift[c] : y;
  });
  return out;
}

// ---- h_t = f_t h_{t-1} + c_t --------------------------------------------------------------------------------------------------

constexpr int64_t kChannels = 64;  // channels a thread carries through time together

template <class F>
void by_channels(int64_t batch, int64_t dim, F&& f) {
  const int64_t blocks = (dim + kChannels - 1) / kChannels;
#pragma omp parallel for num_threads(threads()) schedule(static) if (batch * blocks > 1)
  for (int64_t i = 0; i < batch * blocks; ++i) {
    const int64_t first = i % blocks * kChannels;
    f(i / blocks, first, std::min(kChannels, dim - first));
  }
}

template <class T>
void scan(const T* f, const T* c, const T* h0, T* h, int64_t batch, int64_t time, int64_t dim) {
  by_channels(batch, dim, [&](int64_t b, int64_t first, int64_t n) {
    const T* before = h0 + b * dim + first;
    for (int64_t t = 0; t < time; ++t) {
      const int64_t at = (b * time + t) * dim + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[at + i] = f[at + i] * before[i] + c[at + i];
      before = h + at;
    }
  });
}

template <class T>
void scan_backward(const T* grad, const T* f, const T* h, const T* h0, T* df, T* dc, T* dh0, int64_t batch, int64_t time,
                   int64_t dim) {
  by_channels(batch, dim, [&](int64_t b, int64_t first, int64_t n) {
    T* carry = dh0 + b * dim + first;
    for (int64_t i = 0; i < n; ++i) carry[i] = 0;
    for (int64_t t = time - 1; t >= 0; --t) {
      const int64_t at = (b * time + t) * dim + first;
      const T* before = t ? h + at - dim : h0 + b * dim + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T g = grad[at + i] + carry[i];
        dc[at + i] = g;
        df[at + i] = g * before[i];
        carry[i] = f[at + i] * g;
      }
    }
  });
}

void check_scan(const Tensor& f, const Tensor& c, const Tensor& h0) {
  TORCH_CHECK_VALUE(f.dim() == 3 && c.sizes() == f.sizes() && h0.sizes() == at::IntArrayRef({f.size(0), f.size(2)}),
                    "f and c must be (batch, tokens, dim) and h0 (batch, dim)");
  TORCH_CHECK_VALUE(f.is_contiguous() && c.is_contiguous() && h0.is_contiguous(), "f, c and h0 must be contiguous");
  TORCH_CHECK_VALUE((f.scalar_type() == at::kFloat || f.scalar_type() == at::kDouble) && c.scalar_type() == f.scalar_type() &&
                        h0.scalar_type() == f.scalar_type(),
                    "f, c and h0 must all be float32 or float64");
}

Tensor gated_scan(const Tensor& f, const Tensor& c, const Tensor& h0) {
  check_scan(f, c, h0);
  Tensor h = at::empty_like(f);
  const auto run = [&](auto number) {
    using T = decltype(number);
    scan<T>(f.data_ptr<T>(), c.data_ptr<T>(), h0.data_ptr<T>(), h.data_ptr<T>(), f.size(0), f.size(1), f.size(2));
  };
  f.scalar_type() == at::kFloat ? run(float{}) : run(double{});
  return h;
}

std::tuple<Tensor, Tensor, Tensor> gated_scan_backward(const Tensor& grad, const Tensor& f, const Tensor& h, const Tensor& h0) {
  check_scan(f, h, h0);
  check_scan(f, grad, h0);
  Tensor df = at::empty_like(f), dc = at::empty_like(f), dh0 = at::empty_like(h0);
  const auto run = [&](auto number) {
    using T = decltype(number);
    scan_backward<T>(grad.data_ptr<T>(), f.data_ptr<T>(), h.data_ptr<T>(), h0.data_ptr<T>(), df.data_ptr<T>(),
                     dc.data_ptr<T>(), dh0.data_ptr<T>(), f.size(0), f.size(1), f.size(2));
  };
  f.scalar_type() == at::kFloat ? run(float{}) : run(double{});
  return {df, dc, dh0};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("lowbit_product(Tensor codes, Tensor packed, int kind) -> Tensor");
  m.def("lowbit_linear(Tensor x, Tensor packed, int kind, Tensor scale, Tensor? bias, Tensor? norm, float eps) -> Tensor");
  m.def("gated_scan(Tensor f, Tensor c, Tensor h0) -> Tensor");
  m.def("gated_scan_backward(Tensor grad, Tensor f, Tensor h, Tensor h0) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("lowbit_product", lowbit_product);
  m.impl("lowbit_linear", lowbit_linear);
  m.impl("gated_scan", gated_scan);
  m.impl("gated_scan_backward", gated_scan_backward);
}
