// Memory layers: hash a token, weigh its buckets, and add up the rows they name, in one pass; no gradients.
//
// x is (tokens, K * bits); each of the tables is (K * 2^bits, width) in the dtype of x, float32 or bfloat16, and all of them are
// read with the same codes and weights. Sums are in float32. The rows of a token lie anywhere in memory, so that all that can be
// done is to ask for the next ones early.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kAhead = 4;  // rows

enum Weight : int64_t { kSoftmax, kCosine, kMagnitude };

inline float wide(float x) { return x; }
inline float wide(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  *to = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The row of each of K tables (tables one after the other) and its weight.
template <class T>
void hash(const T* x, int64_t count, int64_t bits, int64_t kind, float temperature, int64_t* rows, float* weights) {
  for (int64_t k = 0; k < count; ++k) {
    float size[16], squares = 0, sum = 0, largest = 0, product = 1;
    int64_t code = 0;
    for (int64_t i = 0; i < bits; ++i) {
      const float z = wide(x[k * bits + i]);
      code = 2 * code + (z >= 0);
      size[i] = std::abs(z);
      sum += size[i];
      largest = std::max(largest, size[i]);
    }
    float slope = -2;
    if (kind == kCosine) {  // the largest number made 1, so that squares neither overflow nor vanish
      for (int64_t i = 0; i < bits; ++i) {
        if (largest > 0) size[i] /= largest;
        squares += size[i] * size[i];
      }
      slope = -2 / (temperature * (largest > 0 ? std::sqrt(squares) : 1) * std::sqrt(static_cast<float>(bits)));
    }
    for (int64_t i = 0; i < bits; ++i) product *= 1 + std::exp(slope * size[i]);
    rows[k] = (k << bits) + code;
    weights[k] = (kind == kMagnitude ? sum : 1) / product;
  }
}

template <class T>
void look_up(const T* x, const std::vector<const T*>& tables, const std::vector<const T*>& biases, const std::vector<T*>& outputs,
             const std::vector<int64_t>& widths, int64_t tokens, int64_t count, int64_t bits, int64_t kind, float temperature) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(threads) if (tokens > 1)
  {
    std::vector<int64_t> rows(count);
    std::vector<float> weights(count), sum;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      hash(x + t * count * bits, count, bits, kind, temperature, rows.data(), weights.data());
      for (size_t l = 0; l < tables.size(); ++l) {
        const int64_t width = widths[l];
        sum.assign(width, 0.0f);
        if (biases[l] != nullptr)
          for (int64_t j = 0; j < width; ++j) sum[j] = wide(biases[l][j]);
        float* to = sum.data();
        for (int64_t k = 0; k < count; ++k) {
          const size_t table = k + kAhead < count ? l : l + 1;  // of the row that comes kAhead later
          const int64_t ahead = table == l ? k + kAhead : k + kAhead - count;
          if (table < tables.size() && ahead < count) {
            const char* next = reinterpret_cast<const char*>(tables[table] + rows[ahead] * widths[table]);
            const int64_t bytes = widths[table] * static_cast<int64_t>(sizeof(T));
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte);
          }
          const T* row = tables[l] + rows[k] * width;
          const float weight = weights[k];
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) to[j] += weight * wide(row[j]);
        }
        for (int64_t j = 0; j < width; ++j) narrow(to[j], outputs[l] + t * width + j);
      }
    }
  }
}

std::vector<Tensor> memory_look_up(const Tensor& x, at::TensorList tables, const c10::List<std::optional<Tensor>>& biases,
                                   int64_t bits, int64_t weight, double temperature) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (tokens, features)");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x must be float32 or bfloat16");
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 16 && x.size(1) % bits == 0, "bits must be from 1 to 16 and divide the features");
  TORCH_CHECK_VALUE(weight >= kSoftmax && weight <= kMagnitude && temperature > 0, "weight must be 0, 1 or 2, temperature positive");
  TORCH_CHECK_VALUE(biases.size() == tables.size(), "biases must be as many as tables");
  const int64_t count = x.size(1) / bits;
  std::vector<Tensor> outputs;
  for (size_t l = 0; l < tables.size(); ++l) {
    const Tensor& table = tables[l];
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) == count << bits && table.is_contiguous() && table.scalar_type() == x.scalar_type(),
                      "tables must be contiguous (K * 2^bits, width) in the dtype of x");
    const std::optional<Tensor> bias = biases.get(l);
    TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == table.size(1) && bias->is_contiguous() &&
                                bias->scalar_type() == x.scalar_type()),
                      "biases must be (width) in the dtype of x");
    outputs.push_back(at::empty({x.size(0), table.size(1)}, x.options()));
  }
  auto run = [&](auto number) {
    using T = decltype(number);
    std::vector<const T*> from, added;
    std::vector<T*> to;
    std::vector<int64_t> widths;
    for (size_t l = 0; l < tables.size(); ++l) {
      const std::optional<Tensor> bias = biases.get(l);
      from.push_back(static_cast<const T*>(tables[l].const_data_ptr()));
      added.push_back(bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr);
      to.push_back(static_cast<T*>(outputs[l].mutable_data_ptr()));
      widths.push_back(tables[l].size(1));
    }
    look_up(static_cast<const T*>(x.const_data_ptr()), from, added, to, widths, x.size(0), count, bits, weight,
            static_cast<float>(temperature));
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(uint16_t{});
  return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("memory_look_up(Tensor x, Tensor[] tables, Tensor?[] biases, int bits, int weight, float temperature) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) { m.impl("memory_look_up", memory_look_up); }
