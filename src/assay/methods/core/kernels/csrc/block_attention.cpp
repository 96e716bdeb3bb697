// Attention on the CPU: exact over kept key blocks (prefill), exact over kept clusters of tokens (permuted blocks of any size),
// exact for one query (decode), and XAttention's block scores.
//
// Prefill, clusters and scores share the micro kernel of attention.h. Keys and values are packed once per key head and shared by the query
// heads of its group. Softmax is online, in base 2, and in float whatever the inputs are. A query that sees no key gives zeros.

#include "attention.h"

namespace {

// What a sink adds to the weight of a row whose exponents of two had `shift` subtracted.
inline float sink_weight(const float* sink, float shift) { return sink ? std::exp2(*sink * kLog2e - shift) : 0.0f; }

// Row r of the state, divided by its weights and the sink's (if there is one), as `dim` numbers at `to`; zeros when it saw no key.
void write_row(const State& state, int64_t r, int64_t dim, const float* sink, bool half, char* to) {
  const float weight = sum(load(state.weights + r * kLanes)) + sink_weight(sink, state.shift[r]);
  const float share = state.limit[r] == kSlack ? 1.0f / weight : 0.0f;
  const float* sums = state.sums + r * dim;
  if (half)
    for (int64_t c = 0; c < dim; ++c) reinterpret_cast<BFloat16*>(to)[c] = static_cast<BFloat16>(sums[c] * share);
  else
    for (int64_t c = 0; c < dim; ++c) reinterpret_cast<float*>(to)[c] = sums[c] * share;
}

// ---- attention over blocks -------------------------------------------------------------------------------------------------

template <bool Half>
void block_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, int64_t value_dim,
                     const bool* mask, const float* sinks, float scale) {
  const int64_t words = Half ? s.dim / 2 : s.dim, heads = s.batch * s.key_heads;
  const int64_t groups = (s.keys + kLanes - 1) / kLanes + 1;  // tiles read a group past the last key
  const int64_t key_floats = kLanes * words, value_floats = kLanes * value_dim / (Half ? 2 : 1);  // of a group
  const Tensor packed = at::empty({heads * groups * (key_floats + value_floats)}, at::kFloat);
  float* all_keys = packed.data_ptr<float>();
  float* all_values = all_keys + heads * groups * key_floats;

  const auto kept_by = [&](int64_t b, int64_t h, int64_t i) {
    return mask ? mask + ((b * s.heads + h) * s.query_blocks() + i) * s.key_blocks() : nullptr;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.query_blocks(); ++i) {
        const int64_t seen = s.causal ? s.first_block() + i + 1 : s.key_blocks();
        const int64_t unseen = std::min(seen, s.first_of(b, std::max((s.first_block() + i) * s.block, s.offset())) / s.block);
        const bool* kept = kept_by(b, h, i);
        tasks.push_back({kept ? std::count(kept + unseen, kept + seen, true) : seen - unseen, b, h, i});
      }
  tasks = longest_first(std::move(tasks));

  const int64_t segment = segment_of(4 * std::max(key_floats, value_floats));
  const int64_t most_rows = std::min(s.block, s.queries);
  const bool copy = q.half != Half;

#pragma omp parallel num_threads(threads())
  {
    const Tiles amx(Half && words % kTile == 0);
    Workspace own(most_rows * (words + value_dim + kLanes + 2) + Scratch::floats(segment) + 80);
    float* copied = own.take(most_rows * words);
    const State state{own.take(most_rows * value_dim), own.take(most_rows * kLanes), own.take(most_rows), own.take(most_rows)};
    const Scratch scratch(own, segment);

#pragma omp for schedule(static)
    for (int64_t item = 0; item < heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, group = item % groups;
      const auto row = [&](const View& x, int lane) -> const char* {
        const int64_t key = group * kLanes + lane;
        return key < s.keys && key >= s.start(b) ? x.row(b, h, key) : nullptr;
      };
      pack_columns<Half>([&](int lane) { return row(k, lane); }, k.half, s.dim, all_keys + item * key_floats);
      pack_rows<Half>([&](int lane) { return row(v, lane); }, v.half, value_dim, all_values + item * value_floats);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const int64_t b = tasks[t].b, h = tasks[t].h, i = tasks[t].i, start = s.start(b);
      const int64_t position = std::max((s.first_block() + i) * s.block, s.offset()), query = position - s.offset();
      const int64_t rows = std::min((s.first_block() + i + 1) * s.block, s.keys) - position;
      const int64_t first_group = (b * s.key_heads + s.group_of(h)) * groups;
      const bool* kept = kept_by(b, h, i);
      if (copy)
        for (int64_t r = 0; r < rows; ++r) to_words<Half>(q.row(b, h, query + r), q.half, s.dim, copied + r * words);
      const char* q_data = copy ? reinterpret_cast<const char*>(copied) : q.row(b, h, query);
      const int64_t q_bytes = copy ? words * 4 : q.token;
      std::fill_n(state.sums, rows * value_dim, 0.0f);
      std::fill_n(state.weights, rows * kLanes, 0.0f);
      std::fill_n(state.shift, rows, 0.0f);
      std::fill_n(state.limit, rows, -kInfinity);

      const int64_t end = s.causal ? position + rows : s.keys;  // no row sees a key from here on
      const int64_t begin = s.first_of(b, std::max(position, start));  // nor one before
      for (int64_t j = begin / s.block; j * s.block < end; ++j) {
        if (kept && !kept[j]) continue;
        const int64_t from = j * s.block;
        while ((j + 1) * s.block < end && (!kept || kept[j + 1])) ++j;  // neighbouring blocks make one run
        const int64_t run_end = std::min((j + 1) * s.block, end);
        for (int64_t key = from; key < run_end; key += segment) {
          const int64_t key_end = std::min(key + segment, run_end), group = first_group + key / kLanes;
          for_rows(
              rows,
              [&](auto m_, int64_t r) {
                constexpr int M = decltype(m_)::value;
                int64_t first[M], last[M];
                for (int m = 0; m < M; ++m) {
                  const int64_t own = position + r + m;
                  first[m] = s.first_of(b, own) - key;
                  last[m] = own < start ? 0 : std::min(key_end, s.causal ? own + 1 : key_end) - key;
                }
                if (last[M - 1] <= std::max<int64_t>(first[0], 0)) return;
                attend<Half, M>(q_data + r * q_bytes, q_bytes, all_keys + group * key_floats, kLanes, key_floats,
                                all_values + group * value_floats, (last[M - 1] + kLanes - 1) / kLanes, words, value_dim,
                                scale * kLog2e, first, last, r, state, scratch);
              },
              amx.on);
        }
      }
      for (int64_t r = 0; r < rows; ++r) write_row(state, r, value_dim, sinks ? sinks + h : nullptr, out.half, out.row(b, h, query + r));
    }
  }
}

// ---- attention over clusters: permuted blocks of any size ------------------------------------------------------------------

constexpr int64_t kClusterRows = 128;  // rows of a query cluster that a thread takes at a time, at most

// Tokens in groups: cluster c of head (b, h) holds the next sizes[c] tokens of `order`.
struct Clusters {
  int64_t heads, tokens, count;
  const int64_t *order, *sizes;  // (batch, heads, tokens), (batch, heads, count)

  const int64_t* order_of(int64_t b, int64_t h) const { return order + (b * heads + h) * tokens; }
  const int64_t* sizes_of(int64_t b, int64_t h) const { return sizes + (b * heads + h) * count; }
};

// Keys that are collected from anywhere in the packed groups until they fill a segment.
template <bool Half>
struct Collected {
  const int64_t segment, words, value_dim;
  float *keys, *values;  // (word, key) and (word of keys, dim); a register of `keys` more is written
  const float* no_value;  // zeros

  struct Piece {
    const float* from;
    int64_t to;
  };
  struct Value {
    const float* row;
    int shift;  // of the bfloat16 in its words
  };
  int64_t count = 0, piece_count = 0;
  std::vector<Piece> pieces = std::vector<Piece>(segment);
  std::vector<Value> value_rows = std::vector<Value>(segment);

  // Notes `more` keys from `lane` on of the group that lies at `group_keys` and `group_values`.
  void add(const float* group_keys, const float* group_values, int64_t lane, int64_t more) {
    pieces[piece_count++] = {group_keys + lane, count};
    for (int64_t i = lane; i < lane + more; ++i)
      value_rows[count++] = Half ? Value{group_values + i / 2 * value_dim, i % 2 ? 16 : 0} : Value{group_values + i * value_dim, 0};
  }

  // Copies them together; values are padded with zeros to whole tiles of keys.
  void copy() {
    // A piece is copied as a whole register: what is too much of it is overwritten by the next piece or the next word.
    for (int64_t w = 0; w < words; ++w)
      for (int64_t i = 0; i < piece_count; ++i) store(keys + w * segment + pieces[i].to, load(pieces[i].from + w * kLanes));
    const int64_t padded = (count + kPair - 1) / kPair * kPair;
    std::fill(value_rows.begin() + count, value_rows.begin() + padded, Value{no_value, 0});
    for (int64_t i = 0; i < padded; i += Half ? 2 : 1) {
      if constexpr (Half) {
        const int low_shift = value_rows[i].shift, high_shift = value_rows[i + 1].shift;
        const auto* low = reinterpret_cast<const uint32_t*>(value_rows[i].row);
        const auto* high = reinterpret_cast<const uint32_t*>(value_rows[i + 1].row);
        auto* to = reinterpret_cast<uint32_t*>(values + i / 2 * value_dim);
        for (int64_t c = 0; c < value_dim; ++c) to[c] = ((low[c] >> low_shift) & 0xffff) | (high[c] >> high_shift) << 16;
      } else {
        for (int64_t c = 0; c < value_dim; c += kLanes) store(values + i * value_dim + c, load(value_rows[i].row + c));
      }
    }
  }
};

// Every query of query cluster i sees every key of the key clusters j with mask[i][j]. The permutation costs nothing of its own:
// keys and values are read in their order when they are packed, queries when they are copied, and output rows go straight to
// their places. Neighbouring clusters make one run of keys, whatever their sizes. Whole tiles of a run are taken where they lie
// packed; its ends are collected, with those of other runs, into full segments, so that next to no register is padded.
template <bool Half>
void cluster_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, int64_t value_dim,
                       const Clusters& queries, const Clusters& keys, const bool* mask, float scale) {
  struct Rows {
    int64_t cost, b, h, i, at, count;
  };
  std::vector<Rows> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0, at = 0; i < queries.count; ++i) {
        const int64_t size = queries.sizes_of(b, h)[i], parts = (size + kClusterRows - 1) / kClusterRows;
        const bool* kept = mask + ((b * s.heads + h) * queries.count + i) * keys.count;
        int64_t seen = 0;
        for (int64_t j = 0; j < keys.count; ++j) seen += kept[j] ? keys.sizes_of(b, s.group_of(h))[j] : 0;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t from = size * part / parts, to = size * (part + 1) / parts;
          tasks.push_back({(to - from) * seen, b, h, i, at + from, to - from});
        }
        at += size;
      }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Rows& x, const Rows& y) { return x.cost > y.cost; });

  const int64_t words = Half ? s.dim / 2 : s.dim, groups = (s.keys + kLanes - 1) / kLanes, heads = s.batch * s.key_heads;
  const int64_t key_floats = kLanes * words, value_floats = kLanes * value_dim / (Half ? 2 : 1);  // of a group
  const Tensor packed = at::empty({heads * groups * (key_floats + value_floats)}, at::kFloat);
  float* all_keys = packed.data_ptr<float>();
  float* all_values = all_keys + heads * groups * key_floats;
  const int64_t segment = segment_of(4 * std::max(key_floats, value_floats));
  const int64_t whole = std::min<int64_t>(segment, 2 * kPair);  // keys are used where they lie in multiples of this

#pragma omp parallel num_threads(threads())
  {
    const Tiles amx(Half && words % kTile == 0);
    Workspace own(kClusterRows * (words + value_dim + kLanes + 2) + Scratch::floats(segment) +
                  segment * words + segment / kLanes * value_floats + value_dim + 160);
    float* copied = own.take(kClusterRows * words);
    const State state{own.take(kClusterRows * value_dim), own.take(kClusterRows * kLanes), own.take(kClusterRows),
                      own.take(kClusterRows)};
    const Scratch scratch(own, segment);
    float *collected_keys = own.take(segment * words + kLanes), *collected_values = own.take(segment / kLanes * value_floats);
    Collected<Half> collected{segment, words, value_dim, collected_keys, collected_values, own.take(value_dim)};

#pragma omp for schedule(static)
    for (int64_t item = 0; item < heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, from = item % groups * kLanes;
      const int64_t count = std::min<int64_t>(kLanes, s.keys - from), *order = keys.order_of(b, h) + from;
      const auto row = [&](const View& x, int lane) { return lane < count ? x.row(b, h, order[lane]) : nullptr; };
      pack_columns<Half>([&](int lane) { return row(k, lane); }, k.half, s.dim, all_keys + item * key_floats);
      pack_rows<Half>([&](int lane) { return row(v, lane); }, v.half, value_dim, all_values + item * value_floats);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const Rows& task = tasks[t];
      const int64_t b = task.b, h = task.h, key_head = s.group_of(h), first_group = (b * s.key_heads + key_head) * groups;
      const int64_t *rows = queries.order_of(b, h) + task.at, *sizes = keys.sizes_of(b, key_head);
      const bool* kept = mask + ((b * s.heads + h) * queries.count + task.i) * keys.count;
      for (int64_t r = 0; r < task.count; ++r) to_words<Half>(q.row(b, h, rows[r]), q.half, s.dim, copied + r * words);
      std::fill_n(state.sums, task.count * value_dim, 0.0f);
      std::fill_n(state.weights, task.count * kLanes, 0.0f);
      std::fill_n(state.shift, task.count, 0.0f);
      std::fill_n(state.limit, task.count, -kInfinity);
      const auto attend_rows = [&](const float* some_keys, int64_t word_stride, int64_t group_stride, const float* values,
                                   int64_t count) {
        for_rows(
            task.count,
            [&](auto m_, int64_t r) {
              constexpr int M = decltype(m_)::value;
              int64_t first[M], last[M];
              std::fill_n(first, M, 0);
              std::fill_n(last, M, count);
              attend<Half, M>(reinterpret_cast<const char*>(copied + r * words), words * 4, some_keys, word_stride, group_stride,
                              values, (count + kLanes - 1) / kLanes, words, value_dim, scale * kLog2e, first, last, r, state, scratch);
            },
            amx.on);
      };
      const auto attend_collected = [&] {
        collected.copy();
        attend_rows(collected.keys, segment, kLanes, collected.values, collected.count);
        collected.count = collected.piece_count = 0;
      };
      for (int64_t j = 0, key = 0, end = 0; j < keys.count; ++j) {
        end += sizes[j];
        if (kept[j] && j + 1 < keys.count && kept[j + 1]) continue;  // one run
        if (!kept[j]) key = end;
        while (key < end) {
          const int64_t group = first_group + key / kLanes, lane = key % kLanes;
          const float *group_keys = all_keys + group * key_floats, *group_values = all_values + group * value_floats;
          if (lane == 0 && end - key >= whole) {
            const int64_t count = std::min(segment, (end - key) / whole * whole);
            attend_rows(group_keys, kLanes, key_floats, group_values, count);
            key += count;
          } else {
            const int64_t count = std::min({kLanes - lane, end - key, segment - collected.count});
            collected.add(group_keys, group_values, lane, count);
            key += count;
            if (collected.count == segment) attend_collected();
          }
        }
      }
      if (collected.count > 0) attend_collected();
      for (int64_t r = 0; r < task.count; ++r) write_row(state, r, value_dim, nullptr, out.half, out.row(b, h, rows[r]));
    }
  }
}

// ---- attention of one query ------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 256;   // keys a thread takes at a time
constexpr int64_t kTogether = 4;  // query heads that share a pass over keys and values

template <class T, int G>
inline void add_values(const T* const* rows, const float* shares, int64_t stride, int64_t count, int64_t column, float* sums,
                       int64_t dim) {
  Vec total[G] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vec value = load(rows[i] + column);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) total[g] = total[g] + value * shares[g * stride + i];
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) store(sums + g * dim + column, total[g]);
}

// The part of one chunk of keys in the attention of `count` <= kTogether query heads: sums (heads, dim) relative to the chunk's
// own maximum, the maximum, and the weight. Keys and values are read once, where they lie.
template <class T>
void decode_chunk(const View& k, const View& v, int64_t b, int64_t h, int64_t from, int64_t to, const float* q, int64_t count,
                  int64_t dim, int64_t value_dim, float* sums, float* most, float* weights) {
  const int64_t keys = to - from;
  float scores[kTogether * kChunk], wide[kLanes * kMostDim];
  const T* rows[kChunk];
  for (int64_t at = 0; at < keys; at += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, keys - at);
    for (int64_t i = 0; i < kLanes; ++i) {
      const T* row = reinterpret_cast<const T*>(k.row(b, h, from + at + std::min(i, here - 1)));
      for (int64_t c = 0; c < dim; c += kLanes) store(wide + i * dim + c, load(row + c));
    }
    for (int64_t g = 0; g < count; ++g) {
      Vec total[kLanes] = {};
      for (int64_t c = 0; c < dim; c += kLanes) {
        const Vec query = load(q + g * dim + c);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) total[i] = total[i] + query * load(wide + i * dim + c);
      }
      store(scores + g * kChunk + at, sums_of(total));
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    float* row = scores + g * kChunk;
    for (int64_t i = keys; i % kLanes; ++i) row[i] = -kInfinity;
    Vec top = load(row), weight = {};
    for (int64_t i = kLanes; i < keys; i += kLanes) top = larger(top, load(row + i));
    most[g] = largest(top);
    for (int64_t i = 0; i < keys; i += kLanes) {
      const Vec share = exp2<false>(load(row + i) - most[g]);
      weight = weight + share;
      store(row + i, share);
    }
    weights[g] = sum(weight);
  }
  for (int64_t i = 0; i < keys; ++i) rows[i] = reinterpret_cast<const T*>(v.row(b, h, from + i));
  for (int64_t c = 0; c < value_dim; c += kLanes) {
    if (count == 4) add_values<T, 4>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 3) add_values<T, 3>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 2) add_values<T, 2>(rows, scores, kChunk, keys, c, sums, value_dim);
    if (count == 1) add_values<T, 1>(rows, scores, kChunk, keys, c, sums, value_dim);
  }
}

void decode_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, int64_t value_dim,
                      const float* sinks, float scale) {
  const int64_t per = s.heads / s.key_heads, passes = (per + kTogether - 1) / kTogether;
  const int64_t chunks = (s.keys + kChunk - 1) / kChunk, part = value_dim + 2;
  const Tensor parts = at::empty({s.batch * s.heads * chunks * part}, at::kFloat);
  float* all = parts.data_ptr<float>();  // (batch, head, chunk): sums, maximum, weight
  const auto part_of = [&](int64_t b, int64_t h, int64_t chunk) { return all + ((b * s.heads + h) * chunks + chunk) * part; };

#pragma omp parallel num_threads(threads())
  {
    Workspace own(kTogether * (s.dim + value_dim) + 64);
    float *query = own.take(kTogether * s.dim), *sums = own.take(kTogether * value_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < s.batch * s.key_heads * passes * chunks; ++item) {
      const int64_t chunk = item % chunks, pass = item / chunks % passes, head = item / chunks / passes;
      const int64_t b = head / s.key_heads, kh = head % s.key_heads, h = kh * per + pass * kTogether;
      const int64_t count = std::min(kTogether, (kh + 1) * per - h);
      const int64_t from = std::max(chunk * kChunk, s.start(b)), to = std::min((chunk + 1) * kChunk, s.keys);
      float most[kTogether], weights[kTogether];
      if (from < to) {
        for (int64_t g = 0; g < count; ++g) {
          to_words<false>(q.row(b, h + g, 0), q.half, s.dim, query + g * s.dim);
          for (int64_t c = 0; c < s.dim; ++c) query[g * s.dim + c] *= scale * kLog2e;
        }
        if (k.half)
          decode_chunk<BFloat16>(k, v, b, kh, from, to, query, count, s.dim, value_dim, sums, most, weights);
        else
          decode_chunk<float>(k, v, b, kh, from, to, query, count, s.dim, value_dim, sums, most, weights);
      }
      for (int64_t g = 0; g < count; ++g) {
        float* to_part = part_of(b, h + g, chunk);
        if (from < to) std::copy_n(sums + g * value_dim, value_dim, to_part);
        to_part[value_dim] = from < to ? most[g] : -kInfinity;
        to_part[value_dim + 1] = from < to ? weights[g] : 0.0f;
      }
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.batch * s.heads; ++item) {
      const int64_t b = item / s.heads, h = item % s.heads;
      float most = -kInfinity, weight = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) most = std::max(most, part_of(b, h, chunk)[value_dim]);
      std::fill_n(sums, value_dim, 0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* from = part_of(b, h, chunk);
        if (from[value_dim + 1] == 0.0f) continue;
        const float fade = std::exp2(from[value_dim] - most);
        weight += from[value_dim + 1] * fade;
        for (int64_t c = 0; c < value_dim; ++c) sums[c] += from[c] * fade;
      }
      const float total = weight + sink_weight(sinks ? sinks + h : nullptr, most);
      const float share = weight == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t c = 0; c < value_dim; ++c) {
        if (out.half)
          reinterpret_cast<BFloat16*>(out.row(b, h, 0))[c] = static_cast<BFloat16>(sums[c] * share);
        else
          out.floats(b, h, 0)[c] = sums[c] * share;
      }
    }
  }
}

// ---- XAttention's block scores ---------------------------------------------------------------------------------------------

constexpr int64_t kTileRows = 32;  // tile rows a thread takes at a time, at least: they share a pass over the keys

// Row A of tiles against column B: sum over i < stride of q[A * stride + stride - 1 - i] . k[B * stride + i]; softmax over B of
// `scale` times that; out (batch, heads, query blocks, key blocks) is the sum over the tiles of a block. Tiles without any token
// that a row sees count nothing, tokens missing from a tile count as zeros; tiles at an edge are taken whole.
template <bool Half>
void antidiagonal_scores(const Shape& s, const View& q, const View& k, int64_t stride, float scale, float* out) {
  const int64_t words = Half ? s.dim / 2 : s.dim, tiles = (s.keys + stride - 1) / stride, groups = (tiles + kLanes - 1) / kLanes;
  const int64_t width = groups * kLanes, per_block = s.block / stride, group_floats = stride * kLanes * words;
  const int64_t together = std::max<int64_t>(1, kTileRows / per_block);  // query blocks of a task
  const Tensor packed = at::empty({s.batch * s.key_heads * groups * group_floats}, at::kFloat);
  float* all_keys = packed.data_ptr<float>();
  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.query_blocks(); i += together) tasks.push_back({s.causal ? i : 0, b, h, i});
  tasks = longest_first(std::move(tasks));

#pragma omp parallel num_threads(threads())
  {
    const int64_t most_rows = together * per_block;
    const Tiles amx(Half && stride * words % kTile == 0);
    Workspace own(most_rows * (stride * words + width) + width + 64);
    float *query = own.take(most_rows * stride * words), *scores = own.take(most_rows * width), *column = own.take(width);

#pragma omp for schedule(static)
    for (int64_t item = 0; item < s.batch * s.key_heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, group = item % groups;
      for (int64_t i = 0; i < stride; ++i)
        pack_columns<Half>(
            [&](int lane) -> const char* {
              const int64_t key = (group * kLanes + lane) * stride + i;
              return key < s.keys && key >= s.start(b) ? k.row(b, h, key) : nullptr;
            },
            k.half, s.dim, all_keys + item * group_floats + i * kLanes * words);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const int64_t b = tasks[t].b, h = tasks[t].h, blocks = std::min(together, s.query_blocks() - tasks[t].i);
      const int64_t first_row = (s.first_block() + tasks[t].i) * per_block, rows = std::min(blocks * per_block, tiles - first_row);
      const int64_t first_query = std::max(s.offset(), s.start(b));
      const int64_t first_group = s.first_of(b, first_row * stride) / stride / kLanes;
      const int64_t columns = s.causal ? first_row + rows : tiles;
      for (int64_t r = 0; r < rows * stride; ++r) {
        const int64_t position = first_row * stride + r, reversed = r / stride * stride + stride - 1 - r % stride;
        const bool there = position >= first_query && position < s.keys;
        to_words<Half>(there ? q.row(b, h, position - s.offset()) : nullptr, q.half, s.dim, query + reversed * words);
      }
      const float* keys = all_keys + (b * s.key_heads + s.group_of(h)) * groups * group_floats;
      const int64_t row_words = stride * words;
      for_rows(
          rows,
          [&](auto m_, int64_t r) {
            constexpr int M = decltype(m_)::value;
            const auto* left = reinterpret_cast<const char*>(query + r * row_words);
            const int64_t count = (columns + kLanes - 1) / kLanes;
            int64_t group = first_group;
#ifdef ASSAY_AMX
            if constexpr (M >= kTile) {
              const auto products = [&](auto c_) {
                constexpr int C = decltype(c_)::value;
                for (; group + C <= count; group += C)
                  multiply_tiles<false, M / kTile, C>(left, 4 * row_words, keys + group * group_floats, kLanes, group_floats, row_words,
                                                      scores + r * width + group * kLanes, width);
              };
              products(std::integral_constant<int, 2>{});
              products(std::integral_constant<int, 1>{});
            }
#endif
            if constexpr (M < kTile)
              for_tiles(count - first_group, [&](auto n_, int64_t at) {
                constexpr int N = decltype(n_)::value;
                const int64_t group = first_group + at;
                Vec total[M][N] = {};
                multiply<Half, M, N>(total, left, 4 * row_words, keys + group * group_floats, kLanes, group_floats, row_words);
                for (int m = 0; m < M; ++m)
                  for (int n = 0; n < N; ++n) store(scores + (r + m) * width + (group + n) * kLanes, total[m][n]);
              });
          },
          amx.on);
      for (int64_t block = 0; block < blocks; ++block) {
        std::fill_n(column, width, 0.0f);
        for (int64_t r = block * per_block; r < std::min((block + 1) * per_block, rows); ++r) {
          const int64_t tile = first_row + r, last = s.causal ? tile + 1 : tiles;
          if ((tile + 1) * stride <= first_query) continue;  // no query in this row
          float* row = scores + r * width;
          const int64_t first_tile = s.first_of(b, tile * stride) / stride, from = first_tile / kLanes * kLanes;
          for (int64_t c = from; c < first_tile; ++c) row[c] = -kInfinity;
          for (int64_t c = last; c % kLanes; ++c) row[c] = -kInfinity;
          Vec most = all(-kInfinity), weight = {};
          for (int64_t c = from; c < last; c += kLanes) {
            const Vec score = load(row + c) * (scale * kLog2e);
            most = larger(most, score);
            store(row + c, score);
          }
          const float top = largest(most);
          for (int64_t c = from; c < last; c += kLanes) {
            const Vec share = exp2<false>(load(row + c) - top);
            weight = weight + share;
            store(row + c, share);
          }
          const float share = 1.0f / sum(weight);
          for (int64_t c = from; c < last; c += kLanes) store(column + c, load(column + c) + load(row + c) * share);
        }
        float* to = out + ((b * s.heads + h) * s.query_blocks() + tasks[t].i + block) * s.key_blocks();
        for (int64_t j = 0; j < s.key_blocks(); ++j) {
          to[j] = 0.0f;
          for (int64_t c = j * per_block; c < std::min((j + 1) * per_block, tiles); ++c) to[j] += column[c];
        }
      }
    }
  }
}

// ---- operators -------------------------------------------------------------------------------------------------------------

// (batch, heads, queries, dim), lying in memory as (batch, queries, heads, dim): what the next projection reads.
Tensor empty_output(const Tensor& q, int64_t dim) {
  return at::empty({q.size(0), q.size(2), q.size(1), dim}, q.options()).transpose(1, 2);
}

Tensor block_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask, const OptTensor& key_start,
                          int64_t block, bool causal, double scale, bool half, int64_t window, const OptTensor& sinks) {
  const Shape s = checked(q, k, block, causal, key_start, half, window);
  check_values(k, v);
  const bool* kept = checked_mask(mask, s);
  const float* sink = checked_sinks(sinks, s);
  Tensor out = empty_output(q, v.size(3));
  if (out.numel() == 0) return out;
#ifdef ASSAY_BF16
  if (half) {
    block_attention<true>(s, View(q), View(k), View(v), View(out), v.size(3), kept, sink, scale);
    return out;
  }
#endif
  block_attention<false>(s, View(q), View(k), View(v), View(out), v.size(3), kept, sink, scale);
  return out;
}

Clusters checked_clusters(const Tensor& order, const Tensor& sizes, const Tensor& x, const char* name) {
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2);
  TORCH_CHECK_VALUE(order.scalar_type() == at::kLong && order.is_contiguous() &&
                        order.sizes() == at::IntArrayRef({batch, heads, tokens}),
                    name, "_order must be a contiguous int64 tensor of (batch, heads, tokens)");
  TORCH_CHECK_VALUE(sizes.scalar_type() == at::kLong && sizes.is_contiguous() && sizes.dim() == 3 && sizes.size(0) == batch &&
                        sizes.size(1) == heads,
                    name, "_sizes must be a contiguous int64 tensor of (batch, heads, clusters)");
  const Clusters found{heads, tokens, sizes.size(2), order.data_ptr<int64_t>(), sizes.data_ptr<int64_t>()};
  const int64_t* end = found.order + order.numel();
  TORCH_CHECK_VALUE(std::all_of(found.order, end, [=](int64_t t) { return 0 <= t && t < tokens; }), name,
                    "_order must hold tokens from 0 to ", tokens - 1);
  for (int64_t head = 0; head < batch * heads; ++head) {
    int64_t total = 0;
    for (int64_t c = 0; c < found.count; ++c) {
      const int64_t size = found.sizes[head * found.count + c];
      TORCH_CHECK_VALUE(size >= 0 && size <= tokens, name, "_sizes must lie in [0, tokens], got ", size);
      total += size;
    }
    TORCH_CHECK_VALUE(total == tokens, name, "_sizes must sum to ", tokens, " for each head, got ", total);
  }
  return found;
}

Tensor cluster_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_order, const Tensor& key_order,
                            const Tensor& query_sizes, const Tensor& key_sizes, const Tensor& mask, double scale, bool half) {
  const Shape s = checked(q, k, 16, false, std::nullopt, half);
  check_values(k, v);
  const Clusters queries = checked_clusters(query_order, query_sizes, q, "query");
  const Clusters keys = checked_clusters(key_order, key_sizes, k, "key");
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool && mask.is_contiguous() &&
                        mask.sizes() == at::IntArrayRef({s.batch, s.heads, queries.count, keys.count}),
                    "mask must be a contiguous bool tensor of (batch, heads, query clusters, key clusters)");
  Tensor out = empty_output(q, v.size(3));
  if (out.numel() == 0) return out;
#ifdef ASSAY_BF16
  if (half) {
    cluster_attention<true>(s, View(q), View(k), View(v), View(out), v.size(3), queries, keys, mask.data_ptr<bool>(), scale);
    return out;
  }
#endif
  cluster_attention<false>(s, View(q), View(k), View(v), View(out), v.size(3), queries, keys, mask.data_ptr<bool>(), scale);
  return out;
}

Tensor decode_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& key_start, double scale,
                           const OptTensor& sinks) {
  const Shape s = checked(q, k, 16, false, key_start, false);
  check_values(k, v);
  TORCH_CHECK_VALUE(q.size(2) == 1, "q must hold one token, got ", q.size(2));
  const float* sink = checked_sinks(sinks, s);
  Tensor out = empty_output(q, v.size(3));
  if (out.numel() > 0) decode_attention(s, View(q), View(k), View(v), View(out), v.size(3), sink, scale);
  return out;
}

Tensor antidiagonal_scores_op(const Tensor& q, const Tensor& k, const OptTensor& key_start, int64_t stride, int64_t block,
                              bool causal, double scale, bool half, int64_t window) {
  const Shape s = checked(q, k, block, causal, key_start, half, window);
  TORCH_CHECK_VALUE(stride > 0 && block % stride == 0, "stride must divide block, got ", stride, " and ", block);
  Tensor out = at::empty({s.batch, s.heads, s.query_blocks(), s.key_blocks()}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
#ifdef ASSAY_BF16
  if (half) {
    antidiagonal_scores<true>(s, View(q), View(k), stride, scale, out.data_ptr<float>());
    return out;
  }
#endif
  antidiagonal_scores<false>(s, View(q), View(k), stride, scale, out.data_ptr<float>());
  return out;
}

bool has_bf16() {
#ifdef ASSAY_BF16
  return true;
#else
  return false;
#endif
}

bool has_tiles() { return tiles_allowed(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_start, int block, bool causal, float scale, "
      "bool half, *, int window=0, Tensor? sinks=None) -> Tensor");
  m.def(
      "cluster_attention(Tensor q, Tensor k, Tensor v, Tensor query_order, Tensor key_order, Tensor query_sizes, "
      "Tensor key_sizes, Tensor mask, float scale, bool half) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? key_start, float scale, *, Tensor? sinks=None) -> Tensor");
  m.def(
      "antidiagonal_scores(Tensor q, Tensor k, Tensor? key_start, int stride, int block, bool causal, float scale, bool half, "
      "*, int window=0) -> Tensor");
  m.def("attention_has_bf16() -> bool", &has_bf16);
  m.def("attention_has_tiles() -> bool", &has_tiles);
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("block_attention", block_attention_op);
  m.impl("cluster_attention", cluster_attention_op);
  m.impl("decode_attention", decode_attention_op);
  m.impl("antidiagonal_scores", antidiagonal_scores_op);
}
