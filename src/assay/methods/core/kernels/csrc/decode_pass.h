// The decoder: one token of each row of a batch through all layers, and what is chosen of it.
//
// The threads of a call meet at spin barriers between the phases of a layer. Each row of a call is one token at one position.
// Whatever is computed for a row is computed by the same code in the same order however many rows and threads there are, so that
// its floats are the same.

#pragma once
#include <ATen/Parallel.h>
#include <omp.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "choosing.h"
#include "decode_attention.h"
#include "decode_model.h"
#include "decode_products.h"
#include "decode_threads.h"

namespace {

struct Steps {
  int64_t count, forbid;  // steps in all; those at the start in which no row may end
  std::vector<int64_t> eos;
  std::vector<Choice> choices;  // of each row
  const double* uniforms;       // [rows][count], null where no row is sampled
  int64_t* out;                 // [rows][count], filled with -1
};

struct Rows {
  std::vector<int64_t> table, position, token;  // which page table, which position the token has, the token
  const int32_t* tables;                        // [tables][width] pages
  int64_t width;
  bool together;  // several rows may belong to one sequence: its newest keys and values must all be there first
};

template <typename T>
class Decoder {  // T: float or uint16_t (bfloat16), the element of the pages
 public:
  Decoder(const Model& model, T* keys, T* values, int64_t pages, Rows rows)
      : m_(model), keys_(keys), values_(values), pages_(pages), rows_(std::move(rows)) {}

  // Feed each row its token and continue with the answer.
  void steps(const Steps& ask, float* logits) {
    const int64_t rows = rows_.token.size();
    bool sampled = false;
    for (const Choice& choice : ask.choices) sampled = sampled || choice.temperature > 0;
    Buffer<float> own(sampled && !logits ? rows * m_.vocab : 0);
    scores_ = logits ? logits : own.data;
    slots_.resize(rows);
    for (int64_t i = 0; i < rows; ++i) slots_[i] = i;
    prepare(rows, ask.count, rows);
    if (sampled)
      for (Local& local : locals_) local.chooser.reserve(m_.vocab);
    work([&](int t, int threads, Local& local) {
      for (int64_t step = 0; step < ask.count && !active_.empty() && !failed_.load(std::memory_order_relaxed); ++step) {
        const int64_t n = active_.size();
        Input& last = pass(t, threads, n, local);
        head(t, threads, last, n, step < ask.forbid ? &ask.eos : nullptr, local.tile);
        barrier_->wait();
        const Range mine = share(n, t, threads);
        for (int64_t i = mine.begin; i < mine.end; ++i) select(i, step, threads, ask, local);
        barrier_->wait();
        if (t == 0) {
          size_t kept = 0;
          for (const int64_t row : active_)
            if (std::find(ask.eos.begin(), ask.eos.end(), rows_.token[row]) == ask.eos.end()) active_[kept++] = row;
          active_.resize(kept);
        }
        barrier_->wait();
      }
    });
  }

  // Feed every row its token, once; row i's logits go to line slots[i] of `logits`, or nowhere where that is -1.
  void extend(std::vector<int64_t> slots, int64_t wanted, float* logits) {
    slots_ = std::move(slots);
    scores_ = logits;
    prepare(rows_.token.size(), 1, std::max<int64_t>(wanted, 1));
    work([&](int t, int threads, Local& local) {
      Input& last = pass(t, threads, active_.size(), local);
      if (wanted > 0) head(t, threads, last, wanted, nullptr, local.tile);
    });
    for (int64_t i = 0; i < wanted; ++i)
      if (!std::isfinite(largest(i, threads_).first)) failed_.store(true);
    check_finite();
  }

  void check_finite() const {
    TORCH_CHECK_VALUE(!failed_.load(), "the logits are not finite: the weights or the keys and values hold NaN or infinity");
  }

 private:
  struct Local {  // what each thread has to itself; with one row also its own copy of the residual stream and of the inputs
    Buffer<float> x, angles, line, tile, q, scores, part, next;
    std::vector<Input> inputs;
    Chooser chooser;
  };
  enum Parts { NONE, OF_HEADS, OF_CHUNKS };  // what the attention left to be put together

  const Model& m_;
  T *keys_, *values_;  // [layers][pages][kv heads][head][16] and [layers][pages][kv heads][16][head]
  const int64_t pages_;
  Rows rows_;
  std::vector<int64_t> active_, slots_;  // rows still running, in order; where the logits of each go
  std::unique_ptr<Buffer<float>> x_, y_, qkv_, angles_, parts_;
  std::vector<Input> shared_;  // hidden, attention output, inner, hidden for the head
  std::vector<Local> locals_;
  std::vector<float> best_value_;
  std::vector<int64_t> best_index_;
  float* scores_ = nullptr;
  int64_t group_ = 0, part_ = 0, capacity_ = 0;
  int threads_ = 1;
  bool alone_ = false;
  std::unique_ptr<Barrier> barrier_;
  std::atomic<bool> failed_{false};

  void prepare(int64_t rows, int64_t steps, int64_t wanted) {
    threads_ = static_cast<int>(std::min<int64_t>(at::get_num_threads(), panels_of(m_.vocab)));
    alone_ = rows == 1;
    capacity_ = std::max(rows, wanted);
    group_ = m_.heads / m_.kv_heads;
    part_ = part_floats(group_, m_.head);
    active_.resize(rows);
    int64_t chunks = 0, most = 0;
    for (int64_t i = 0; i < rows; ++i) {
      active_[i] = i;
      const int64_t count = (rows_.position[i] + steps - 1) / CHUNK + 1;
      chunks += count;
      most = std::max(most, count);
    }
    // no more parts than `attend` splits
    chunks = std::max(rows, std::min<int64_t>(chunks, 4 * threads_ * most));
    const auto floats = [](int64_t n) { return std::make_unique<Buffer<float>>(n); };
    if (!alone_) x_ = floats(rows * m_.hidden), angles_ = floats(rows * m_.angles());
    y_ = floats(rows * m_.hidden);
    qkv_ = floats(rows * (m_.q() + 2 * m_.kv()));
    parts_ = floats(chunks * m_.kv_heads * part_);
    shared_.emplace_back(m_.kind, rows, m_.hidden);
    shared_.emplace_back(m_.kind, rows, m_.q());
    shared_.emplace_back(m_.kind, rows, m_.inner);
    shared_.emplace_back(m_.head_kind, wanted, m_.hidden);
    for (int t = 0; t < threads_; ++t) {
      locals_.push_back({Buffer<float>(alone_ ? m_.hidden : 0), Buffer<float>(alone_ ? m_.angles() : 0),
                         Buffer<float>(std::max(m_.hidden, m_.q())), Buffer<float>(2 * capacity_ * PANEL),
                         Buffer<float>(group_ * m_.head), Buffer<float>(4 * CHUNK), Buffer<float>(part_), Buffer<float>(part_),
                         {}, {}});
      if (!alone_) continue;
      locals_.back().inputs.emplace_back(m_.kind, 1, m_.hidden);
      locals_.back().inputs.emplace_back(m_.kind, 1, m_.q());
      locals_.back().inputs.emplace_back(m_.head_kind, 1, m_.hidden);
    }
    best_value_.resize(capacity_ * threads_);
    best_index_.resize(capacity_ * threads_);
  }

  template <typename F>
  void work(const F& body) {
#pragma omp parallel num_threads(threads_)
    {
#pragma omp single
      {
        threads_ = omp_get_num_threads();
        barrier_ = std::make_unique<Barrier>(threads_);
      }
      body(omp_get_thread_num(), threads_, locals_[omp_get_thread_num()]);
    }
  }

  // A few kilobytes of what this thread reads next, asked for before it waits at a barrier.
  static void warm(const uint8_t* p) {
    for (int64_t i = 0; i < 4096; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
  const uint8_t* start_of(const uint8_t* weight, int64_t kind, int64_t outputs, int64_t width, int t, int threads) const {
    return weight + share(panels_of(outputs), t, threads).begin * panel_bytes(kind, width);
  }

  // ---- one token of each active row through all layers; returns the inputs of the head ----

  Input& pass(int t, int threads, int64_t n, Local& local) {
    const int64_t H = m_.hidden;
    // With one row every thread keeps the residual stream and prepares the inputs of a product for itself: that is cheaper than
    // meeting once more.
    const Range mine = alone_ ? Range{0, 1} : share(n, t, threads);
    float *x = alone_ ? local.x.data : x_->data, *angles = alone_ ? local.angles.data : angles_->data, *y = y_->data;
    Input& hidden = alone_ ? local.inputs[0] : shared_[0];
    Input& attended = alone_ ? local.inputs[1] : shared_[1];
    Input& inner = shared_[2];
    Input& last = alone_ ? local.inputs[2] : shared_[3];
    for (int64_t i = mine.begin; i < mine.end; ++i)
      m_.start(rows_.token[active_[i]], rows_.position[active_[i]], x + i * H, angles + i * m_.angles());

    for (int64_t layer = 0; layer < m_.layers; ++layer) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        if (layer > 0) m_.join(y + i * H, m_.after_mlp(layer - 1), x + i * H);
        m_.norm(x + i * H, m_.before_attention(layer), local.line);
        set_inputs(hidden, i, 0, H, local.line);
      }
      meet_rows();
      project_qkv(layer, t, threads, hidden, n, local.tile);
      barrier_->wait();
      if (rows_.together) {
        const Range pairs = share(n * m_.kv_heads, t, threads);
        for (int64_t p = pairs.begin; p < pairs.end; ++p) write(layer, p / m_.kv_heads, p % m_.kv_heads, angles, local);
        barrier_->wait();
      }
      const Parts left = attend(layer, t, threads, n, angles, local);
      warm(start_of(m_.weight(layer, 3), m_.kind, H, m_.q(), t, threads));
      barrier_->wait();
      if (left != NONE) {
        for (int64_t i = mine.begin; i < mine.end; ++i) merge(left, layer, i, attended, local);
        meet_rows();
      }
      project(m_.weight(layer, 3), t, threads, left == NONE ? shared_[1] : attended, n, local.tile);
      warm(start_of(m_.weight(layer, 4), m_.kind, m_.inner, H, t, threads));
      barrier_->wait();
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        m_.join(y + i * H, m_.after_attention(layer), x + i * H);
        m_.norm(x + i * H, m_.before_mlp(layer), local.line);
        set_inputs(hidden, i, 0, H, local.line);
      }
      meet_rows();
      gate_up(layer, t, threads, hidden, inner, n, local.tile);
      warm(start_of(m_.weight(layer, 6), m_.kind, H, m_.inner, t, threads));
      barrier_->wait();
      project(m_.weight(layer, 6), t, threads, inner, n, local.tile);
      if (layer + 1 < m_.layers)
        warm(qkv_panel(layer + 1, share(qkv_panels(), t, threads).begin));
      else
        warm(start_of(m_.weights.back(), m_.head_kind, m_.vocab, H, t, threads));
      barrier_->wait();
    }
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      if (slots_[i] < 0) continue;
      m_.join(y + i * H, m_.after_mlp(m_.layers - 1), x + i * H);
      m_.norm(x + i * H, m_.last_norm, local.line);
      set_inputs(last, slots_[i], 0, H, local.line);
    }
    meet_rows();
    return last;
  }

  void meet_rows() {  // where rows were shared out between the threads
    if (!alone_) barrier_->wait();
  }

  // ---- projections ----

  int64_t qkv_panels() const { return panels_of(m_.q()) + 2 * panels_of(m_.kv()); }

  // Panel p of those of q, k and v one after the other; `column` is where its outputs go, `count` how many there are.
  const uint8_t* qkv_panel(int64_t layer, int64_t p, int64_t* column = nullptr, int64_t* count = nullptr) const {
    const int64_t pq = panels_of(m_.q()), pk = panels_of(m_.kv());
    const int64_t which = p < pq ? 0 : p < pq + pk ? 1 : 2, local = p - (which == 0 ? 0 : which == 1 ? pq : pq + pk);
    if (column) *column = (which == 0 ? 0 : which == 1 ? m_.q() : m_.q() + m_.kv()) + local * PANEL;
    if (count) *count = std::min(PANEL, (which == 0 ? m_.q() : m_.kv()) - local * PANEL);
    return m_.weight(layer, which) + local * panel_bytes(m_.kind, m_.hidden);
  }

  void project_qkv(int64_t layer, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t ld = m_.q() + 2 * m_.kv();
    const Range mine = share(qkv_panels(), t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      int64_t column = 0, count = 0;
      const uint8_t* weight = qkv_panel(layer, p, &column, &count);
      product(weight, in, n, tile);
      for (int64_t i = 0; i < n; ++i) {
        float* to = qkv_->data + i * ld + column;
        for (int64_t o = 0; o < count; ++o) to[o] = tile[i * PANEL + o];
        if (m_.bias)
          for (int64_t o = 0; o < count; ++o) to[o] += m_.bias[layer * ld + column + o];
      }
    }
  }

  void project(const uint8_t* w, int t, int threads, const Input& in, int64_t n, float* tile) {
    const int64_t H = m_.hidden, bytes = panel_bytes(m_.kind, in.width);
    const Range mine = share(panels_of(H), t, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      product(w + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, H - p * PANEL);
      for (int64_t i = 0; i < n; ++i) std::memcpy(y_->data + i * H + p * PANEL, tile + i * PANEL, count * sizeof(float));
    }
  }

  void gate_up(int64_t layer, int t, int threads, const Input& in, Input& inner, int64_t n, float* tile) {
    const int64_t bytes = panel_bytes(m_.kind, m_.hidden);
    const Range mine = share(panels_of(m_.inner), t, threads);
    float* up = tile + n * PANEL;
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      product(m_.weight(layer, 4) + p * bytes, in, n, tile);
      product(m_.weight(layer, 5) + p * bytes, in, n, up);
      const int64_t count = std::min(PANEL, m_.inner - p * PANEL);
      for (int64_t i = 0; i < n; ++i) {
        float *g = tile + i * PANEL, *u = up + i * PANEL;
        for (int o = 0; o < PANEL; o += 16) store(g + o, m_.activated(load<v16f>(g + o)) * load<v16f>(u + o));
        set_inputs(inner, i, p * PANEL, count, g);
      }
    }
  }

  // ---- attention ----

  struct Span {  // the positions a row sees
    int64_t begin, end;
    int64_t first_chunk() const { return begin / CHUNK; }
    int64_t last_chunk() const { return (end - 1) / CHUNK; }
    int64_t chunks() const { return last_chunk() - first_chunk() + 1; }
    int64_t pages() const { return (end - 1) / PAGE - begin / PAGE + 1; }
    Span within(int64_t chunk) const { return {std::max(begin, chunk * CHUNK), std::min(end, (chunk + 1) * CHUNK)}; }
  };
  Span span(int64_t layer, int64_t i) const {
    const int64_t position = rows_.position[active_[i]], window = m_.window(layer);
    return {window > 0 ? std::max<int64_t>(position + 1 - window, 0) : 0, position + 1};
  }

  int64_t block(int64_t layer, int64_t row, int64_t page, int64_t h) const {  // where a page of a head begins
    const int64_t number = rows_.tables[rows_.table[row] * rows_.width + page];
    return ((layer * pages_ + number) * m_.kv_heads + h) * PAGE * m_.head;
  }
  Chunk<T> chunk(int64_t layer, int64_t row, int64_t h, const Span& all, int64_t number) const {
    const Span part = all.within(number);
    const int64_t first = part.begin / PAGE, last = (part.end - 1) / PAGE;
    Chunk<T> c;
    c.skip = part.begin - first * PAGE;
    c.count = part.end - first * PAGE;
    c.known = std::min((all.end - 1) / PAGE, last + MOST_AHEAD) - first + 1;
    for (int64_t b = 0; b < c.known; ++b) {
      const int64_t at = block(layer, row, first + b, h);
      c.keys[b] = keys_ + at;
      if (first + b <= last) c.values[b] = values_ + at;
    }
    return c;
  }

  const float* angles_of(const float* angles, int64_t layer, int64_t i) const {
    return angles + i * m_.angles() + m_.rope(layer) * 2 * m_.half;
  }
  const float* qkv_of(int64_t i) const { return qkv_->data + i * (m_.q() + 2 * m_.kv()); }

  // The newest key and value of a row's head go into their page.
  void write(int64_t layer, int64_t i, int64_t h, const float* angles, Local& local) {
    const int64_t D = m_.head, row = active_[i], position = rows_.position[row];
    m_.turn(qkv_of(i) + m_.q() + h * D, m_.head_norm(layer, 1), angles_of(angles, layer, i), 1.0f, local.next);
    const int64_t at = block(layer, row, position / PAGE, h), place = position % PAGE;
    for (int64_t d = 0; d < D; ++d) put(keys_ + at + d * PAGE + place, local.next[d]);
    const float* value = qkv_of(i) + m_.q() + m_.kv() + h * D;
    for (int64_t d = 0; d < D; ++d) put(values_ + at + place * D + d, value[d]);
  }

  void queries(int64_t layer, int64_t i, int64_t h, const float* angles, Local& local) const {
    for (int64_t r = 0; r < group_; ++r)
      m_.turn(qkv_of(i) + (h * group_ + r) * m_.head, m_.head_norm(layer, 0), angles_of(angles, layer, i), m_.attention_scale,
              local.q + r * m_.head);
  }

  // Few rows are cut into chunks and these shared out, many rows go head by head: the floats are the same.
  Parts attend(int64_t layer, int t, int threads, int64_t n, const float* angles, Local& local) {
    const int64_t D = m_.head, kv = m_.kv_heads;
    int64_t chunks = 0, most = 0, pages = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Span s = span(layer, i);
      chunks += s.chunks();
      most = std::max(most, s.chunks());
      pages += s.pages();
    }
    const bool split = threads > 1 && 4 * threads * most > chunks;
    const bool direct = !split && (!integer(m_.kind) || group_ * D % GROUP == 0);
    const Range mine = share(pages * kv, t, threads);
    const auto is_mine = [&](int64_t at, int64_t size) { return mine.begin <= at + size / 2 && at + size / 2 < mine.end; };
    int64_t at = 0, number = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Span s = span(layer, i);
      const int64_t row = active_[i];
      if (at + s.pages() * kv <= mine.begin || at >= mine.end) {
        at += s.pages() * kv;
        number += (split ? s.chunks() : 1) * kv;
        continue;
      }
      for (int64_t h = 0; h < kv; ++h) {
        if (!split) {
          if (is_mine(at, s.pages())) {
            if (!rows_.together) write(layer, i, h, angles, local);
            queries(layer, i, h, angles, local);
            attend_chunk(chunk(layer, row, h, s, s.first_chunk()), local.q, group_, D, local.scores, local.part);
            for (int64_t c = s.first_chunk() + 1; c <= s.last_chunk(); ++c) {
              attend_chunk(chunk(layer, row, h, s, c), local.q, group_, D, local.scores, local.next);
              fold(local.part, local.next, group_, D);
            }
            if (direct) {
              if (!finish(local.part, group_, D, local.line)) failed_.store(true);
              set_inputs(shared_[1], i, h * group_ * D, group_ * D, local.line);
            } else {
              std::memcpy(parts_->data + number * part_, local.part, part_ * sizeof(float));
            }
          }
          at += s.pages();
          ++number;
          continue;
        }
        bool ready = false;
        for (int64_t c = s.first_chunk(); c <= s.last_chunk(); ++c, ++number) {
          const int64_t size = s.within(c).pages();
          if (is_mine(at, size)) {
            if (c == s.last_chunk() && !rows_.together) write(layer, i, h, angles, local);
            if (!ready) queries(layer, i, h, angles, local);
            ready = true;
            attend_chunk(chunk(layer, row, h, s, c), local.q, group_, D, local.scores, parts_->data + number * part_);
          }
          at += size;
        }
      }
    }
    return direct ? NONE : split ? OF_CHUNKS : OF_HEADS;
  }

  // The attention output of row i from its parts.
  void merge(Parts left, int64_t layer, int64_t i, Input& in, Local& local) {
    const auto count = [&](int64_t row) { return left == OF_CHUNKS ? span(layer, row).chunks() : int64_t{1}; };
    int64_t number = 0;
    for (int64_t j = 0; j < i; ++j) number += count(j) * m_.kv_heads;
    for (int64_t h = 0; h < m_.kv_heads; ++h) {
      const float* parts = parts_->data + (number + h * count(i)) * part_;
      std::memcpy(local.part, parts, part_ * sizeof(float));
      for (int64_t c = 1; c < count(i); ++c) fold(local.part, parts + c * part_, group_, m_.head);
      if (!finish(local.part, group_, m_.head, local.line + h * group_ * m_.head)) failed_.store(true);
    }
    set_inputs(in, i, 0, m_.q(), local.line);
  }

  // ---- the head, and what is chosen ----

  void head(int t, int threads, const Input& in, int64_t n, const std::vector<int64_t>* forbidden, float* tile) {
    const int64_t bytes = panel_bytes(m_.head_kind, m_.hidden);
    const Range mine = share(panels_of(m_.vocab), t, threads);
    float* value = best_value_.data() + t * capacity_;
    int64_t* index = best_index_.data() + t * capacity_;
    for (int64_t i = 0; i < n; ++i) value[i] = -std::numeric_limits<float>::infinity(), index[i] = -1;
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      product(m_.weights.back() + p * bytes, in, n, tile);
      const int64_t count = std::min(PANEL, m_.vocab - p * PANEL);
      if (forbidden)
        for (const int64_t e : *forbidden)
          if (e / PANEL == p)
            for (int64_t i = 0; i < n; ++i) tile[i * PANEL + e % PANEL] = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < n; ++i) {
        const float* line = tile + i * PANEL;
        if (scores_) std::memcpy(scores_ + active_[i] * m_.vocab + p * PANEL, line, count * sizeof(float));
        if (count == PANEL && !(hmax(vmax(load<v16f>(line), load<v16f>(line + 16))) > value[i])) continue;
        for (int64_t o = 0; o < count; ++o)
          if (line[o] > value[i]) value[i] = line[o], index[i] = p * PANEL + o;
      }
    }
  }

  std::pair<float, int64_t> largest(int64_t i, int threads) const {
    float value = -std::numeric_limits<float>::infinity();
    int64_t index = -1;
    for (int t = 0; t < threads; ++t)
      if (best_value_[t * capacity_ + i] > value) value = best_value_[t * capacity_ + i], index = best_index_[t * capacity_ + i];
    return {value, index};
  }

  void select(int64_t i, int64_t step, int threads, const Steps& ask, Local& local) {
    const int64_t row = active_[i];
    auto [value, index] = largest(i, threads);
    if (index < 0 || !std::isfinite(value)) {
      failed_.store(true);
      index = 0;
    } else if (ask.choices[row].temperature > 0) {
      const double u = ask.uniforms[row * ask.count + step];
      index = local.chooser.draw(scores_ + row * m_.vocab, m_.vocab, ask.choices[row], u);
    }
    rows_.token[row] = index;
    ask.out[row * ask.count + step] = index;
    ++rows_.position[row];
  }
};

}  // namespace
