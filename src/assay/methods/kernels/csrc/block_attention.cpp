// Attention on the CPU: exact over kept key blocks (prefill), exact for one query (decode), and XAttention's block scores.
//
// Prefill and scores share one micro kernel, rows x columns of 32-bit words: a word is one float, or two neighbouring bfloat16
// of the summed dimension where the processor multiplies those (AVX512-BF16). The left side is broadcast word by word from its
// natural layout; the right side is packed so that one register holds one word of kLanes columns:
//   keys   (group of kLanes keys, word of the head dimension, lane)      values   (word of keys, head dimension)
// Keys and values are packed once per key head and shared by the query heads of its group. Softmax is online, in base 2, and in
// float whatever the inputs are. A query that sees no key gives zeros.

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

// Covers `count` registers of columns with tiles of 4 (or 2), 2 and 1: calls f(constant N, first register).
template <class F>
inline void for_tiles(int64_t count, F&& f) {
  int64_t at = 0;
  for (; at + kWide <= count; at += kWide) f(std::integral_constant<int, kWide>{}, at);
  for (; at + 2 <= count; at += 2) f(std::integral_constant<int, 2>{}, at);
  for (; at < count; ++at) f(std::integral_constant<int, 1>{}, at);
}

// Covers `count` rows with groups of 6, 4, 2 and 1: calls f(constant M, first row).
template <class F>
inline void for_rows(int64_t count, F&& f) {
  for (int64_t at = 0; at < count;) {
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

constexpr int64_t kMostDim = 1024;

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

  int64_t offset() const { return keys - queries; }
  int64_t first_block() const { return offset() / block; }
  int64_t key_blocks() const { return (keys + block - 1) / block; }
  int64_t query_blocks() const { return key_blocks() - first_block(); }
  int64_t start(int64_t b) const { return key_start ? key_start[b] : 0; }
  int64_t group_of(int64_t h) const { return h / (heads / key_heads); }
};

struct Task {
  int64_t cost, b, h, i;
};

// Longest first, so that the threads finish together.
std::vector<Task> longest_first(std::vector<Task> tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });
  return tasks;
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// ---- attention over blocks -------------------------------------------------------------------------------------------------

constexpr int64_t kSegmentBytes = 16384;  // of packed keys, and of values: both stay in the first-level cache
constexpr float kSlack = 8.0f;            // how far a score may pass the maximum that was found before it, in base 2

// What one thread carries through the key blocks for one query block.
struct State {
  float* sums;     // (rows, dim)
  float* weights;  // (rows, kLanes), partial sums
  float* shift;    // (rows,), subtracted from the scores: a maximum, 0 before there is one
  float* limit;    // (rows,), how far a score may pass `shift`: kSlack, -infinity before there is a maximum
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

// M rows against a segment of `groups` groups of kLanes keys: scores, online softmax, weighted values. Row m sees the keys
// [first, last[m]) of the segment, the others are masked.
template <bool Half, int M>
void attend(const char* q, int64_t q_bytes, const float* keys, const float* values, int64_t groups, int64_t words, int64_t dim,
            float scale, int64_t first, const int64_t* last, int64_t at, const State& state, float* exponents, float* shares) {
  const int64_t width = groups * kLanes;
  for_tiles(groups, [&](auto n_, int64_t group) {
    constexpr int N = decltype(n_)::value;
    constexpr int64_t tile = N * kLanes;
    const int64_t place = group * kLanes;
    Vec total[M][N] = {};
    multiply<Half, M, N>(total, q, q_bytes, keys + place * words, kLanes, kLanes * words, words);
    bool seldom = first > place || last[0] < place + tile;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec most = all(-kInfinity);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        total[m][n] = total[m][n] * scale - state.shift[at + m];
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
        for (int64_t i = 0; i < std::min(first - place, tile); ++i) row[i] = -kInfinity;
        for (int64_t i = std::max<int64_t>(last[m] - place, 0); i < tile; ++i) row[i] = -kInfinity;
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

template <bool Half>
void block_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, int64_t value_dim,
                     const bool* mask, float scale) {
  const int64_t words = Half ? s.dim / 2 : s.dim, groups = (s.keys + kLanes - 1) / kLanes, heads = s.batch * s.key_heads;
  const int64_t key_floats = kLanes * words, value_floats = kLanes * value_dim / (Half ? 2 : 1);  // of a group
  const Tensor packed = at::empty({heads * groups * (key_floats + value_floats)}, at::kFloat);
  float* all_keys = packed.data_ptr<float>();
  float* all_values = all_keys + heads * groups * key_floats;

  const auto kept_by = [&](int64_t b, int64_t h, int64_t i) {
    return mask ? mask + ((b * s.heads + h) * s.query_blocks() + i) * s.key_blocks() : nullptr;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.query_blocks(); ++i) {
        const int64_t seen = s.causal ? s.first_block() + i + 1 : s.key_blocks();
        const bool* kept = kept_by(b, h, i);
        tasks.push_back({kept ? std::count(kept, kept + seen, true) : seen, b, h, i});
      }
  tasks = longest_first(std::move(tasks));

  const int64_t segment = std::max<int64_t>(kSegmentBytes / 4 / std::max(key_floats, value_floats), 1) * kLanes;
  const int64_t most_rows = std::min(s.block, s.queries);
  const bool copy = q.half != Half;

#pragma omp parallel num_threads(threads())
  {
    Workspace own(most_rows * (words + value_dim + kLanes + 2) + kRows * (segment + kWide * kLanes) + 96);
    float* copied = own.take(most_rows * words);
    const State state{own.take(most_rows * value_dim), own.take(most_rows * kLanes), own.take(most_rows), own.take(most_rows)};
    float *exponents = own.take(kRows * kWide * kLanes), *shares = own.take(kRows * segment);

#pragma omp for schedule(static)
    for (int64_t item = 0; item < heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, group = item % groups;
      const auto row = [&](const View& x, int lane) -> const char* {
        const int64_t key = group * kLanes + lane;
        return key < s.keys && key >= s.start(b) ? x.row(b, h, key) : nullptr;
      };
      pack_columns<Half>([&](int lane) { return row(k, lane); }, k.half, s.dim, all_keys + item * key_floats);
      pack_rows<Half>([&](int lane) { return row(v, lane); }, v.half, value_dim, all_values + item * value_floats);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const int64_t b = tasks[t].b, h = tasks[t].h, i = tasks[t].i, start = s.start(b);
      const int64_t position = std::max((s.first_block() + i) * s.block, s.offset()), query = position - s.offset();
      const int64_t rows = std::min((s.first_block() + i + 1) * s.block, s.keys) - position;
      const int64_t first_group = (b * s.key_heads + s.group_of(h)) * groups;
      const bool* kept = kept_by(b, h, i);
      if (copy)
        for (int64_t r = 0; r < rows; ++r) to_words<Half>(q.row(b, h, query + r), q.half, s.dim, copied + r * words);
      const char* q_data = copy ? reinterpret_cast<const char*>(copied) : q.row(b, h, query);
      const int64_t q_bytes = copy ? words * 4 : q.token;
      std::fill_n(state.sums, rows * value_dim, 0.0f);
      std::fill_n(state.weights, rows * kLanes, 0.0f);
      std::fill_n(state.shift, rows, 0.0f);
      std::fill_n(state.limit, rows, -kInfinity);

      const int64_t end = s.causal ? position + rows : s.keys;  // no row sees a key from here on
      for (int64_t j = start / s.block; j * s.block < end; ++j) {
        if (kept && !kept[j]) continue;
        const int64_t block_end = std::min((j + 1) * s.block, end);
        for (int64_t key = j * s.block; key < block_end; key += segment) {
          const int64_t key_end = std::min(key + segment, block_end), group = first_group + key / kLanes;
          for_rows(rows, [&](auto m_, int64_t r) {
            constexpr int M = decltype(m_)::value;
            int64_t last[M];
            for (int m = 0; m < M; ++m) {
              const int64_t own = position + r + m;
              last[m] = own < start ? 0 : std::min(key_end, s.causal ? own + 1 : key_end) - key;
            }
            if (last[M - 1] <= 0) return;
            attend<Half, M>(q_data + r * q_bytes, q_bytes, all_keys + group * key_floats, all_values + group * value_floats,
                            (last[M - 1] + kLanes - 1) / kLanes, words, value_dim, scale * kLog2e, start - key, last, r, state,
                            exponents, shares);
          });
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float share = state.limit[r] == kSlack ? 1.0f / sum(load(state.weights + r * kLanes)) : 0.0f;
        const float* sums = state.sums + r * value_dim;
        if (out.half)
          for (int64_t c = 0; c < value_dim; ++c)
            reinterpret_cast<BFloat16*>(out.row(b, h, query + r))[c] = static_cast<BFloat16>(sums[c] * share);
        else
          for (int64_t c = 0; c < value_dim; ++c) out.floats(b, h, query + r)[c] = sums[c] * share;
      }
    }
  }
}

// ---- attention of one query ------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 256;   // keys a thread takes at a time
constexpr int64_t kTogether = 4;  // query heads that share a pass over keys and values

template <class T, int G>
inline void add_values(const T* const* rows, const float* shares, int64_t stride, int64_t count, int64_t column, float* sums,
                       int64_t dim) {
  Vec total[G] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vec value = load(rows[i] + column);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) total[g] = total[g] + value * shares[g * stride + i];
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) store(sums + g * dim + column, total[g]);
}

// The part of one chunk of keys in the attention of `count` <= kTogether query heads: sums (heads, dim) relative to the chunk's
// own maximum, the maximum, and the weight. Keys and values are read once, where they lie.
template <class T>
void decode_chunk(const View& k, const View& v, int64_t b, int64_t h, int64_t from, int64_t to, const float* q, int64_t count,
                  int64_t dim, int64_t value_dim, float* sums, float* most, float* weights) {
  const int64_t keys = to - from;
  float scores[kTogether * kChunk], wide[kLanes * kMostDim];
  const T* rows[kChunk];
  for (int64_t at = 0; at < keys; at += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, keys - at);
    for (int64_t i = 0; i < kLanes; ++i) {
      const T* row = reinterpret_cast<const T*>(k.row(b, h, from + at + std::min(i, here - 1)));
      for (int64_t c = 0; c < dim; c += kLanes) store(wide + i * dim + c, load(row + c));
    }
    for (int64_t g = 0; g < count; ++g) {
      Vec total[kLanes] = {};
      for (int64_t c = 0; c < dim; c += kLanes) {
        const Vec query = load(q + g * dim + c);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) total[i] = total[i] + query * load(wide + i * dim + c);
      }
      store(scores + g * kChunk + at, sums_of(total));
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    float* row = scores + g * kChunk;
    for (int64_t i = keys; i % kLanes; ++i) row[i] = -kInfinity;
    Vec top = load(row), weight = {};
    for (int64_t i = kLanes; i < keys; i += kLanes) top = larger(top, load(row + i));
    most[g] = largest(top);
    for (int64_t i = 0; i < keys; i += kLanes) {
      const Vec share = exp2<false>(load(row + i) - most[g]);
      weight = weight + share;
      store(row + i, share);
    }
    weights[g] = sum(weight);
  }
  for (int64_t i = 0; i < keys; ++i) rows[i] = reinterpret_cast<const T*>(v.row(b, h, from + i));
  for (int64_t c = 0; c < value_dim; c += kLanes) {
    if (count == 4) add_values<T, 4>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 3) add_values<T, 3>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 2) add_values<T, 2>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 1) add_values<T, 1>(rows, scores, kChunk, keys, c, sums, value_dim);
  }
}

void decode_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, int64_t value_dim,
                      float scale) {
  const int64_t per = s.heads / s.key_heads, passes = (per + kTogether - 1) / kTogether;
  const int64_t chunks = (s.keys + kChunk - 1) / kChunk, part = value_dim + 2;
  const Tensor parts = at::empty({s.batch * s.heads * chunks * part}, at::kFloat);
  float* all = parts.data_ptr<float>();  // (batch, head, chunk): sums, maximum, weight
  const auto part_of = [&](int64_t b, int64_t h, int64_t chunk) { return all + ((b * s.heads + h) * chunks + chunk) * part; };

#pragma omp parallel num_threads(threads())
  {
    Workspace own(kTogether * (s.dim + value_dim) + 64);
    float *query = own.take(kTogether * s.dim), *sums = own.take(kTogether * value_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < s.batch * s.key_heads * passes * chunks; ++item) {
      const int64_t chunk = item % chunks, pass = item / chunks % passes, head = item / chunks / passes;
      const int64_t b = head / s.key_heads, kh = head % s.key_heads, h = kh * per + pass * kTogether;
      const int64_t count = std::min(kTogether, (kh + 1) * per - h);
      const int64_t from = std::max(chunk * kChunk, s.start(b)), to = std::min((chunk + 1) * kChunk, s.keys);
      float most[kTogether], weights[kTogether];
      if (from < to) {
        for (int64_t g = 0; g < count; ++g) {
          to_words<false>(q.row(b, h + g, 0), q.half, s.dim, query + g * s.dim);
          for (int64_t c = 0; c < s.dim; ++c) query[g * s.dim + c] *= scale * kLog2e;
        }
        if (k.half)
          decode_chunk<BFloat16>(k, v, b, kh, from, to, query, count, s.dim, value_dim, sums, most, weights);
        else
          decode_chunk<float>(k, v, b, kh, from, to, query, count, s.dim, value_dim, sums, most, weights);
      }
      for (int64_t g = 0; g < count; ++g) {
        float* to_part = part_of(b, h + g, chunk);
        if (from < to) std::copy_n(sums + g * value_dim, value_dim, to_part);
        to_part[value_dim] = from < to ? most[g] : -kInfinity;
        to_part[value_dim + 1] = from < to ? weights[g] : 0.0f;
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.batch * s.heads; ++item) {
      const int64_t b = item / s.heads, h = item % s.heads;
      float most = -kInfinity, weight = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) most = std::max(most, part_of(b, h, chunk)[value_dim]);
      std::fill_n(sums, value_dim, 0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* from = part_of(b, h, chunk);
        if (from[value_dim + 1] == 0.0f) continue;
        const float fade = std::exp2(from[value_dim] - most);
        weight += from[value_dim + 1] * fade;
        for (int64_t c = 0; c < value_dim; ++c) sums[c] += from[c] * fade;
      }
      const float share = weight == 0.0f ? 0.0f : 1.0f / weight;
      for (int64_t c = 0; c < value_dim; ++c) {
        if (out.half)
          reinterpret_cast<BFloat16*>(out.row(b, h, 0))[c] = static_cast<BFloat16>(sums[c] * share);
        else
          out.floats(b, h, 0)[c] = sums[c] * share;
      }
    }
  }
}

// ---- XAttention's block scores ---------------------------------------------------------------------------------------------

constexpr int64_t kTileRows = 24;  // tile rows a thread takes at a time, at least: they share a pass over the keys

// Row A of tiles against column B: sum over i < stride of q[A * stride + stride - 1 - i] . k[B * stride + i]; softmax over B of
// `scale` times that; out (batch, heads, query blocks, key blocks) is the sum over the tiles of a block. Tiles without any token
// count nothing, tokens missing from a tile count as zeros.
template <bool Half>
void antidiagonal_scores(const Shape& s, const View& q, const View& k, int64_t stride, float scale, float* out) {
  const int64_t words = Half ? s.dim / 2 : s.dim, tiles = (s.keys + stride - 1) / stride, groups = (tiles + kLanes - 1) / kLanes;
  const int64_t width = groups * kLanes, per_block = s.block / stride, group_floats = stride * kLanes * words;
  const int64_t together = std::max<int64_t>(1, kTileRows / per_block);  // query blocks of a task
  const Tensor packed = at::empty({s.batch * s.key_heads * groups * group_floats}, at::kFloat);
  float* all_keys = packed.data_ptr<float>();
  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.query_blocks(); i += together) tasks.push_back({s.causal ? i : 0, b, h, i});
  tasks = longest_first(std::move(tasks));

#pragma omp parallel num_threads(threads())
  {
    const int64_t most_rows = together * per_block;
    Workspace own(most_rows * (stride * words + width) + width + 64);
    float *query = own.take(most_rows * stride * words), *scores = own.take(most_rows * width), *column = own.take(width);

#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.batch * s.key_heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, group = item % groups;
      for (int64_t i = 0; i < stride; ++i)
        pack_columns<Half>(
            [&](int lane) -> const char* {
              const int64_t key = (group * kLanes + lane) * stride + i;
              return key < s.keys && key >= s.start(b) ? k.row(b, h, key) : nullptr;
            },
            k.half, s.dim, all_keys + item * group_floats + i * kLanes * words);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const int64_t b = tasks[t].b, h = tasks[t].h, blocks = std::min(together, s.query_blocks() - tasks[t].i);
      const int64_t first_row = (s.first_block() + tasks[t].i) * per_block, rows = std::min(blocks * per_block, tiles - first_row);
      const int64_t first_query = std::max(s.offset(), s.start(b)), first_tile = s.start(b) / stride;
      const int64_t columns = s.causal ? first_row + rows : tiles;
      for (int64_t r = 0; r < rows * stride; ++r) {
        const int64_t position = first_row * stride + r, reversed = r / stride * stride + stride - 1 - r % stride;
        const bool there = position >= first_query && position < s.keys;
        to_words<Half>(there ? q.row(b, h, position - s.offset()) : nullptr, q.half, s.dim, query + reversed * words);
      }
      const float* keys = all_keys + (b * s.key_heads + s.group_of(h)) * groups * group_floats;
      for_tiles((columns + kLanes - 1) / kLanes, [&](auto n_, int64_t group) {
        constexpr int N = decltype(n_)::value;
        for_rows(rows, [&](auto m_, int64_t r) {
          constexpr int M = decltype(m_)::value;
          Vec total[M][N] = {};
          multiply<Half, M, N>(total, reinterpret_cast<const char*>(query + r * stride * words), stride * words * 4,
                               keys + group * group_floats, kLanes, group_floats, stride * words);
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) store(scores + (r + m) * width + (group + n) * kLanes, total[m][n] * (scale * kLog2e));
        });
      });
      for (int64_t block = 0; block < blocks; ++block) {
        std::fill_n(column, width, 0.0f);
        for (int64_t r = block * per_block; r < std::min((block + 1) * per_block, rows); ++r) {
          const int64_t tile = first_row + r, last = s.causal ? tile + 1 : tiles;
          if ((tile + 1) * stride <= first_query) continue;  // no query in this row
          float* row = scores + r * width;
          for (int64_t c = 0; c < first_tile; ++c) row[c] = -kInfinity;
          for (int64_t c = last; c % kLanes; ++c) row[c] = -kInfinity;
          Vec most = load(row), weight = {};
          for (int64_t c = kLanes; c < last; c += kLanes) most = larger(most, load(row + c));
          const float top = largest(most);
          for (int64_t c = 0; c < last; c += kLanes) {
            const Vec share = exp2<false>(load(row + c) - top);
            weight = weight + share;
            store(row + c, share);
          }
          const float share = 1.0f / sum(weight);
          for (int64_t c = 0; c < last; c += kLanes) store(column + c, load(column + c) + load(row + c) * share);
        }
        float* to = out + ((b * s.heads + h) * s.query_blocks() + tasks[t].i + block) * s.key_blocks();
        for (int64_t j = 0; j < s.key_blocks(); ++j) {
          to[j] = 0.0f;
          for (int64_t c = j * per_block; c < std::min((j + 1) * per_block, tiles); ++c) to[j] += column[c];
        }
      }
    }
  }
}

// ---- operators -------------------------------------------------------------------------------------------------------------

Shape checked(const Tensor& q, const Tensor& k, int64_t block, bool causal, const OptTensor& key_start, bool half) {
  for (const Tensor& x : {q, k})
    TORCH_CHECK_VALUE(x.dim() == 4 && x.stride(3) == 1 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
                      "q, k, v must be float32 or bfloat16 of (batch, heads, tokens, dim), dim last in memory");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type(), "q, k, v must have one dtype");
  TORCH_CHECK_VALUE(k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "q ", q.sizes(), " and k ", k.sizes(), " do not fit together");
  TORCH_CHECK_VALUE(q.size(2) <= k.size(2), "at least as many keys as queries are needed, got ", k.size(2), " and ", q.size(2));
  TORCH_CHECK_VALUE(q.size(3) % 16 == 0 && q.size(3) <= kMostDim, "head dimension must be a multiple of 16 up to 1024, got ", q.size(3));
  TORCH_CHECK_VALUE(block > 0 && block % 16 == 0, "block must be a positive multiple of 16, got ", block);
#ifndef ASSAY_BF16
  TORCH_CHECK_VALUE(!half, "this processor has no bfloat16 dot product");
#endif
  const int64_t* start = nullptr;
  if (key_start.has_value()) {
    TORCH_CHECK_VALUE(key_start->scalar_type() == at::kLong && key_start->is_contiguous() &&
                          key_start->sizes() == at::IntArrayRef({q.size(0)}),
                      "key_start must be a contiguous int64 tensor of (batch,)");
    start = key_start->data_ptr<int64_t>();
    for (int64_t b = 0; b < q.size(0); ++b)
      TORCH_CHECK_VALUE(start[b] >= 0 && start[b] <= k.size(2), "key_start must lie in [0, keys], got ", start[b]);
  }
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), block, causal, start};
}

void check_values(const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(v.dim() == 4 && v.stride(3) == 1 && v.scalar_type() == k.scalar_type() && v.size(0) == k.size(0) &&
                        v.size(1) == k.size(1) && v.size(2) == k.size(2) && v.size(3) % 16 == 0 && v.size(3) <= kMostDim,
                    "v ", v.sizes(), " does not fit k ", k.sizes());
}

// (batch, heads, queries, dim), lying in memory as (batch, queries, heads, dim): what the next projection reads.
Tensor empty_output(const Tensor& q, int64_t dim) {
  return at::empty({q.size(0), q.size(2), q.size(1), dim}, q.options()).transpose(1, 2);
}

Tensor block_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask, const OptTensor& key_start,
                          int64_t block, bool causal, double scale, bool half) {
  const Shape s = checked(q, k, block, causal, key_start, half);
  check_values(k, v);
  TORCH_CHECK_VALUE(!mask.has_value() || (mask->scalar_type() == at::kBool && mask->is_contiguous() &&
                                          mask->sizes() == at::IntArrayRef({s.batch, s.heads, s.query_blocks(), s.key_blocks()})),
                    "mask must be a contiguous bool tensor of (batch, heads, query blocks, key blocks)");
  Tensor out = empty_output(q, v.size(3));
  if (out.numel() == 0) return out;
  const bool* kept = mask.has_value() ? mask->data_ptr<bool>() : nullptr;
#ifdef ASSAY_BF16
  if (half) {
    block_attention<true>(s, View(q), View(k), View(v), View(out), v.size(3), kept, scale);
    return out;
  }
#endif
  block_attention<false>(s, View(q), View(k), View(v), View(out), v.size(3), kept, scale);
  return out;
}

Tensor decode_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& key_start, double scale) {
  const Shape s = checked(q, k, 16, false, key_start, false);
  check_values(k, v);
  TORCH_CHECK_VALUE(q.size(2) == 1, "decode_attention takes one query, got ", q.size(2));
  Tensor out = empty_output(q, v.size(3));
  if (out.numel() > 0) decode_attention(s, View(q), View(k), View(v), View(out), v.size(3), scale);
  return out;
}

Tensor antidiagonal_scores_op(const Tensor& q, const Tensor& k, const OptTensor& key_start, int64_t stride, int64_t block,
                              bool causal, double scale, bool half) {
  const Shape s = checked(q, k, block, causal, key_start, half);
  TORCH_CHECK_VALUE(stride > 0 && block % stride == 0, "stride must divide block, got ", stride, " and ", block);
  Tensor out = at::empty({s.batch, s.heads, s.query_blocks(), s.key_blocks()}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
#ifdef ASSAY_BF16
  if (half) {
    antidiagonal_scores<true>(s, View(q), View(k), stride, scale, out.data_ptr<float>());
    return out;
  }
#endif
  antidiagonal_scores<false>(s, View(q), View(k), stride, scale, out.data_ptr<float>());
  return out;
}

bool has_bf16() {
#ifdef ASSAY_BF16
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_start, int block, bool causal, float scale, "
      "bool half) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? key_start, float scale) -> Tensor");
  m.def(
      "antidiagonal_scores(Tensor q, Tensor k, Tensor? key_start, int stride, int block, bool causal, float scale, bool half) "
      "-> Tensor");
  m.def("attention_has_bf16() -> bool", &has_bf16);
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("block_attention", block_attention_op);
  m.impl("decode_attention", decode_attention_op);
  m.impl("antidiagonal_scores", antidiagonal_scores_op);
}
