// Selective scan h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t, y_t = <h_t, C_t> + D u_t in one pass over memory, and its gradients.
//
// u and dt are (batch, tokens, channels), A (channels, states), B and C (batch, tokens, states), all float32. A register holds
// neighbouring channels; the states of one block of channels stay in the first-level cache. Nothing of size tokens x channels x
// states is stored: the forward pass keeps the state in front of every segment of kSegment tokens, and the backward pass computes
// the states of one segment again from there.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "attention.h"

namespace {

constexpr int64_t kSegment = 64;

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// `count` floats; the lanes behind them are 0.
inline Vec load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(float));
  return load(some);
}

inline void store_some(float* p, Vec v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  float some[kLanes];
  store(some, v);
  std::memcpy(p, some, count * sizeof(float));
}

// 2^x, exactly 1 at 0 and right to half a unit near it: thousands of decays are multiplied, where a bias would add up.
inline Vec decay(Vec x) {
#ifdef ASSAY_AVX512
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x - round(x); 0 for an infinity
#else
  const Vec given = x;
  x = x < -126.0f ? all(-126.0f) : x;
  x = x > 127.0f ? all(127.0f) : x;
  const Vec whole = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the nearest integer
  const Vec f = x - whole;
#endif
  const Vec p = (((((all(0.000154035304f) * f + 0.00133335581f) * f + 0.00961812911f) * f + 0.0555041087f) * f + 0.240226507f) * f + 0.693147181f) * f + 1.0f;
#ifdef ASSAY_AVX512
  return _mm512_scalef_ps(p, x - f);
#else
  const IntVec power = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  const Vec found = p * scale;
  return given < -126.0f ? Vec{} : found;
#endif
}

struct Sizes {
  int64_t batch, tokens, channels, states;
  int64_t segments() const { return blocks_of(tokens, kSegment); }
  int64_t blocks() const { return blocks_of(channels, kLanes); }
};

Sizes check(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
            const OptTensor& h0) {
  const auto plain = [](const Tensor& x) { return x.is_contiguous() && x.scalar_type() == at::kFloat; };
  TORCH_CHECK_VALUE(u.dim() == 3 && plain(u) && plain(dt) && dt.sizes() == u.sizes(),
                    "u and dt must be contiguous float32 (batch, tokens, channels)");
  const Sizes s{u.size(0), u.size(1), u.size(2), A.dim() == 2 ? A.size(1) : 0};
  TORCH_CHECK_VALUE(A.dim() == 2 && plain(A) && A.size(0) == s.channels, "A must be contiguous float32 (channels, states)");
  const std::vector<int64_t> tokens{s.batch, s.tokens, s.states};
  TORCH_CHECK_VALUE(plain(B) && plain(C) && B.sizes().vec() == tokens && C.sizes().vec() == tokens,
                    "B and C must be contiguous float32 (batch, tokens, states)");
  TORCH_CHECK_VALUE(!D || (plain(*D) && D->sizes() == at::IntArrayRef({s.channels})), "D must be contiguous float32 (channels)");
  TORCH_CHECK_VALUE(!h0 || (plain(*h0) && h0->sizes() == at::IntArrayRef({s.batch, s.channels, s.states})),
                    "h0 must be contiguous float32 (batch, channels, states)");
  return s;
}

// (channels, states) rows of one block to (states, lanes); `scale` on the way.
void gather(const float* from, float* to, int64_t states, int64_t count, float scale) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t i = 0; i < kLanes; ++i) to[n * kLanes + i] = i < count ? scale * from[i * states + n] : 0.0f;
}

void scatter(const float* from, float* to, int64_t states, int64_t count) {
  for (int64_t n = 0; n < states; ++n)
    for (int64_t i = 0; i < count; ++i) to[i * states + n] = from[n * kLanes + i];
}

// y, the last state, and the states in front of the segments, (batch, blocks, segments, states, lanes), empty unless `keep`.
std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
                                                  const Tensor& C, const OptTensor& D, const OptTensor& h0, bool keep) {
  const Sizes s = check(u, dt, A, B, C, D, h0);
  Tensor y = at::empty_like(u), last = at::empty({s.batch, s.channels, s.states}, u.options());
  Tensor kept = at::empty({keep ? s.batch : 0, s.blocks(), s.segments(), s.states, kLanes}, u.options());
  const float *pu = u.data_ptr<float>(), *pdt = dt.data_ptr<float>(), *pa = A.data_ptr<float>();
  const float *pb = B.data_ptr<float>(), *pc = C.data_ptr<float>();
  const float *pd = D ? D->data_ptr<float>() : nullptr, *ph = h0 ? h0->data_ptr<float>() : nullptr;
  float *py = y.data_ptr<float>(), *plast = last.data_ptr<float>(), *pkept = kept.data_ptr<float>();
  const int64_t width = s.states * kLanes;
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t task = 0; task < s.batch * s.blocks(); ++task) {
    const int64_t row = task / s.blocks(), block = task % s.blocks(), first = block * kLanes;
    const int64_t count = std::min<int64_t>(kLanes, s.channels - first);
    std::vector<float> a(width), h(width, 0.0f);
    gather(pa + first * s.states, a.data(), s.states, count, kLog2e);
    if (ph) gather(ph + (row * s.channels + first) * s.states, h.data(), s.states, count, 1.0f);
    const Vec skip = pd ? load_some(pd + first, count) : Vec{};
    for (int64_t t = 0; t < s.tokens; ++t) {
      if (keep && t % kSegment == 0)
        std::memcpy(pkept + (task * s.segments() + t / kSegment) * width, h.data(), width * sizeof(float));
      const int64_t at = (row * s.tokens + t) * s.channels + first;
      const float *bt = pb + (row * s.tokens + t) * s.states, *ct = pc + (row * s.tokens + t) * s.states;
      const Vec step = load_some(pdt + at, count), in = load_some(pu + at, count), added = step * in;
      Vec out = skip * in;
      for (int64_t n = 0; n < s.states; ++n) {
        const Vec state = decay(step * load(&a[n * kLanes])) * load(&h[n * kLanes]) + added * all(bt[n]);
        store(&h[n * kLanes], state);
        out = state * all(ct[n]) + out;
      }
      store_some(py + at, out, count);
    }
    scatter(h.data(), plast + (row * s.channels + first) * s.states, s.states, count);
  }
  return {y, last, kept};
}

// Gradients of u, dt, A, B, C, D, h0 from those of y and of the last state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad, const OptTensor& grad_last, const Tensor& u, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptTensor& D, const Tensor& kept) {
  const Sizes s = check(u, dt, A, B, C, D, grad_last);
  TORCH_CHECK_VALUE(grad.sizes() == u.sizes() && grad.is_contiguous() && grad.scalar_type() == at::kFloat, "grad must be like u");
  TORCH_CHECK_VALUE(kept.numel() == s.batch * s.blocks() * s.segments() * s.states * kLanes && kept.is_contiguous(),
                    "kept must come from the forward pass");
  const int64_t width = s.states * kLanes, groups = std::min<int64_t>(s.blocks(), blocks_of(threads(), std::max<int64_t>(s.batch, 1)));
  const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, u.options()); };
  Tensor du = at::empty_like(u), ddt = at::empty_like(u), dh0 = zeros({s.batch, s.channels, s.states});
  // gradients summed over tasks have a slice a task: rows for A and D, groups of blocks for B and C
  Tensor dA = zeros({s.batch, s.channels, s.states}), dD = zeros({s.batch, s.channels});
  Tensor dB = zeros({groups, s.batch, s.tokens, s.states}), dC = zeros({groups, s.batch, s.tokens, s.states});
  const float *pg = grad.data_ptr<float>(), *pl = grad_last ? grad_last->data_ptr<float>() : nullptr;
  const float *pu = u.data_ptr<float>(), *pdt = dt.data_ptr<float>(), *pa = A.data_ptr<float>();
  const float *pb = B.data_ptr<float>(), *pc = C.data_ptr<float>(), *pkept = kept.data_ptr<float>();
  const float* pd = D ? D->data_ptr<float>() : nullptr;
  float *pdu = du.data_ptr<float>(), *pddt = ddt.data_ptr<float>(), *pdh = dh0.data_ptr<float>(), *pda = dA.data_ptr<float>();
  float *pdd = dD.data_ptr<float>(), *pdb = dB.data_ptr<float>(), *pdc = dC.data_ptr<float>();
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t task = 0; task < s.batch * groups; ++task) {
    const int64_t row = task / groups, group = task % groups;
    float* db_row = pdb + (group * s.batch + row) * s.tokens * s.states;
    float* dc_row = pdc + (group * s.batch + row) * s.tokens * s.states;
    std::vector<float> a(width), lambda(width), da(width), states((kSegment + 1) * width), shares(kSegment * width);
    for (int64_t block = group; block < s.blocks(); block += groups) {
      const int64_t first = block * kLanes, count = std::min<int64_t>(kLanes, s.channels - first);
      gather(pa + first * s.states, a.data(), s.states, count, kLog2e);
      std::fill(lambda.begin(), lambda.end(), 0.0f);  // the gradient of the state behind the token at hand
      std::fill(da.begin(), da.end(), 0.0f);
      if (pl) gather(pl + (row * s.channels + first) * s.states, lambda.data(), s.states, count, 1.0f);
      const Vec skip = pd ? load_some(pd + first, count) : Vec{};
      Vec skip_grad{};
      for (int64_t segment = s.segments() - 1; segment >= 0; --segment) {
        const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, s.tokens);
        std::memcpy(states.data(), pkept + ((row * s.blocks() + block) * s.segments() + segment) * width, width * sizeof(float));
        for (int64_t t = begin; t < end; ++t) {
          const int64_t at = (row * s.tokens + t) * s.channels + first;
          const float *bt = pb + (row * s.tokens + t) * s.states, *before = &states[(t - begin) * width];
          float *after = &states[(t - begin + 1) * width], *share_at = &shares[(t - begin) * width];
          const Vec step = load_some(pdt + at, count), added = step * load_some(pu + at, count);
          for (int64_t n = 0; n < s.states; ++n) {
            const Vec kept_share = decay(step * load(&a[n * kLanes]));
            store(share_at + n * kLanes, kept_share);
            store(after + n * kLanes, kept_share * load(before + n * kLanes) + added * all(bt[n]));
          }
        }
        for (int64_t t = end - 1; t >= begin; --t) {
          const int64_t at = (row * s.tokens + t) * s.channels + first, token = (row * s.tokens + t) * s.states;
          const float *bt = pb + token, *ct = pc + token;
          const float *before = &states[(t - begin) * width], *after = before + width, *share_at = &shares[(t - begin) * width];
          const Vec up = load_some(pg + at, count), step = load_some(pdt + at, count), in = load_some(pu + at, count);
          const Vec added = step * in;
          Vec of_added{}, of_step{};
          for (int64_t begin_n = 0; begin_n < s.states; begin_n += kLanes) {
            const int64_t some = std::min<int64_t>(kLanes, s.states - begin_n);
            Vec of_b[kLanes] = {}, of_c[kLanes] = {};
            for (int64_t i = 0; i < some; ++i) {
              const int64_t n = begin_n + i;
              const Vec of_state = up * all(ct[n]) + load(&lambda[n * kLanes]), share = load(share_at + n * kLanes) * of_state;
              const Vec of_exponent = share * load(before + n * kLanes);
              store(&lambda[n * kLanes], share);
              store(&da[n * kLanes], of_exponent * step + load(&da[n * kLanes]));
              of_step = of_exponent * load(&a[n * kLanes]) + of_step;
              of_added = of_state * all(bt[n]) + of_added;
              of_b[i] = of_state * added;
              of_c[i] = up * load(after + n * kLanes);
            }
            float *db = db_row + t * s.states + begin_n, *dc = dc_row + t * s.states + begin_n;
            store_some(db, load_some(db, some) + sums_of(of_b), some);
            store_some(dc, load_some(dc, some) + sums_of(of_c), some);
          }
          skip_grad = up * in + skip_grad;
          store_some(pdu + at, of_added * step + up * skip, count);
          store_some(pddt + at, of_added * in + of_step * all(1.0f / kLog2e), count);
        }
      }
      scatter(lambda.data(), pdh + (row * s.channels + first) * s.states, s.states, count);
      scatter(da.data(), pda + (row * s.channels + first) * s.states, s.states, count);
      store_some(pdd + row * s.channels + first, skip_grad, count);
    }
  }
  return {du, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dh0};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? h0, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_backward(Tensor grad, Tensor? grad_last, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("selective_scan", selective_scan);
  m.impl("selective_scan_backward", selective_scan_backward);
}
