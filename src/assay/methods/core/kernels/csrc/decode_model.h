// What stays the same from call to call of the decoder: the weights and the numbers of a model, and what is done to a single row.
//
// One form covers the families: RMS norms before attention and MLP, in some models after them too; queries and keys that are
// normalised or not; rotary embeddings of the whole head or its first part, of one kind or of one for each kind of layer; layers
// that see everything or a window; a gated MLP with SiLU or GELU.

#pragma once
#include <vector>

#include "decode_attention.h"
#include "panels.h"

namespace {

struct Model {
  int64_t layers, hidden, inner, heads, kv_heads, head, vocab, kind, head_kind;
  bool gelu;
  float eps, attention_scale, embedding_scale;
  std::vector<const uint8_t*> weights;  // q k v o gate up down per layer, then the head
  const float *norms, *last_norm;       // [layers][norms_a_layer][hidden], [hidden]
  int64_t norms_a_layer;                // 2: before attention and before the MLP; 4: after each of them too
  const float* bias;                    // [layers][q + 2 kv] or null
  const float* head_norms;              // [layers][2][head], of queries and of keys, or null
  const void* embedding;                // [vocab or more][hidden]
  bool embedding_bf16;
  int64_t ropes, half;         // kinds of rotary embeddings; half of what is rotated of a head
  const float *frequencies, *rope_scales;  // [ropes][half], [ropes]
  const int64_t* layout;       // [layers][2]: the window (0: none) and the kind of rotary embedding

  Model(at::TensorList weight, at::TensorList parts, at::IntArrayRef shape, at::ArrayRef<double> numbers, const at::Tensor& keys,
        const at::Tensor& values) {
    TORCH_CHECK_VALUE(shape.size() == 6 && numbers.size() == 3 && parts.size() == 8, "model must have 6 sizes, 3 numbers and 8 parts");
    TORCH_CHECK_VALUE(keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kBFloat16,
                      "keys must be float32 or bfloat16, got ", keys.scalar_type());
    check(keys, "keys", keys.scalar_type(), 5);
    check(values, "values", keys.scalar_type(), 5);
    kind = shape[0], head_kind = shape[1], heads = shape[2], inner = shape[3], vocab = shape[4], gelu = shape[5] != 0;
    eps = static_cast<float>(numbers[0]);
    attention_scale = static_cast<float>(numbers[1]);
    embedding_scale = static_cast<float>(numbers[2]);
    layers = keys.size(0), kv_heads = keys.size(2), head = keys.size(3);
    TORCH_CHECK_VALUE(keys.size(4) == PAGE && values.size(0) == layers && values.size(1) == keys.size(1) &&
                          values.size(2) == kv_heads && values.size(3) == PAGE && values.size(4) == head,
                      "keys must be (layers, pages, kv heads, head, 16) and values alike, got ", keys.sizes(), " and ",
                      values.sizes());
    TORCH_CHECK_VALUE(head % 16 == 0 && heads % kv_heads == 0, "head size must be a multiple of 16 and heads of kv heads");
    const at::Tensor &n = parts[0], &last = parts[1], &b = parts[2], &hn = parts[3], &e = parts[4], &f = parts[5], &s = parts[6];
    check(n, "norms", at::kFloat, 3);
    check(last, "last norm", at::kFloat, 1);
    check(e, "embedding", e.scalar_type(), 2);
    TORCH_CHECK_VALUE(e.scalar_type() == at::kFloat || e.scalar_type() == at::kBFloat16,
                      "embedding must be float32 or bfloat16, got ", e.scalar_type());
    check(f, "frequencies", at::kFloat, 2);
    check(s, "rope scales", at::kFloat, 1);
    check(parts[7], "layout", at::kLong, 2);
    hidden = e.size(1), norms_a_layer = n.size(1), ropes = f.size(0), half = f.size(1);
    TORCH_CHECK_VALUE(n.size(0) == layers && (norms_a_layer == 2 || norms_a_layer == 4) && n.size(2) == hidden &&
                          last.numel() == hidden,
                      "norms: got ", n.sizes(), " and ", last.sizes());
    TORCH_CHECK_VALUE(e.size(0) >= vocab, "embedding must have ", vocab, " rows, got ", e.sizes());
    TORCH_CHECK_VALUE(s.numel() == ropes && 2 * half <= head, "frequencies: got ", f.sizes(), " and scales ", s.sizes());
    TORCH_CHECK_VALUE(parts[7].size(0) == layers && parts[7].size(1) == 2, "layout: got ", parts[7].sizes());
    TORCH_CHECK_VALUE(b.numel() == 0 || b.numel() == layers * (q() + 2 * kv()), "bias: got ", b.sizes());
    TORCH_CHECK_VALUE(hn.numel() == 0 || hn.numel() == layers * 2 * head, "head norms: got ", hn.sizes());
    if (b.numel()) check(b, "bias", at::kFloat, 2);
    if (hn.numel()) check(hn, "head norms", at::kFloat, 3);
    norms = n.const_data_ptr<float>(), last_norm = last.const_data_ptr<float>();
    bias = b.numel() ? b.const_data_ptr<float>() : nullptr;
    head_norms = hn.numel() ? hn.const_data_ptr<float>() : nullptr;
    embedding = e.const_data_ptr(), embedding_bf16 = e.scalar_type() == at::kBFloat16;
    frequencies = f.const_data_ptr<float>(), rope_scales = s.const_data_ptr<float>();
    layout = parts[7].const_data_ptr<int64_t>();
    for (int64_t l = 0; l < layers; ++l)
      TORCH_CHECK_VALUE(window(l) >= 0 && rope(l) >= 0 && rope(l) < ropes, "layout: got a window of ", window(l), " and rope ", rope(l));
    TORCH_CHECK_VALUE(static_cast<int64_t>(weight.size()) == 7 * layers + 1, "weights must be 7 per layer and the head, got ",
                      weight.size());
    const int64_t outputs[7] = {q(), kv(), kv(), hidden, inner, inner, hidden};
    const int64_t widths[7] = {hidden, hidden, hidden, q(), hidden, hidden, inner};
    for (size_t i = 0; i + 1 < weight.size(); ++i) check_packed(weight[i], "weights", kind, outputs[i % 7], widths[i % 7]);
    check_packed(weight.back(), "head", head_kind, vocab, hidden);
    for (const at::Tensor& w : weight) weights.push_back(w.const_data_ptr<uint8_t>());
  }

  int64_t q() const { return heads * head; }
  int64_t kv() const { return kv_heads * head; }
  int64_t angles() const { return ropes * 2 * half; }  // floats of a row: cosines and sines of each kind
  int64_t window(int64_t layer) const { return layout[2 * layer]; }
  int64_t rope(int64_t layer) const { return layout[2 * layer + 1]; }
  const uint8_t* weight(int64_t layer, int64_t which) const { return weights[layer * 7 + which]; }

  const float* gain(int64_t layer, int64_t which) const { return norms + (layer * norms_a_layer + which) * hidden; }
  const float* before_attention(int64_t layer) const { return gain(layer, 0); }
  const float* after_attention(int64_t layer) const { return norms_a_layer == 4 ? gain(layer, 1) : nullptr; }
  const float* before_mlp(int64_t layer) const { return gain(layer, norms_a_layer / 2); }
  const float* after_mlp(int64_t layer) const { return norms_a_layer == 4 ? gain(layer, 3) : nullptr; }
  const float* head_norm(int64_t layer, int64_t which) const { return head_norms ? head_norms + (2 * layer + which) * head : nullptr; }

  // ---- what is done to a row ----

  // The embedding of a token, and the cosines and sines of its position.
  void start(int64_t token, int64_t position, float* x, float* angle) const {
    if (embedding_bf16) {
      const uint16_t* e = static_cast<const uint16_t*>(embedding) + token * hidden;
      for (int64_t i = 0; i < hidden; ++i) x[i] = of_bf16(e[i]) * embedding_scale;
    } else {
      const float* e = static_cast<const float*>(embedding) + token * hidden;
      for (int64_t i = 0; i < hidden; ++i) x[i] = e[i] * embedding_scale;
    }
    const float place = static_cast<float>(position);
    for (int64_t r = 0; r < ropes; ++r, angle += 2 * half)
      for (int64_t i = 0; i < half; ++i) {
        const double a = place * frequencies[r * half + i];
        angle[i] = static_cast<float>(std::cos(a)) * rope_scales[r];
        angle[half + i] = static_cast<float>(std::sin(a)) * rope_scales[r];
      }
  }

  float inverse_rms(const float* x, int64_t count) const {
    const int64_t whole = count / 16 * 16;
    v16f squares = {};
    for (int64_t i = 0; i < whole; i += 16) {
      const v16f v = load<v16f>(x + i);
      squares += v * v;
    }
    float sum = hsum(squares);
    for (int64_t i = whole; i < count; ++i) sum += x[i] * x[i];
    return 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
  }

  void norm(const float* x, const float* gain, float* to) const {
    const float r = inverse_rms(x, hidden);
    for (int64_t i = 0; i < hidden; ++i) to[i] = x[i] * r * gain[i];
  }

  // What a projection made joins the residual stream, through a norm where the model has one there.
  void join(const float* y, const float* gain, float* x) const {
    if (!gain) {
      for (int64_t i = 0; i < hidden; ++i) x[i] += y[i];
      return;
    }
    const float r = inverse_rms(y, hidden);
    for (int64_t i = 0; i < hidden; ++i) x[i] += y[i] * r * gain[i];
  }

  // A head of a query or key: normalised if there is a gain, rotated, scaled.
  void turn(const float* from, const float* gain, const float* angle, float scale, float* to) const {
    if (gain) {
      const float r = inverse_rms(from, head);
      for (int64_t d = 0; d < head; ++d) to[d] = from[d] * r * gain[d];
    } else {
      std::memcpy(to, from, head * sizeof(float));
    }
    for (int64_t d = 0; d < half; ++d) {
      const float a = to[d], b = to[half + d];
      to[d] = (a * angle[d] - b * angle[half + d]) * scale;
      to[half + d] = (b * angle[d] + a * angle[half + d]) * scale;
    }
    for (int64_t d = 2 * half; d < head; ++d) to[d] *= scale;
  }

  // The activation of the MLP. GELU by its tanh: 0.5 v (1 + tanh u) = v sigmoid(2 u).
  v16f activated(v16f v) const {
    const v16f z = gelu ? splat(1.5957691216f) * (v + splat(0.044715f) * v * v * v) : v;
    const v16f size = z > v16f{} ? z : -z, e = vexp(-size);  // neither side overflows
    return v * ((z > v16f{} ? splat(1.0f) : e) / (splat(1.0f) + e));
  }
};

}  // namespace
