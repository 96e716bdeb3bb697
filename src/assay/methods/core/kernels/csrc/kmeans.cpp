// One iteration of k-means: the nearest centre of every token, and the sums of the tokens of each centre.
//
// Of |x - c|^2 only |c|^2 / 2 - x.c tells the centres apart. Tokens are taken a tile at a time, turned so that they lie in the lanes
// of vectors; each centre of a group is then one product and sum a dimension, and the largest closeness stays in registers: no
// matrix of distances is written. The tile's tokens are added to their centres while they are in the cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16, kVectors = 2, kTile = kLanes * kVectors;  // tokens
constexpr int64_t kGroup = 8;                                            // centres

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// The centres of one row: groups (groups, dim, kGroup), and -|c|^2 / 2, which is -infinity for those that fill the last group.
struct Centres {
  int64_t dim, groups;
  std::vector<float> packed, shift;

  Centres(const float* centres, int64_t count, int64_t dim)
      : dim(dim),
        groups((count + kGroup - 1) / kGroup),
        packed(groups * dim * kGroup, 0.0f),
        shift(groups * kGroup, -std::numeric_limits<float>::infinity()) {
    for (int64_t c = 0; c < count; ++c) {
      float square = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const float value = centres[c * dim + d];
        packed[(c / kGroup * dim + d) * kGroup + c % kGroup] = value;
        square += value * value;
      }
      shift[c] = -square / 2;
    }
  }
};

inline Floats read(const float* from) {
  typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
  return *reinterpret_cast<const Unaligned*>(from);
}

// The closest of the centres for a tile of tokens, turned to (dim, kTile); the first of equals.
inline void closest(const float* tile, const Centres& centres, float* most, int32_t* which) {
  Floats best[kVectors];
  Ints index[kVectors] = {};
  for (Floats& one : best) one = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t group = 0; group < centres.groups; ++group) {
    const float* packed = centres.packed.data() + group * centres.dim * kGroup;
    Floats sums[kGroup][kVectors];
    for (int64_t c = 0; c < kGroup; ++c)
      for (int64_t v = 0; v < kVectors; ++v) sums[c][v] = Floats{} + centres.shift[group * kGroup + c];
    for (int64_t d = 0; d < centres.dim; ++d) {
      Floats x0 = read(tile + d * kTile), x1 = read(tile + d * kTile + kLanes);
#ifdef __AVX512F__
      asm("" : "+v"(x0), "+v"(x1));  // g++ would keep them in memory
#endif
      for (int64_t c = 0; c < kGroup; ++c) {
        sums[c][0] += packed[d * kGroup + c] * x0;
        sums[c][1] += packed[d * kGroup + c] * x1;
      }
    }
    for (int64_t c = 0; c < kGroup; ++c)
      for (int64_t v = 0; v < kVectors; ++v) {
        const Ints closer = sums[c][v] > best[v];
        best[v] = closer ? sums[c][v] : best[v];
        index[v] = closer ? Ints{} + int32_t(group * kGroup + c) : index[v];
      }
  }
  std::memcpy(most, best, sizeof(best));
  std::memcpy(which, index, sizeof(index));
}

// Tokens [begin, end) of one row: their labels; sums (clusters, dim) and counts (clusters) are added to; returns the total closeness.
double assign(const float* x, const Centres& centres, int64_t begin, int64_t end, int64_t* labels, float* sums, int64_t* counts) {
  const int64_t dim = centres.dim;
  std::vector<float> tile(dim * kTile, 0.0f);
  alignas(64) float most[kTile];
  alignas(64) int32_t which[kTile];
  double total = 0;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t tokens = std::min(kTile, end - first);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t d = 0; d < dim; ++d) tile[d * kTile + t] = x[(first + t) * dim + d];
    closest(tile.data(), centres, most, which);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* from = x + (first + t) * dim;
      float* to = sums + which[t] * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
      labels[first + t] = which[t];
      ++counts[which[t]];
      total += most[t];
    }
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kmeans_step(const Tensor& x, const Tensor& centres) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.is_contiguous() && x.scalar_type() == at::kFloat && x.numel(),
                    "x must be contiguous float32 (rows, tokens, dim), not empty");
  TORCH_CHECK_VALUE(centres.dim() == 3 && centres.is_contiguous() && centres.scalar_type() == at::kFloat &&
                        centres.size(0) == x.size(0) && centres.size(1) && centres.size(2) == x.size(2),
                    "centres must be contiguous float32 (rows, clusters, dim) of the rows and dim of x");
  const int64_t rows = x.size(0), tokens = x.size(1), dim = x.size(2), clusters = centres.size(1);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = std::min((threads + rows - 1) / rows, (tokens + kTile - 1) / kTile);  // of a row
  Tensor labels = at::empty({rows, tokens}, x.options().dtype(at::kLong));
  Tensor sums = at::zeros({rows, clusters, dim}, x.options());
  Tensor counts = at::zeros({rows, clusters}, x.options().dtype(at::kLong));
  Tensor closeness = at::zeros({rows}, x.options().dtype(at::kDouble));
  const float *tokens_of = x.data_ptr<float>(), *centres_of = centres.data_ptr<float>();
  // each part but a row's first one sums apart, so that the same threads give the same bits
  std::vector<std::vector<float>> more_sums(rows * parts);
  std::vector<std::vector<int64_t>> more_counts(rows * parts);
  std::vector<double> totals(rows * parts);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows * parts; ++i) {
    const int64_t row = i / parts, part = i % parts;
    const Centres packed(centres_of + row * clusters * dim, clusters, dim);
    float* to = sums.data_ptr<float>() + row * clusters * dim;
    int64_t* count = counts.data_ptr<int64_t>() + row * clusters;
    if (part) {
      to = (more_sums[i] = std::vector<float>(clusters * dim)).data();
      count = (more_counts[i] = std::vector<int64_t>(clusters)).data();
    }
    totals[i] = assign(tokens_of + row * tokens * dim, packed, tokens * part / parts, tokens * (part + 1) / parts,
                       labels.data_ptr<int64_t>() + row * tokens, to, count);
  }
  for (int64_t i = 0; i < rows * parts; ++i) {
    const int64_t row = i / parts;
    closeness.data_ptr<double>()[row] += totals[i];
    for (size_t n = 0; n < more_sums[i].size(); ++n) sums.data_ptr<float>()[row * clusters * dim + n] += more_sums[i][n];
    for (size_t n = 0; n < more_counts[i].size(); ++n) counts.data_ptr<int64_t>()[row * clusters + n] += more_counts[i][n];
  }
  return {labels, closeness, sums, counts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) { m.def("kmeans_step(Tensor x, Tensor centres) -> (Tensor, Tensor, Tensor, Tensor)"); }

TORCH_LIBRARY_IMPL(assay, CPU, m) { m.impl("kmeans_step", kmeans_step); }
