// A 3 x 3 depthwise convolution over planes that lie one after another (channels first), with padding 1, stride 1 or 2, bias and clamp.
//
// Sixteen outputs of a row (eight without AVX-512) are made at a time, going down the plane: each row of the input is loaded once and
// added to the sums of the two or three rows of outputs that it belongs to. Loads and stores have masks: what lies outside of the plane is
// 0 and never touched, so that nothing is copied beforehand.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace {

using at::Tensor;

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));
typedef __mmask16 Mask;
constexpr Places kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};

// The lanes from `first` up to and without `end`.
Mask lanes(int64_t first, int64_t end) { return static_cast<Mask>(((1u << end) - 1) & ~((1u << first) - 1)); }
inline Vector load(const float* from, Mask mask) { return (Vector)_mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, Mask mask, Vector v) { _mm512_mask_storeu_ps(to, mask, (__m512)v); }
#else
constexpr int64_t kLanes = 8;
typedef float Vector __attribute__((vector_size(32)));
typedef int32_t Places __attribute__((vector_size(32)));
typedef Places Mask;
constexpr Places kEven = {0, 2, 4, 6, 8, 10, 12, 14};

Mask lanes(int64_t first, int64_t end) {
  const Places place = {0, 1, 2, 3, 4, 5, 6, 7};
  return (place >= static_cast<int32_t>(first)) & (place < static_cast<int32_t>(end));
}
#if defined(__AVX__)
inline Vector load(const float* from, Mask mask) { return (Vector)_mm256_maskload_ps(from, (__m256i)mask); }
inline void store(float* to, Mask mask, Vector v) { _mm256_maskstore_ps(to, (__m256i)mask, (__m256)v); }
#else
inline Vector load(const float* from, Mask mask) {
  Vector v{};
  for (int i = 0; i < kLanes; ++i)
    if (mask[i]) v[i] = from[i];
  return v;
}
inline void store(float* to, Mask mask, Vector v) {
  for (int i = 0; i < kLanes; ++i)
    if (mask[i]) to[i] = v[i];
}
#endif
#endif

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

struct Plane {
  int64_t high, wide, out_high, out_wide;
};

// The lanes of a vector that begins in column `at` (-1 is the border) which lie in the plane.
Mask inside(int64_t at, int64_t wide) {
  const int64_t first = std::clamp<int64_t>(-at, 0, kLanes), end = std::clamp<int64_t>(wide - at, first, kLanes);
  return lanes(first, end);
}

// One row of a plane as the outputs from one column on see it: the pixels left of each, those below it, and those right of it.
template <int Stride>
struct Taps;

template <>
struct Taps<1> {
  Mask masks[3];
  int64_t at;

  Taps(int64_t column, int64_t wide) : masks{inside(column - 1, wide), inside(column, wide), inside(column + 1, wide)}, at(column - 1) {}

  void load_row(const float* row, Vector (&found)[3]) const {
    for (int i = 0; i < 3; ++i) found[i] = load(row + at + i, masks[i]);
  }
};

template <>
struct Taps<2> {  // every second pixel of two vectors
  Mask masks[4];
  int64_t at;

  Taps(int64_t column, int64_t wide)
      : masks{inside(2 * column - 1, wide), inside(2 * column - 1 + kLanes, wide), inside(2 * column + 1, wide),
              inside(2 * column + 1 + kLanes, wide)},
        at(2 * column - 1) {}

  void load_row(const float* row, Vector (&found)[3]) const {
    const Vector a = load(row + at, masks[0]), b = load(row + at + kLanes, masks[1]);
    found[0] = __builtin_shuffle(a, b, kEven);
    found[1] = __builtin_shuffle(a, b, kEven + 1);
    found[2] = __builtin_shuffle(load(row + at + 2, masks[2]), load(row + at + 2 + kLanes, masks[3]), kEven);
  }
};

inline Vector added(Vector sum, const Vector (&pixels)[3], const Vector* w) { return sum + pixels[0] * w[0] + pixels[1] * w[1] + pixels[2] * w[2]; }

template <int Stride>
void convolve(const float* x, const float* weight, float bias, float low, float high, const Plane& p, float* y) {
  Vector w[9];
  for (int i = 0; i < 9; ++i) w[i] = weight[i] - Vector{};
  const Vector start = bias - Vector{}, least = low - Vector{}, most = high - Vector{};
  for (int64_t column = 0; column < p.out_wide; column += kLanes) {
    const Taps<Stride> taps(column, p.wide);
    const Mask written = inside(column, p.out_wide);
    float* to = y + column;
    const auto finish = [&](Vector sum) {
      sum = sum < least ? least : sum;  // NaN stays NaN
      sum = sum > most ? most : sum;
      store(to, written, sum);
      to += p.out_wide;
    };
    const float* row = x;
    Vector pixels[3];
    if constexpr (Stride == 1) {
      Vector above, here = start;  // sums of the rows of outputs above this row of pixels, and beside it
      taps.load_row(row, pixels);
      above = added(here, pixels, w + 3);
      here = added(start, pixels, w);
      for (int64_t r = 1; r < p.high; ++r) {
        row += p.wide;
        taps.load_row(row, pixels);
        finish(added(above, pixels, w + 6));
        above = added(here, pixels, w + 3);
        here = added(start, pixels, w);
      }
      finish(above);
    } else {
      Vector here = start;
      for (int64_t r = 0; r < p.high; ++r, row += p.wide) {
        taps.load_row(row, pixels);
        if (r % 2 == 0) {
          here = added(here, pixels, w + 3);
          continue;
        }
        finish(added(here, pixels, w + 6));
        here = added(start, pixels, w);
      }
      if (p.high % 2) finish(here);
    }
  }
}

Tensor depthwise(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, double low, double high) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous() && x.scalar_type() == at::kFloat, "x must be contiguous float32 (batch, c, h, w)");
  const int64_t batch = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == at::kFloat && weight.size(0) == channels &&
                        weight.size(1) == 9,
                    "weight must be contiguous float32 (", channels, ", 9)");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->is_contiguous() && bias->scalar_type() == at::kFloat && bias->size(0) == channels),
                    "bias must be contiguous float32 (", channels, ")");
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  TORCH_CHECK_VALUE(x.size(2) > 0 && x.size(3) > 0, "x must have pixels");
  const Plane p{x.size(2), x.size(3), (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1};
  Tensor y = at::empty({batch, channels, p.out_high, p.out_wide}, x.options());
  const int64_t parts = threads(), planes = batch * channels;
  const float *from = x.data_ptr<float>(), *weights = weight.data_ptr<float>(), *biases = bias ? bias->data_ptr<float>() : nullptr;
  float* to = y.data_ptr<float>();
  const auto run = stride == 1 ? convolve<1> : convolve<2>;
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = planes * part / parts; i < planes * (part + 1) / parts; ++i) {
      const int64_t channel = i % channels;
      run(from + i * p.high * p.wide, weights + 9 * channel, biases ? biases[channel] : 0.0f, static_cast<float>(low),
          static_cast<float>(high), p, to + i * p.out_high * p.out_wide);
    }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("depthwise(Tensor x, Tensor weight, Tensor? bias, int stride, float low, float high) -> Tensor");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) { m.impl("depthwise", depthwise); }
