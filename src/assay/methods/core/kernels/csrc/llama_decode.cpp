// Decoding of llama-family models with packed weights (panels.h), many tokens in one call.
//
// One decode call is one OpenMP parallel region: the threads meet at spin barriers between the phases of a layer.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <omp.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "panels.h"

namespace {

// ---- threads ---------------------------------------------------------------------------------------------------------------

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    if (threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 2000) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// ---- choosing a token --------------------------------------------------------------------------------------------------------

// Temperature, then top-k, then top-p, as transformers orders them; of what is left, the token where the cumulative
// probability in index order passes u (0 <= u < 1). top_k 0 and top_p 1 mean off.
int64_t draw(const float* logits, int64_t n, double temperature, int64_t top_k, double top_p, double u) {
  float cut = -std::numeric_limits<float>::infinity();
  std::vector<float> best;
  if (top_k > 0 && top_k < n) {
    best.resize(top_k);
    std::partial_sort_copy(logits, logits + n, best.begin(), best.end(), std::greater<float>());
    cut = best.back();
  }
  const float top = best.empty() ? *std::max_element(logits, logits + n) : best.front();
  const v16f inverse = splat(static_cast<float>(1.0 / temperature));
  std::vector<int32_t> index;
  std::vector<float> weight;
  if (cut > -std::numeric_limits<float>::infinity()) {
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] >= cut) index.push_back(static_cast<int32_t>(i)), weight.push_back(logits[i]);
  } else {
    weight.assign(logits, logits + n);
  }
  const int64_t kept = weight.size();
  weight.resize((kept + 15) / 16 * 16, -std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < weight.size(); i += 16)
    store(&weight[i], vexp((load<v16f>(&weight[i]) - splat(top)) * inverse));
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) total += weight[i];
  if (top_p < 1.0) {
    float smallest = 0;
    for (int64_t m = std::min<int64_t>(kept, 64);; m = std::min<int64_t>(kept, m * 16)) {
      best.resize(m);
      std::partial_sort_copy(weight.begin(), weight.begin() + kept, best.begin(), best.end(), std::greater<float>());
      double before = 0;
      int64_t i = 0;
      for (; i < m && (i == 0 || before < top_p * total); ++i) before += best[i];
      smallest = best[i - 1];
      if (i < m || m == kept) break;
    }
    total = 0;
    for (int64_t i = 0; i < kept; ++i) {
      if (weight[i] < smallest) weight[i] = 0;
      total += weight[i];
    }
  }
  double left = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < kept; ++i) {
    if (weight[i] == 0) continue;
    last = i;
    left -= weight[i];
    if (left < 0) break;
  }
  return index.empty() ? last : index[last];
}

// ---- the model ---------------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t layers, hidden, inner, heads, kv_heads, head, vocab, kind, head_kind;
  float eps;
  int64_t q() const { return heads * head; }
  int64_t kv() const { return kv_heads * head; }
};

struct Choice {
  double temperature;
  int64_t top_k;
  double top_p;
};

template <typename T>
class Decoder {  // T: float or uint16_t (bfloat16), the element of the cache
 public:
  Shape shape;
  std::vector<const uint8_t*> weights;  // q k v o gate up down per layer, then the head
  const float* norms;                   // [2 * layers + 1][hidden]
  const float* bias;                    // [layers][q + 2 kv] or null
  const uint8_t* embedding;
  bool embedding_bf16;
  const float* frequencies;  // [head / 2]
  float rope_scale;
  T *keys, *values;  // [layers][slots][kv_heads][blocks][head][16] and [layers][slots][kv_heads][blocks * 16][head]
  int64_t slots, blocks;
  int64_t* lengths;            // [slots]
  std::vector<int64_t> slot;   // of each row
  std::vector<int64_t> token;  // that each row feeds next
  std::vector<int64_t> eos;
  int64_t forbid;              // steps at the start in which no row may end
  bool sample;
  Choice choice;
  const double* uniforms;  // [rows][steps]
  int64_t* out;            // [rows][steps], -1 where nothing was produced
  float* logits;           // [rows][vocab] of the last step, or null
  int64_t steps;

  void run() {
    const int64_t rows = slot.size();
    const int64_t tasks = std::max<int64_t>(panels_of(shape.vocab), 1);
    const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), tasks));
    x_ = Buffer_(rows * shape.hidden);
    qkv_ = Buffer_(rows * (shape.q() + 2 * shape.kv()));
    angles_ = Buffer_(rows * shape.head);
    if (sample && !logits) own_logits_ = Buffer_(rows * shape.vocab), scores_ = own_logits_.data;
    if (logits) scores_ = logits;
    active_.resize(rows);
    for (int64_t i = 0; i < rows; ++i) active_[i] = i;
    setup(rows, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier_ = std::make_unique<Barrier>(omp_get_num_threads());
      worker(omp_get_thread_num(), omp_get_num_threads());
    }
    TORCH_CHECK_VALUE(!failed_.load(), "the logits are not finite: the weights or the cache hold NaN");
  }

 private:
  struct Buffer_ : Buffer<float> {
    explicit Buffer_(int64_t n = 0) : Buffer<float>(n) {}
    Buffer_& operator=(Buffer_&& o) noexcept {
      std::swap(data, o.data);
      return *this;
    }
  };
  Buffer_ x_, qkv_, angles_, partial_, own_logits_;
  float* scores_ = nullptr;
  std::vector<int64_t> active_;  // rows still running, in order
  std::vector<float> best_value_;
  std::vector<int64_t> best_index_;
  std::vector<Input> shared_;  // hidden, attention output, inner, hidden for the head
  std::unique_ptr<Barrier> barrier_;
  std::atomic<bool> failed_{false};
  int64_t part_ = 0;

  struct Local {  // what each thread has to itself; with one row also its own copy of the inputs
    Buffer<float> line, tile, scratch;
    std::vector<Input> inputs;
  };
  std::vector<Local> locals_;

  void setup(int64_t rows, int threads) {
    const int64_t group = shape.heads / shape.kv_heads;
    for (int t = 0; t < threads; ++t) {
      locals_.push_back({Buffer<float>(std::max(shape.hidden, shape.q())), Buffer<float>(2 * rows * PANEL),
                         Buffer<float>(group * (shape.head + CHUNK)), {}});
      if (rows > 1) continue;
      locals_.back().inputs.emplace_back(shape.kind, 1, shape.hidden);
      locals_.back().inputs.emplace_back(shape.kind, 1, shape.q());
      locals_.back().inputs.emplace_back(shape.head_kind, 1, shape.hidden);
    }
    shared_.emplace_back(shape.kind, rows, shape.hidden);
    shared_.emplace_back(shape.kind, rows, shape.q());
    shared_.emplace_back(shape.kind, rows, shape.inner);
    shared_.emplace_back(shape.head_kind, rows, shape.hidden);
    part_ = group * (shape.head + 2);  // running maximum, sum and output of the heads of a group
    part_ = (part_ + 15) / 16 * 16;
    partial_ = Buffer_(rows * shape.kv_heads * threads * part_);
    best_value_.resize(rows * threads);
    best_index_.resize(rows * threads);
  }

  const uint8_t* weight(int64_t layer, int64_t which) const { return weights[layer * 7 + which]; }

  // A few kilobytes of what a core reads next, asked for before it waits at a barrier.
  static void warm(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < std::min<int64_t>(bytes, 4096); i += 64) __builtin_prefetch(p + i, 0, 2);
  }

  void worker(int t, int threads) {
    const int64_t rows = slot.size(), H = shape.hidden;
    // With one row every thread prepares the inputs of a product for itself: that is cheaper than meeting once more.
    const bool alone = rows == 1;
    Local& local = locals_[t];
    Input& hidden = alone ? local.inputs[0] : shared_[0];
    Input& attended = alone ? local.inputs[1] : shared_[1];
    Input& inner = shared_[2];
    Input& last = alone ? local.inputs[2] : shared_[3];
    float *line = local.line, *tile = local.tile, *scratch = local.scratch;

    for (int64_t step = 0; step < steps && !active_.empty() && !failed_.load(std::memory_order_relaxed); ++step) {
      const int64_t n = active_.size();
      const Range mine = alone ? Range{0, 1} : share(n, t, threads);
      const Range embed = share(n, t, threads);
      for (int64_t i = embed.begin; i < embed.end; ++i) start_row(active_[i], x_ + i * H, angles_ + i * shape.head);
      barrier_->wait();

      for (int64_t layer = 0; layer < shape.layers; ++layer) {
        for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + 2 * layer * H, line, hidden, i);
        if (!alone) barrier_->wait();
        project_qkv(layer, t, threads, hidden, n, tile);
        barrier_->wait();
        attend(layer, t, threads, n, scratch);
        const int64_t o_bytes = panel_bytes(shape.kind, shape.q());
        warm(weight(layer, 3) + share(panels_of(H), t, threads).begin * o_bytes, o_bytes);
        barrier_->wait();
        for (int64_t i = mine.begin; i < mine.end; ++i) merge(i, n, threads, line, attended);
        if (!alone) barrier_->wait();
        project_add(weight(layer, 3), t, threads, attended, n, tile);
        barrier_->wait();
        for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + (2 * layer + 1) * H, line, hidden, i);
        if (!alone) barrier_->wait();
        gate_up(layer, t, threads, hidden, inner, n, tile);
        barrier_->wait();
        project_add(weight(layer, 6), t, threads, inner, n, tile);
        barrier_->wait();
      }

      for (int64_t i = mine.begin; i < mine.end; ++i) norm(x_ + i * H, norms + 2 * shape.layers * H, line, last, i);
      if (!alone) barrier_->wait();
      head(t, threads, last, n, step < forbid, tile);
      barrier_->wait();
      const Range pick = share(n, t, threads);
      for (int64_t i = pick.begin; i < pick.end; ++i) select(i, step, threads);
      barrier_->wait();
#pragma omp master
      {
        std::vector<int64_t> going;
        for (const int64_t row : active_)
          if (std::find(eos.begin(), eos.end(), token[row]) == eos.end()) going.push_back(row);
        active_ = std::move(going);
      }
      barrier_->wait();
    }
  }

  void start_row(int64_t row, float* x, float* angle) {
    const int64_t H = shape.hidden, half = shape.head / 2;
    if (embedding_bf16) {
      const uint16_t* e = reinterpret_cast<const uint16_t*>(embedding) + token[row] * H;
      for (int64_t i = 0; i < H; ++i) x[i] = of_bf16(e[i]);
    } else {
      std::memcpy(x, reinterpret_cast<const float*>(embedding) + token[row] * H, H * sizeof(float));
    }
    const float position = static_cast<float>(lengths[slot[row]]);
    for (int64_t i = 0; i < half; ++i) {
      const double a = position * frequencies[i];
      angle[i] = static_cast<float>(std::cos(a)) * rope_scale;
      angle[half + i] = static_cast<float>(std::sin(a)) * rope_scale;
    }
  }

  void norm(const float* x, const float* gain, float* line, Input& in, int64_t row) {
    const int64_t H = shape.hidden, whole = H / 16 * 16;
    v16f squares = {};
    for (int64_t i = 0; i < whole; i += 16) {
      const v16f v = load<v16f>(x + i);
      squares += v * v;
    }
    float sum = hsum(squares);
    for (int64_t i = whole; i < H; ++i) sum += x[i] * x[i];
    const float r = 1.0f / std::sqrt(sum / static_cast<float>(H) + shape.eps);
    for (int64_t i = 0; i < H; ++i) line[i] = x[i] * r * gain[i];
    in.set(row, 0, H, line);
  }

  void project_qkv(int64_t layer, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t outputs[3] = {shape.q(), shape.kv(), shape.kv()}, ld = shape.q() + 2 * shape.kv();
    const int64_t bytes = panel_bytes(shape.kind, shape.hidden);
    const int64_t pq = panels_of(shape.q()), pk = panels_of(shape.kv());
    const Range mine = share(pq + 2 * pk, t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t which = p < pq ? 0 : p < pq + pk ? 1 : 2;
      const int64_t local = p - (which == 0 ? 0 : which == 1 ? pq : pq + pk);
      const int64_t column = (which == 0 ? 0 : which == 1 ? shape.q() : shape.q() + shape.kv()) + local * PANEL;
      const int64_t count = std::min(PANEL, outputs[which] - local * PANEL);
      panel(weight(layer, which) + local * bytes, in, n, tile);
      for (int64_t i = 0; i < n; ++i) {
        float* y = qkv_ + i * ld + column;
        for (int64_t o = 0; o < count; ++o) y[o] = tile[i * PANEL + o];
        if (bias)
          for (int64_t o = 0; o < count; ++o) y[o] += bias[layer * ld + column + o];
      }
    }
  }

  void project_add(const uint8_t* w, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t H = shape.hidden, bytes = panel_bytes(shape.kind, in.width);
    const Range mine = share(panels_of(H), t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(w + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, H - p * PANEL);
      for (int64_t i = 0; i < n; ++i) {
        float* y = x_ + i * H + p * PANEL;
        for (int64_t o = 0; o < count; ++o) y[o] += tile[i * PANEL + o];
      }
    }
  }

  void gate_up(int64_t layer, int t, int threads, const Input& in, Input& inner, int64_t n, float* tile) {
    const int64_t bytes = panel_bytes(shape.kind, shape.hidden);
    const Range mine = share(panels_of(shape.inner), t, threads);
    float* up = tile + n * PANEL;
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(weight(layer, 4) + p * bytes, in, n, tile);
      panel(weight(layer, 5) + p * bytes, in, n, up);
      const int64_t count = std::min(PANEL, shape.inner - p * PANEL);
      for (int64_t i = 0; i < n; ++i) {
        float *g = tile + i * PANEL, *u = up + i * PANEL;
        for (int o = 0; o < PANEL; o += 16) {
          const v16f v = load<v16f>(g + o);
          // silu, written so that neither side overflows
          const v16f positive = v > v16f{} ? v : -v;
          const v16f e = vexp(-positive);
          const v16f sigmoid = (v > v16f{} ? splat(1.0f) : e) / (splat(1.0f) + e);
          store(g + o, v * sigmoid * load<v16f>(u + o));
        }
        inner.set(i, p * PANEL, count, g);
      }
    }
  }

  // -- attention: the positions of all (row, kv head) pairs lie in one line of blocks of 16, cut evenly between the threads

  static constexpr int64_t CHUNK = 256;

  int64_t blocks_of(int64_t i) const { return lengths[slot[active_[i]]] / 16 + 1; }  // with the new position

  void attend(int64_t layer, int t, int threads, int64_t n, float* scratch) {
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += blocks_of(i) * shape.kv_heads;
    const Range mine = share(total, t, threads);
    int64_t at = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t count = blocks_of(i);
      for (int64_t h = 0; h < shape.kv_heads; ++h, at += count) {
        float* part = partial_ + ((i * shape.kv_heads + h) * threads + t) * part_;
        const int64_t begin = std::max<int64_t>(mine.begin - at, 0), end = std::min<int64_t>(mine.end - at, count);
        if (begin < end)
          attend_head(layer, i, h, begin, end, end == count, part, scratch);
        else
          std::fill_n(part, shape.heads / shape.kv_heads, -std::numeric_limits<float>::infinity());
      }
    }
  }

  void rotate(const float* from, const float* angle, float scale, float* to) const {
    const int64_t half = shape.head / 2;
    for (int64_t d = 0; d < half; ++d) {
      to[d] = (from[d] * angle[d] - from[half + d] * angle[half + d]) * scale;
      to[half + d] = (from[half + d] * angle[d] + from[d] * angle[half + d]) * scale;
    }
  }

  template <int R>
  static void scores(const T* k, const float* q, int64_t head, float* s) {  // one block of 16 positions, R heads
    v16f even[R] = {}, odd[R] = {};
    for (int64_t d = 0; d < head; d += 2) {
      const v16f k0 = load_values(k + d * 16), k1 = load_values(k + d * 16 + 16);
      for (int r = 0; r < R; ++r) {
        even[r] += k0 * splat(q[r * head + d]);
        odd[r] += k1 * splat(q[r * head + d + 1]);
      }
    }
    for (int r = 0; r < R; ++r) store(s + r * CHUNK, even[r] + odd[r]);
  }

  template <int R, int V>
  static void add_values(const T* v, const float* p, int64_t count, int64_t head, float* out) {  // V vectors of 16 of R heads
    v16f a[R][V];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) a[r][j] = load<v16f>(out + r * head + 16 * j);
    for (int64_t i = 0; i < count; ++i) {
      v16f x[V];
      for (int j = 0; j < V; ++j) x[j] = load_values(v + i * head + 16 * j);
      for (int r = 0; r < R; ++r) {
        const v16f w = splat(p[r * CHUNK + i]);
        for (int j = 0; j < V; ++j) a[r][j] += w * x[j];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < V; ++j) store(out + r * head + 16 * j, a[r][j]);
  }

  template <int R>
  void heads(const T* k, const T* v, int64_t first, int64_t count, const float* q, float* s, float* m, float* l, float* out) {
    const int64_t D = shape.head, padded = (count + 15) / 16 * 16;
    for (int64_t b = 0; b < padded; b += 16) {
      const char* later_keys = reinterpret_cast<const char*>(k + (first + b + 32) * D);
      const char* these_values = reinterpret_cast<const char*>(v + (first + b) * D);
      for (int64_t i = 0; i < 16 * D * static_cast<int64_t>(sizeof(T)); i += 64) {
        __builtin_prefetch(later_keys + i);
        __builtin_prefetch(these_values + i);
      }
      scores<R>(k + (first + b) * D, q, D, s + b);
    }
    for (int r = 0; r < R; ++r) {
      float* p = s + r * CHUNK;
      for (int64_t i = count; i < padded; ++i) p[i] = -std::numeric_limits<float>::infinity();
      v16f top = splat(m[r]);
      for (int64_t b = 0; b < padded; b += 16) top = vmax(top, load<v16f>(p + b));
      const float largest = hmax(top), fade = m[r] == largest ? 1.0f : std::exp(m[r] - largest);
      v16f sum = {};
      for (int64_t b = 0; b < padded; b += 16) {
        const v16f e = vexp(load<v16f>(p + b) - splat(largest));
        store(p + b, e);
        sum += e;
      }
      m[r] = largest;
      l[r] = l[r] * fade + hsum(sum);
      if (fade != 1.0f)
        for (int64_t d = 0; d < D; ++d) out[r * D + d] *= fade;
    }
    int64_t d = 0;
    for (; d + 64 <= D; d += 64) add_values<R, 4>(v + first * D + d, s, count, D, out + d);
    for (; d < D; d += 16) add_values<R, 1>(v + first * D + d, s, count, D, out + d);
  }

  void attend_head(int64_t layer, int64_t i, int64_t h, int64_t begin, int64_t end, bool newest, float* part, float* scratch) {
    const int64_t D = shape.head, group = shape.heads / shape.kv_heads, s = slot[active_[i]], position = lengths[s];
    const float *angle = angles_ + i * D, *qkv = qkv_ + i * (shape.q() + 2 * shape.kv());
    T* k = keys + ((layer * slots + s) * shape.kv_heads + h) * blocks * 16 * D;
    T* v = values + ((layer * slots + s) * shape.kv_heads + h) * blocks * 16 * D;
    float *q = scratch, *score = scratch + group * D;
    float *m = part, *l = part + group, *out = part + 2 * group;
    if (newest) {
      rotate(qkv + shape.q() + h * D, angle, 1.0f, q);
      T* column = k + position / 16 * 16 * D + position % 16;
      for (int64_t d = 0; d < D; ++d) put(column + d * 16, q[d]);
      const float* value = qkv + shape.q() + shape.kv() + h * D;
      for (int64_t d = 0; d < D; ++d) put(v + position * D + d, value[d]);
    }
    const float scaling = 1.0f / std::sqrt(static_cast<float>(D));
    for (int64_t r = 0; r < group; ++r) {
      rotate(qkv + (h * group + r) * D, angle, scaling, q + r * D);
      m[r] = -std::numeric_limits<float>::infinity();
      l[r] = 0;
    }
    std::memset(out, 0, group * D * sizeof(float));
    const int64_t stop = std::min(end * 16, position + 1);
    for (int64_t first = begin * 16; first < stop; first += CHUNK) {
      const int64_t count = std::min(CHUNK, stop - first);
      int64_t r = 0;
      for (; r + 3 <= group; r += 3) heads<3>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
      if (group - r == 2) heads<2>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
      if (group - r == 1) heads<1>(k, v, first, count, q + r * D, score + r * CHUNK, m + r, l + r, out + r * D);
    }
  }

  void merge(int64_t i, int64_t, int threads, float* line, Input& in) {
    const int64_t D = shape.head, group = shape.heads / shape.kv_heads;
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const float* parts = partial_ + (i * shape.kv_heads + h) * threads * part_;
      for (int64_t r = 0; r < group; ++r) {
        float largest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int t = 0; t < threads; ++t) largest = std::max(largest, parts[t * part_ + r]);
        float* to = line + (h * group + r) * D;
        std::memset(to, 0, D * sizeof(float));
        for (int t = 0; t < threads; ++t) {
          const float* part = parts + t * part_;
          if (part[r] == -std::numeric_limits<float>::infinity()) continue;
          const float w = std::exp(part[r] - largest);
          total += w * part[group + r];
          for (int64_t d = 0; d < D; ++d) to[d] += w * part[2 * group + r * D + d];
        }
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < D; ++d) to[d] *= inverse;
      }
    }
    in.set(i, 0, shape.q(), line);
  }

  void head(int t, int threads, const Input& in, int64_t n, bool no_end, float* tile) {
    const int64_t bytes = panel_bytes(shape.head_kind, shape.hidden);
    const Range mine = share(panels_of(shape.vocab), t, threads);
    float* value = best_value_.data() + t * n;
    int64_t* index = best_index_.data() + t * n;
    for (int64_t i = 0; i < n; ++i) value[i] = -std::numeric_limits<float>::infinity(), index[i] = -1;
    const uint8_t* w = weights.back();
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      panel(w + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, shape.vocab - p * PANEL);
      for (const int64_t e : eos)
        if (no_end && e / PANEL == p)
          for (int64_t i = 0; i < n; ++i) tile[i * PANEL + e % PANEL] = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < n; ++i) {
        const float* y = tile + i * PANEL;
        if (scores_) std::memcpy(scores_ + active_[i] * shape.vocab + p * PANEL, y, count * sizeof(float));
        if (count == PANEL && !(hmax(vmax(load<v16f>(y), load<v16f>(y + 16))) > value[i])) continue;
        for (int64_t o = 0; o < count; ++o)
          if (y[o] > value[i]) value[i] = y[o], index[i] = p * PANEL + o;
      }
    }
  }

  void select(int64_t i, int64_t step, int threads) {
    const int64_t n = active_.size(), row = active_[i];
    float value = -std::numeric_limits<float>::infinity();
    int64_t index = -1;
    for (int t = 0; t < threads; ++t)
      if (best_value_[t * n + i] > value) value = best_value_[t * n + i], index = best_index_[t * n + i];
    if (index < 0 || !std::isfinite(value)) {
      failed_.store(true);
      index = 0;
    } else if (sample) {
      index = draw(scores_ + row * shape.vocab, shape.vocab, choice.temperature, choice.top_k, choice.top_p,
                   uniforms[row * steps + step]);
    }
    token[row] = index;
    out[row * steps + step] = index;
    ++lengths[slot[row]];
  }
};

// ---- operators -----------------------------------------------------------------------------------------------------------------

template <typename T>
void decode_as(Shape& shape, at::TensorList weights, const at::Tensor& norms, const at::Tensor& bias,
               const at::Tensor& embedding, const at::Tensor& frequencies, double rope_scale, at::Tensor& keys,
               at::Tensor& values, at::Tensor& lengths, const at::Tensor& rows, const at::Tensor& tokens, int64_t steps,
               at::IntArrayRef eos, int64_t forbid, bool sample, Choice choice, const at::Tensor& uniforms, at::Tensor& out,
               at::Tensor& logits) {
  Decoder<T> d;
  d.shape = shape;
  for (const at::Tensor& w : weights) d.weights.push_back(w.const_data_ptr<uint8_t>());
  d.norms = norms.const_data_ptr<float>();
  d.bias = bias.numel() ? bias.const_data_ptr<float>() : nullptr;
  d.embedding = static_cast<const uint8_t*>(embedding.const_data_ptr());
  d.embedding_bf16 = embedding.scalar_type() == at::kBFloat16;
  d.frequencies = frequencies.const_data_ptr<float>();
  d.rope_scale = static_cast<float>(rope_scale);
  d.keys = static_cast<T*>(keys.data_ptr());
  d.values = static_cast<T*>(values.data_ptr());
  d.slots = keys.size(1);
  d.blocks = keys.size(3);
  d.lengths = lengths.data_ptr<int64_t>();
  const int64_t *r = rows.const_data_ptr<int64_t>(), *tok = tokens.const_data_ptr<int64_t>();
  d.slot.assign(r, r + rows.numel());
  d.token.assign(tok, tok + tokens.numel());
  d.eos.assign(eos.begin(), eos.end());
  d.forbid = forbid;
  d.sample = sample;
  d.choice = choice;
  d.uniforms = sample ? uniforms.const_data_ptr<double>() : nullptr;
  d.out = out.data_ptr<int64_t>();
  d.logits = logits.numel() ? logits.data_ptr<float>() : nullptr;
  d.steps = steps;
  d.run();
}

std::tuple<at::Tensor, at::Tensor> llama_decode(
    at::TensorList weights, int64_t kind, int64_t head_kind, const at::Tensor& norms, const at::Tensor& bias,
    const at::Tensor& embedding, const at::Tensor& frequencies, double rope_scale, int64_t heads, int64_t inner, double eps,
    at::Tensor keys, at::Tensor values, at::Tensor lengths, const at::Tensor& rows, const at::Tensor& tokens, int64_t steps,
    at::IntArrayRef eos, int64_t forbid, bool want_logits, bool sample, double temperature, int64_t top_k, double top_p,
    const at::Tensor& uniforms) {
  TORCH_CHECK_VALUE(keys.dim() == 6 && keys.size(5) == 16, "keys must be (layers, slots, kv heads, blocks, head, 16), got ",
                    keys.sizes());
  check(keys, "keys", keys.scalar_type(), 6);
  check(values, "values", keys.scalar_type(), 5);
  check(lengths, "lengths", at::kLong, 1);
  check(rows, "rows", at::kLong, 1);
  check(tokens, "tokens", at::kLong, 1);
  check(norms, "norms", at::kFloat, 2);
  check(embedding, "embedding", embedding.scalar_type(), 2);
  check(frequencies, "frequencies", at::kFloat, 1);
  Shape shape{keys.size(0), embedding.size(1), inner, heads, keys.size(2), keys.size(4), embedding.size(0), kind, head_kind,
              static_cast<float>(eps)};
  const int64_t capacity = keys.size(3) * 16;
  TORCH_CHECK_VALUE(keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kBFloat16,
                    "keys must be float32 or bfloat16, got ", keys.scalar_type());
  TORCH_CHECK_VALUE(embedding.scalar_type() == at::kFloat || embedding.scalar_type() == at::kBFloat16,
                    "embedding must be float32 or bfloat16, got ", embedding.scalar_type());
  TORCH_CHECK_VALUE(values.size(0) == shape.layers && values.size(1) == keys.size(1) && values.size(2) == shape.kv_heads &&
                        values.size(3) == capacity && values.size(4) == shape.head,
                    "values do not match keys: ", values.sizes(), " and ", keys.sizes());
  TORCH_CHECK_VALUE(shape.head % 16 == 0 && heads % shape.kv_heads == 0, "head size must be a multiple of 16 and heads of kv heads");
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == 7 * shape.layers + 1, "weights must be 7 per layer and the head, got ",
                    weights.size());
  const int64_t outputs[7] = {shape.q(), shape.kv(), shape.kv(), shape.hidden, inner, inner, shape.hidden};
  const int64_t widths[7] = {shape.hidden, shape.hidden, shape.hidden, shape.q(), shape.hidden, shape.hidden, inner};
  for (size_t i = 0; i + 1 < weights.size(); ++i) check_packed(weights[i], "weights", kind, outputs[i % 7], widths[i % 7]);
  check_packed(weights.back(), "head", head_kind, shape.vocab, shape.hidden);
  TORCH_CHECK_VALUE(norms.size(0) == 2 * shape.layers + 1 && norms.size(1) == shape.hidden, "norms: got ", norms.sizes());
  TORCH_CHECK_VALUE(frequencies.numel() == shape.head / 2, "frequencies: got ", frequencies.sizes());
  TORCH_CHECK_VALUE(bias.numel() == 0 || bias.numel() == shape.layers * (shape.q() + 2 * shape.kv()), "bias: got ", bias.sizes());
  if (bias.numel()) check(bias, "bias", at::kFloat, 2);
  const int64_t n = rows.numel();
  TORCH_CHECK_VALUE(n > 0 && tokens.numel() == n, "tokens must have one entry per row, got ", tokens.numel(), " for ", n);
  TORCH_CHECK_VALUE(steps > 0, "steps must be positive, got ", steps);
  std::vector<bool> seen(keys.size(1));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows.const_data_ptr<int64_t>()[i], token = tokens.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(row >= 0 && row < keys.size(1) && row < lengths.numel() && !seen[row],
                      "rows must name different slots of the cache, got ", row);
    seen[row] = true;
    TORCH_CHECK_VALUE(token >= 0 && token < shape.vocab, "tokens must lie in 0..", shape.vocab - 1, ", got ", token);
    const int64_t length = lengths.const_data_ptr<int64_t>()[row];
    TORCH_CHECK_VALUE(length >= 0 && length + steps <= capacity, "the cache holds ", capacity, " positions, not ",
                      length + steps);
  }
  if (sample) {
    check(uniforms, "uniforms", at::kDouble, 2);
    TORCH_CHECK_VALUE(uniforms.size(0) == n && uniforms.size(1) == steps, "uniforms must be (rows, steps), got ", uniforms.sizes());
    TORCH_CHECK_VALUE(temperature > 0 && top_k >= 0 && top_p > 0, "temperature and top_p must be positive, top_k not negative");
  }
  at::Tensor out = at::full({n, steps}, -1, lengths.options());
  at::Tensor logits = at::empty({want_logits ? n : 0, shape.vocab}, norms.options());
  const Choice choice{temperature, top_k, top_p};
  if (keys.scalar_type() == at::kBFloat16)
    decode_as<uint16_t>(shape, weights, norms, bias, embedding, frequencies, rope_scale, keys, values, lengths, rows, tokens, steps,
                        eos, forbid, sample, choice, uniforms, out, logits);
  else
    decode_as<float>(shape, weights, norms, bias, embedding, frequencies, rope_scale, keys, values, lengths, rows, tokens, steps,
                     eos, forbid, sample, choice, uniforms, out, logits);
  return {out, logits};
}

at::Tensor draw_tokens(const at::Tensor& logits, double temperature, int64_t top_k, double top_p, const at::Tensor& uniforms) {
  check(logits, "logits", at::kFloat, 2);
  check(uniforms, "uniforms", at::kDouble, 1);
  TORCH_CHECK_VALUE(uniforms.numel() == logits.size(0), "uniforms must have one entry per row, got ", uniforms.sizes());
  at::Tensor out = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  for (int64_t i = 0; i < logits.size(0); ++i)
    out.data_ptr<int64_t>()[i] = draw(logits.const_data_ptr<float>() + i * logits.size(1), logits.size(1), temperature, top_k,
                                      top_p, uniforms.const_data_ptr<double>()[i]);
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
      "llama_decode(Tensor[] weights, int kind, int head_kind, Tensor norms, Tensor bias, Tensor embedding, Tensor frequencies, "
      "float rope_scale, int heads, int inner, float eps, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, Tensor rows, "
      "Tensor tokens, int steps, int[] eos, int forbid, bool want_logits, bool sample, float temperature, int top_k, float top_p, "
      "Tensor uniforms) -> (Tensor, Tensor)");
  m.def("draw_tokens(Tensor logits, float temperature, int top_k, float top_p, Tensor uniforms) -> Tensor");
  m.def("weight_memory(int bytes) -> Tensor");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("llama_decode", llama_decode);
  m.impl("draw_tokens", draw_tokens);
}

TORCH_LIBRARY_IMPL(assay, CompositeExplicitAutograd, m) { m.impl("weight_memory", weight_memory); }
