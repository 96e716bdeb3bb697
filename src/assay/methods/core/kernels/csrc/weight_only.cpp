// The packed linear layer, and finding the codes that are packed.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <omp.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "panels.h"

namespace {

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

// ---- quantisation: the search of groups.quantize_groups ------------------------------------------------------------------

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("weight_only_linear(Tensor x, Tensor packed, int kind, int outputs) -> Tensor");
  m.def("quantize_groups(Tensor weight, int bits, int group, bool asymmetric) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("weight_only_linear", weight_only_linear);
  m.impl("quantize_groups", quantize_groups);
}
