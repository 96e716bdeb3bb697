// Decoding with packed weights over keys and values in pages, many tokens in one call: the operators (the work is in decode_pass.h).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "decode_pass.h"

namespace {

// The rows of a call, checked: nothing that is read or written lies outside the pages.
Rows rows_of(const Model& model, const at::Tensor& keys, const at::Tensor& tables, const at::Tensor& of,
             const at::Tensor& positions, const at::Tensor& tokens, int64_t steps, bool together) {
  check(tables, "tables", at::kInt, 2);
  check(of, "of", at::kLong, 1);
  check(positions, "positions", at::kLong, 1);
  check(tokens, "tokens", at::kLong, 1);
  const int64_t n = of.numel(), pages = keys.size(1);
  TORCH_CHECK_VALUE(n > 0 && positions.numel() == n && tokens.numel() == n, "of, positions and tokens must have one entry per row");
  Rows rows;
  rows.tables = tables.const_data_ptr<int32_t>();
  rows.width = tables.size(1);
  rows.together = together;
  std::vector<bool> seen(tables.size(0));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t table = of.const_data_ptr<int64_t>()[i], position = positions.const_data_ptr<int64_t>()[i];
    const int64_t token = tokens.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(table >= 0 && table < tables.size(0) && (together || !seen[table]),
                      "of must name different tables, got ", table);
    seen[table] = true;
    TORCH_CHECK_VALUE(token >= 0 && token < model.vocab, "tokens must lie in 0..", model.vocab - 1, ", got ", token);
    TORCH_CHECK_VALUE(position >= 0 && position + steps <= rows.width * PAGE, "the tables reach to position ", rows.width * PAGE,
                      ", not ", position + steps);
    for (int64_t p = 0; p <= (position + steps - 1) / PAGE; ++p) {
      const int32_t page = rows.tables[table * rows.width + p];
      TORCH_CHECK_VALUE(page >= 0 && page < pages, "pages must lie in 0..", pages - 1, ", got ", page);
    }
    rows.table.push_back(table);
    rows.position.push_back(position);
    rows.token.push_back(token);
  }
  return rows;
}

template <typename F>
void with_pages(const at::Tensor& keys, const at::Tensor& values, const F& body) {
  if (keys.scalar_type() == at::kBFloat16)
    body(static_cast<uint16_t*>(keys.data_ptr()), static_cast<uint16_t*>(values.data_ptr()));
  else
    body(keys.data_ptr<float>(), values.data_ptr<float>());
}

std::tuple<at::Tensor, at::Tensor> decode_steps(at::TensorList weights, at::TensorList parts, at::IntArrayRef shape,
                                                at::ArrayRef<double> numbers, at::Tensor keys, at::Tensor values,
                                                const at::Tensor& tables, const at::Tensor& positions, const at::Tensor& tokens,
                                                int64_t steps, at::IntArrayRef eos, int64_t forbid, bool want_logits,
                                                const at::Tensor& choices, const at::Tensor& uniforms) {
  const Model model(weights, parts, shape, numbers, keys, values);
  TORCH_CHECK_VALUE(steps > 0, "steps must be positive, got ", steps);
  const int64_t n = tokens.numel();
  check(choices, "choices", at::kDouble, 2);
  check(uniforms, "uniforms", at::kDouble, 2);
  TORCH_CHECK_VALUE(choices.size(0) == n && choices.size(1) == 3, "choices must be (rows, 3), got ", choices.sizes());
  at::Tensor of = at::empty({n}, tokens.options());
  for (int64_t i = 0; i < n; ++i) of.data_ptr<int64_t>()[i] = i;
  const Rows rows = rows_of(model, keys, tables, of, positions, tokens, steps, false);
  Steps ask{steps, forbid, {eos.begin(), eos.end()}, {}, nullptr, nullptr};
  for (const int64_t e : ask.eos)
    TORCH_CHECK_VALUE(e >= 0 && e < model.vocab, "eos must lie in 0..", model.vocab - 1, ", got ", e);
  bool sampled = false;
  for (int64_t i = 0; i < n; ++i) {
    const double* c = choices.const_data_ptr<double>() + 3 * i;
    TORCH_CHECK_VALUE(c[0] >= 0 && c[1] >= 0 && c[2] >= 0, "choices must not be negative, got ", c[0], ", ", c[1], " and ", c[2]);
    ask.choices.push_back({c[0], static_cast<int64_t>(c[1]), c[2]});
    sampled = sampled || c[0] > 0;
  }
  TORCH_CHECK_VALUE(!sampled || (uniforms.size(0) == n && uniforms.size(1) == steps), "uniforms must be (rows, steps), got ",
                    uniforms.sizes());
  ask.uniforms = sampled ? uniforms.const_data_ptr<double>() : nullptr;
  at::Tensor out = at::full({n, steps}, -1, tokens.options());
  ask.out = out.data_ptr<int64_t>();
  at::Tensor logits = at::empty({want_logits ? n : 0, model.vocab}, keys.options().dtype(at::kFloat));
  with_pages(keys, values, [&](auto* k, auto* v) {
    Decoder<std::remove_pointer_t<decltype(k)>> decoder(model, k, v, keys.size(1), rows);
    decoder.steps(ask, want_logits ? logits.data_ptr<float>() : nullptr);
    decoder.check_finite();
  });
  return {out, logits};
}

at::Tensor decode_extend(at::TensorList weights, at::TensorList parts, at::IntArrayRef shape, at::ArrayRef<double> numbers,
                         at::Tensor keys, at::Tensor values, const at::Tensor& tables, const at::Tensor& of,
                         const at::Tensor& positions, const at::Tensor& tokens, const at::Tensor& slots) {
  const Model model(weights, parts, shape, numbers, keys, values);
  const Rows rows = rows_of(model, keys, tables, of, positions, tokens, 1, true);
  check(slots, "slots", at::kLong, 1);
  TORCH_CHECK_VALUE(slots.numel() == tokens.numel(), "slots must have one entry per row, got ", slots.numel());
  const int64_t* s = slots.const_data_ptr<int64_t>();
  int64_t wanted = 0;
  for (int64_t i = 0; i < slots.numel(); ++i)
    if (s[i] >= 0) {
      TORCH_CHECK_VALUE(s[i] == wanted, "slots must count the rows whose logits are wanted, and be -1 elsewhere");
      ++wanted;
    }
  at::Tensor logits = at::empty({wanted, model.vocab}, keys.options().dtype(at::kFloat));
  with_pages(keys, values, [&](auto* k, auto* v) {
    Decoder<std::remove_pointer_t<decltype(k)>> decoder(model, k, v, keys.size(1), rows);
    decoder.extend({s, s + slots.numel()}, wanted, logits.data_ptr<float>());
  });
  return logits;
}

at::Tensor draw_tokens(const at::Tensor& logits, const at::Tensor& choices, const at::Tensor& uniforms) {
  check(logits, "logits", at::kFloat, 2);
  check(choices, "choices", at::kDouble, 2);
  check(uniforms, "uniforms", at::kDouble, 1);
  const int64_t n = logits.size(0), vocabulary = logits.size(1);
  TORCH_CHECK_VALUE(uniforms.numel() == n && choices.size(0) == n && choices.size(1) == 3,
                    "choices must be (rows, 3) and uniforms (rows), got ", choices.sizes(), " and ", uniforms.sizes());
  at::Tensor out = at::empty({n}, logits.options().dtype(at::kLong));
  Chooser chooser;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits.const_data_ptr<float>() + i * vocabulary;
    const double* c = choices.const_data_ptr<double>() + 3 * i;
    const Choice choice{c[0], static_cast<int64_t>(c[1]), c[2]};
    out.data_ptr<int64_t>()[i] = choice.temperature > 0
                                     ? chooser.draw(row, vocabulary, choice, uniforms.const_data_ptr<double>()[i])
                                     : std::max_element(row, row + vocabulary) - row;
  }
  return out;
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
      "decode_steps(Tensor[] weights, Tensor[] parts, int[] shape, float[] numbers, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor tables, Tensor positions, Tensor tokens, int steps, int[] eos, int forbid, bool want_logits, Tensor choices, "
      "Tensor uniforms) -> (Tensor, Tensor)");
  m.def(
      "decode_extend(Tensor[] weights, Tensor[] parts, int[] shape, float[] numbers, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor tables, Tensor of, Tensor positions, Tensor tokens, Tensor slots) -> Tensor");
  m.def("draw_tokens(Tensor logits, Tensor choices, Tensor uniforms) -> Tensor");
  m.def("weight_memory(int bytes) -> Tensor");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("decode_steps", decode_steps);
  m.impl("decode_extend", decode_extend);
  m.impl("draw_tokens", draw_tokens);
}

TORCH_LIBRARY_IMPL(assay, CompositeExplicitAutograd, m) { m.impl("weight_memory", weight_memory); }
