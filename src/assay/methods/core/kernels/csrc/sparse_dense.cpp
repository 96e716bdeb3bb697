// A sparse matrix of weights (outputs, inputs) times dense rows of pixels: a pointwise convolution with pruned weights.
//
// Pixels are cut into strips of a few vectors. A thread copies the strip of every input channel side by side, where it stays in the
// cache, and then makes all outputs of the strip: each weight that is not 0 is multiplied with a vector of one channel's pixels, so
// that all loads are whole vectors however irregular the weights are. Weights are read in order, one stream for all strips: the
// values, and beside each the step from its channel to the next one's, the last step leading back to the first channel. Steps count
// channels, not bytes, so that one stream serves pictures of any size.
//
// In blocks of 2 or 4 neighbouring outputs that share their inputs, a vector of pixels is loaded once for all of them. Every output is
// summed in the same order whatever the width of its strip: results do not depend on the number of threads.
//
// Vectors are written with GCC's extension: 16 lanes are one AVX-512 register, 8 lanes one of AVX2.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

namespace {

using at::Tensor;

constexpr int64_t kMostWide = 4;            // vectors of a strip
constexpr int64_t kStripBytes = 64 * 1024;  // of all channels of a strip, up to which single weights get the widest: twice an L1 cache

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <int Lanes>
struct Vector;
template <>
struct Vector<16> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Vector<8> {
  typedef float type __attribute__((vector_size(32)));
};

struct Weights {
  const float* values;    // (places, block)
  const int32_t* steps;   // (places): from this channel to the next place's
  const int32_t* counts;  // (groups): places of each block of outputs
  const float* bias;      // (outputs), or null
  int64_t first, groups, inputs, outputs;
  float low, high;
};

// Copies `count` numbers in pieces of a fixed size: a copy of any size would call a function, or repeat a string operation,
// for a few bytes.
template <int Lanes>
[[gnu::noinline]] void copy_some(float* to, const float* from, int64_t count) {
  for (; count >= Lanes; count -= Lanes, to += Lanes, from += Lanes) std::memcpy(to, from, Lanes * sizeof(float));
#pragma GCC unroll 4
  for (int64_t piece = Lanes / 2; piece; piece /= 2)
    if (count & piece) {
      std::memcpy(to, from, piece * sizeof(float));
      to += piece;
      from += piece;
    }
}

// All outputs of one strip. `x` is (inputs, Wide * Lanes), `y` the strip's first pixel in the first output channel, whose rows are
// `stride` apart; `count` pixels of each row are written.
template <int Lanes, int Wide, int Block>
void strip(const float* x, const Weights& w, float* y, int64_t stride, int64_t count) {
  using V = typename Vector<Lanes>::type;
  constexpr int Ahead = Block == 1 ? 2 : 1;  // places that are summed apart, for a processor that can do two sums at a time
  constexpr int64_t kRow = Wide * Lanes;
  const V low = w.low - V{}, high = w.high - V{};
  const float *at = x + w.first * kRow, *value = w.values;
  const int32_t* step = w.steps;
  for (int64_t group = 0; group < w.groups; ++group) {
    V sum[Ahead][Block][Wide];
#pragma GCC unroll 4
    for (int b = 0; b < Block; ++b) {
      const V start = (w.bias ? w.bias[group * Block + b] : 0.0f) - V{};
#pragma GCC unroll 4
      for (int v = 0; v < Wide; ++v) {
        sum[0][b][v] = start;
        if constexpr (Ahead == 2) sum[1][b][v] = V{};
      }
    }
    int64_t left = w.counts[group];
    for (; left >= Ahead; left -= Ahead) {
#pragma GCC unroll 2
      for (int a = 0; a < Ahead; ++a) {
        V pixels[Wide];
#pragma GCC unroll 4
        for (int v = 0; v < Wide; ++v) std::memcpy(&pixels[v], at + v * Lanes, sizeof(V));
        at += static_cast<int64_t>(*step++) * kRow;
#pragma GCC unroll 4
        for (int b = 0; b < Block; ++b) {
          const V weight = value[b] - V{};
#pragma GCC unroll 4
          for (int v = 0; v < Wide; ++v) sum[a][b][v] += pixels[v] * weight;
        }
        value += Block;
      }
    }
    if constexpr (Ahead == 2) {
      if (left) {
        const V weight = *value++ - V{};
#pragma GCC unroll 4
        for (int v = 0; v < Wide; ++v) {
          V pixels;
          std::memcpy(&pixels, at + v * Lanes, sizeof(V));
          sum[0][0][v] += pixels * weight;
        }
        at += static_cast<int64_t>(*step++) * kRow;
      }
    }
    const auto finished = [&](int b, int v) {
      V found = sum[0][b][v];
      if constexpr (Ahead == 2) found += sum[1][b][v];
      found = found < low ? low : found;  // NaN stays NaN
      return found > high ? high : found;
    };
    float* to = y + group * Block * stride;
#pragma GCC unroll 4
    for (int b = 0; b < Block; ++b, to += stride)
      if (count == kRow) {
#pragma GCC unroll 4
        for (int v = 0; v < Wide; ++v) {
          const V found = finished(b, v);
          std::memcpy(to + v * Lanes, &found, sizeof(V));
        }
      } else {
        V found[Wide];
#pragma GCC unroll 4
        for (int v = 0; v < Wide; ++v) found[v] = finished(b, v);
        copy_some<Lanes>(to, reinterpret_cast<const float*>(found), count);
      }
  }
}

// The strip's pixels of all channels side by side, each channel's filled up with zeros.
template <int Lanes, int Wide>
void gather(const float* x, int64_t stride, int64_t inputs, int64_t count, float* to) {
  constexpr int64_t kRow = Wide * Lanes;
  for (int64_t i = 0; i < inputs; ++i, x += stride, to += kRow) {
    if (count == kRow) {
      std::memcpy(to, x, kRow * sizeof(float));
      continue;
    }
    std::memset(to + (count / Lanes * Lanes), 0, Lanes * sizeof(float));
    copy_some<Lanes>(to, x, count);
  }
}

template <int Lanes, int Wide, int Block>
void gathered_strip(const float* x, int64_t pixels, int64_t count, const Weights& w, float* buffer, float* y) {
  gather<Lanes, Wide>(x, pixels, w.inputs, count, buffer);
  strip<Lanes, Wide, Block>(buffer, w, y, pixels, count);
}

using Strip = void (*)(const float*, int64_t, int64_t, const Weights&, float*, float*);

template <int Lanes, int Block>
Strip of_width(int64_t wide) {
  switch (wide) {
    case 1: return gathered_strip<Lanes, 1, Block>;
    case 2: return gathered_strip<Lanes, 2, Block>;
    case 3: return gathered_strip<Lanes, 3, Block>;
    default: return gathered_strip<Lanes, 4, Block>;
  }
}

template <int Lanes>
Strip of_block(int64_t block, int64_t wide) {
  switch (block) {
    case 1: return of_width<Lanes, 1>(wide);
    case 2: return of_width<Lanes, 2>(wide);
    default: return of_width<Lanes, 4>(wide);
  }
}

// The widest strip, in vectors, that is used. Many channels make a strip fall out of the L1 cache, from where narrower ones are faster
// (measured), unless a block of outputs uses each of its vectors several times.
int64_t widest(int64_t strip, int64_t lanes, int64_t inputs, int64_t block) {
  if (strip > 0) return strip / lanes;
  if (lanes == 8 && block == 4) return 2;  // 16 registers
  return block > 1 || inputs * kMostWide * lanes * static_cast<int64_t>(sizeof(float)) <= kStripBytes ? kMostWide : 2;
}

void check(const Tensor& t, const char* name, at::ScalarType type, int64_t dims) {
  TORCH_CHECK_VALUE(t.scalar_type() == type && t.dim() == dims && t.is_contiguous() && t.device().is_cpu(), name,
                    " must be a contiguous CPU tensor of ", dims, " dimensions and type ", type, ", got ", t.sizes(), " ",
                    t.scalar_type());
}

// x (batch, inputs, pixels) -> (batch, outputs, pixels). That steps and counts lead through the channels is the caller's to check.
Tensor sparse_dense(const Tensor& x, const Tensor& values, const Tensor& steps, const Tensor& counts, const std::optional<Tensor>& bias,
                    int64_t first, double low, double high, int64_t width, int64_t lanes) {
  check(x, "x", at::kFloat, 3);
  check(values, "values", at::kFloat, 2);
  check(steps, "steps", at::kInt, 1);
  check(counts, "counts", at::kInt, 1);
  if (bias) check(*bias, "bias", at::kFloat, 1);
  if (lanes == 0) lanes = kLanes;
  const int64_t batch = x.size(0), inputs = x.size(1), pixels = x.size(2), block = values.size(1);
  const int64_t outputs = counts.size(0) * block;
  TORCH_CHECK_VALUE(lanes == 8 || lanes == 16, "lanes must be 0, 8 or 16, got ", lanes);
  TORCH_CHECK_VALUE(block == 1 || block == 2 || block == 4, "values must have 1, 2 or 4 columns, got ", block);
  TORCH_CHECK_VALUE(width >= 0 && width % lanes == 0 && width <= kMostWide * lanes, "width must be a multiple of ", lanes, " up to ",
                    kMostWide * lanes, ", got ", width);
  TORCH_CHECK_VALUE(steps.size(0) == values.size(0), "steps must be as many as the rows of values, got ", steps.size(0));
  TORCH_CHECK_VALUE(first >= 0 && first < inputs, "first must be one of ", inputs, " channels, got ", first);
  TORCH_CHECK_VALUE(!bias || bias->size(0) == outputs, "bias must have ", outputs, " numbers");
  Tensor y = at::empty({batch, outputs, pixels}, x.options());
  if (y.numel() == 0) return y;
  const Weights w{values.data_ptr<float>(), steps.data_ptr<int32_t>(), counts.data_ptr<int32_t>(),
                  bias ? bias->data_ptr<float>() : nullptr, first, counts.size(0), inputs, outputs,
                  static_cast<float>(low), static_cast<float>(high)};
  const int64_t parts = threads(), vectors = (pixels + lanes - 1) / lanes, most = widest(width, lanes, inputs, block);
  int64_t strips = (vectors + most - 1) / most;  // of one picture
  if (batch % parts && strips % parts) {  // as much for each thread, unless that makes strips of two vectors or less
    const int64_t even = strips + parts - strips % parts;
    if (strips < parts || vectors >= 3 * even) strips = std::min(vectors, even);
  }
  const int64_t all = batch * strips;
  const Tensor buffers = at::empty({parts, inputs * most * lanes}, x.options());
  const float* from = x.data_ptr<float>();
  float *to = y.data_ptr<float>(), *buffer = buffers.data_ptr<float>();
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t s = all * part / parts; s < all * (part + 1) / parts; ++s) {
      const int64_t picture = s / strips, here = s % strips;
      const int64_t begin = vectors * here / strips, end = vectors * (here + 1) / strips;
      const int64_t pixel = begin * lanes, count = std::min(end * lanes, pixels) - pixel;
      const Strip run = lanes == 16 ? of_block<16>(block, end - begin) : of_block<8>(block, end - begin);
      run(from + picture * inputs * pixels + pixel, pixels, count, w, buffer + part * inputs * most * lanes,
          to + picture * outputs * pixels + pixel);
    }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def(
      "sparse_dense(Tensor x, Tensor values, Tensor steps, Tensor counts, Tensor? bias, int first, float low, float high, int width, "
      "int lanes) -> Tensor");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) { m.impl("sparse_dense", sparse_dense); }
