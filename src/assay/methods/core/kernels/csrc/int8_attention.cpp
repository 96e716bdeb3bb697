// Attention with integer QK^T on the CPU (SageAttention2): smoothed queries and keys as int8 codes, values in bfloat16 or float.
//
// Keys are smoothed, quantised and packed once per key head and shared by the query heads of its group; each query block is
// quantised by the thread that attends it. A word of the micro kernel is four neighbouring codes of the head dimension, which VNNI
// multiplies (u8 x s8 -> s32): queries are stored as code + 128, and `offset` = -128 * (sum of a key's codes) undoes it. The
// product becomes a float once, times the scale of its row and of its key, plus dS, the logits of the mean query that smoothing
// took away. Where there is AMX the same words are multiplied as tiles. The online softmax is that of attention.h. A query that sees no key gives zeros and a log-sum-exp of -infinity.
//
// With a mask only the kept blocks of keys are multiplied, and only they get dS; query blocks then lie on the grid of positions.

#include "attention.h"

#include <ATen/ops/zeros.h>

#include <tuple>

#if defined(ASSAY_AVX512) && defined(__AVX512VNNI__)
#define ASSAY_VNNI 1
#endif

namespace {

constexpr int64_t kBlock = 128;  // queries that share a mean, and that a thread attends together, where there is no mask
constexpr int64_t kWordCodes = 4;

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
inline Ints load_ints(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Adds the products of four codes, unsigned ones in `a` and signed ones in each lane of `b`.
inline Ints dot4(Ints total, uint32_t a, Ints b) {
#ifdef ASSAY_VNNI
  return (Ints)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(a), (__m512i)b);
#else
  for (int i = 0; i < 4; ++i) total += (b << (24 - 8 * i) >> 24) * static_cast<int32_t>(a >> (8 * i) & 255);
  return total;
#endif
}

// ---- quantising ------------------------------------------------------------------------------------------------------------

// Which rows share a scale: inside each `size` rows those of one class, where row r of every 8 is of class r / (8 / classes).
struct Groups {
  int64_t size, classes;
  int64_t of(int64_t row) const { return row / size * classes + row % 8 / (8 / classes); }
  int64_t count(int64_t rows) const { return (rows + size - 1) / size * classes; }
};

// x[c] = row[c] - mean[c]
inline void centred(const char* row, bool half, int64_t dim, const float* mean, float* x) {
  to_words<false>(row, half, dim, x);
  for (int64_t c = 0; c < dim; ++c) x[c] -= mean[c];
}

// The bits of the largest |x|: they order like the numbers, NaN above infinity.
inline int32_t largest_bits(const float* x, int64_t dim) {
  int32_t most = 0;
  for (int64_t c = 0; c < dim; ++c) {
    int32_t bits;
    std::memcpy(&bits, x + c, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  return most;
}

// max / levels + 1e-7, which is NaN or infinite when a number of the group is: then so are its scores.
inline float scale_of(int32_t bits, float levels) {
  float most;
  std::memcpy(&most, &bits, 4);
  return most / levels + 1e-7f;
}

// round(x / scale), half away from zero, plus `shift`; returns the sum of the codes before the shift.
inline int32_t to_codes(const float* x, int64_t dim, float scale, int32_t shift, uint8_t* codes) {
  int32_t total = 0;
  if (!(scale < kInfinity)) {
    std::memset(codes, static_cast<uint8_t>(shift), dim);
    return 0;
  }
  for (int64_t c = 0; c < dim; ++c) {
    const float level = x[c] / scale;
    const int32_t code = static_cast<int32_t>(level + std::copysign(0.5f, level));
    codes[c] = static_cast<uint8_t>(code + shift);
    total += code;
  }
  return total;
}

template <class T>
void dots_of_kLanes(const T* const* rows, const float* with, int64_t dim, float* dots) {
  Vec total[kLanes] = {};
  for (int64_t c = 0; c < dim; c += kLanes) {
    const Vec column = load(with + c);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) total[i] = total[i] + load(rows[i] + c) * column;
  }
  store(dots, sums_of(total));
}

// dots[key] = with . k[key] - bias, for the groups of keys that hold [from, to)
void dots_of(const View& k, int64_t b, int64_t h, int64_t from, int64_t to, const float* with, int64_t dim, float bias, float* dots) {
  const auto over = [&](auto type) {
    using T = decltype(type);
    for (int64_t key = from / kLanes * kLanes; key < to; key += kLanes) {
      const T* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const T*>(k.row(b, h, std::min(key + i, to - 1)));
      dots_of_kLanes(rows, with, dim, dots + key);
      store(dots + key, load(dots + key) - bias);
    }
  };
  k.half ? over(BFloat16()) : over(float());
}

inline float dot(const float* a, const float* b, int64_t dim) {
  Vec total = {};
  for (int64_t c = 0; c < dim; c += kLanes) total = total + load(a + c) * load(b + c);
  return sum(total);
}

// ---- keys and values -------------------------------------------------------------------------------------------------------

// The mean of the rows [from, to).
void mean_of(const View& x, int64_t b, int64_t h, int64_t from, int64_t to, int64_t dim, float* mean) {
  float row[kMostDim];
  std::fill_n(mean, dim, 0.0f);
  for (int64_t t = from; t < to; ++t) {
    to_words<false>(x.row(b, h, t), x.half, dim, row);
    for (int64_t c = 0; c < dim; ++c) mean[c] += row[c];
  }
  for (int64_t c = 0; c < dim; ++c) mean[c] /= std::max<int64_t>(to - from, 1);
}

// Quantises and packs the keys [first, last) of one head; first is a multiple of kLanes, padding and what fills up becomes zeros.
void pack_keys(const Shape& s, const View& k, int64_t b, int64_t h, int64_t first, int64_t last, const float* mean, Groups groups,
               float levels, uint8_t* codes, float* scales, int32_t* offsets) {
  float row[kMostDim];
  uint8_t flat[kMostDim];
  std::vector<int32_t> most(groups.count(last - first), 0);
  for (int64_t key = std::max(first, s.start(b)); key < std::min(last, s.keys); ++key) {
    centred(k.row(b, h, key), k.half, s.dim, mean, row);
    int32_t& known = most[groups.of(key - first)];
    known = std::max(known, largest_bits(row, s.dim));
  }
  for (int64_t key = first; key < last; ++key) {
    const bool there = key >= s.start(b) && key < s.keys;
    scales[key] = there ? scale_of(most[groups.of(key - first)], levels) : 0.0f;
    std::fill_n(flat, s.dim, 0);
    if (there) {
      centred(k.row(b, h, key), k.half, s.dim, mean, row);
      offsets[key] = -128 * to_codes(row, s.dim, scales[key], 0, flat);
    } else {
      offsets[key] = 0;
    }
    uint8_t* to = codes + key / kLanes * kLanes * s.dim + key % kLanes * kWordCodes;
    for (int64_t c = 0; c < s.dim; c += kWordCodes) std::memcpy(to + c * kLanes, flat + c, kWordCodes);
  }
}

// ---- attention -------------------------------------------------------------------------------------------------------------

struct Options {
  const bool* mask;  // (batch, heads, query blocks, key blocks) of shape.block positions each; or null
  float scale, levels;
  Groups queries, keys;
  bool smooth_q, smooth_k;
};

template <bool Half>
void int8_attention(const Shape& s, const View& q, const View& k, const View& v, const View& out, float* lse, int64_t value_dim,
                    const Options& o) {
  const int64_t heads = s.batch * s.key_heads;
  const int64_t groups = (s.keys + kLanes - 1) / kLanes + 1, padded = groups * kLanes;  // tiles read a group past the last key
  const int64_t words = s.dim / kWordCodes, code_bytes = kLanes * s.dim, value_floats = kLanes * value_dim / (Half ? 2 : 1);
  const int64_t key_parts = (padded + o.keys.size - 1) / o.keys.size;
  // Without a mask query blocks begin at query 0, as the paper's do, and all keys are one block.
  const int64_t lead = o.mask ? s.offset() - s.first_block() * s.block : 0, key_block = o.mask ? s.block : padded;
  const int64_t query_blocks = (lead + s.queries + s.block - 1) / s.block, most_rows = std::min(s.block, s.queries);
  const auto kept_by = [&](int64_t b, int64_t h, int64_t i) {
    return o.mask ? o.mask + ((b * s.heads + h) * query_blocks + i) * s.key_blocks() : nullptr;
  };
  Tensor means = at::zeros({heads, s.dim}, at::kFloat), codes = at::empty({heads * groups * code_bytes}, at::kByte);
  Tensor scales = at::empty({heads * padded}, at::kFloat), offsets = at::empty({heads * padded}, at::kInt);
  Tensor values = at::empty({heads * groups * value_floats}, at::kFloat);
  float *mean = means.data_ptr<float>(), *key_scale = scales.data_ptr<float>(), *all_values = values.data_ptr<float>();
  uint8_t* all_codes = codes.data_ptr<uint8_t>();
  int32_t* key_offset = offsets.data_ptr<int32_t>();

  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < query_blocks; ++i) {
        const int64_t seen = s.causal ? s.offset() - lead + (i + 1) * s.block : s.keys;
        const bool* kept = kept_by(b, h, i);
        const int64_t columns = std::min((seen + s.block - 1) / s.block, s.key_blocks());
        const int64_t unseen = s.first_of(b, s.offset() + std::max<int64_t>(i * s.block - lead, 0));
        const int64_t before = std::min(unseen / s.block, columns);
        tasks.push_back({kept ? std::count(kept + before, kept + columns, true) : seen - unseen, b, h, i});
      }
  tasks = longest_first(std::move(tasks));
  const int64_t segment = segment_of(std::max(code_bytes, 4 * value_floats));

#pragma omp parallel num_threads(threads())
  {
    const Tiles amx(Half && words % kTile == 0);
    Workspace own(most_rows * (2 * s.dim + value_dim + kLanes + 4) + 2 * s.dim + padded + Scratch::floats(segment) + 240);
    float *rows_of_q = own.take(most_rows * s.dim), *query_mean = own.take(s.dim), *bias = own.take(padded);
    float *row_scale = own.take(most_rows), *correction = own.take(most_rows);
    auto* query_codes = reinterpret_cast<uint8_t*>(own.take(most_rows * words));
    const State state{own.take(most_rows * value_dim), own.take(most_rows * kLanes), own.take(most_rows), own.take(most_rows)};
    const Scratch scratch(own, segment);
    std::fill_n(bias, padded, 0.0f);
    std::vector<int32_t> most(o.queries.count(most_rows));

    if (o.smooth_k) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head)
        mean_of(k, head / s.key_heads, head % s.key_heads, s.start(head / s.key_heads), s.keys, s.dim, mean + head * s.dim);
    }
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < heads * key_parts; ++item) {
      const int64_t head = item / key_parts, first = item % key_parts * o.keys.size;
      pack_keys(s, k, head / s.key_heads, head % s.key_heads, first, std::min(first + o.keys.size, padded), mean + head * s.dim,
                o.keys, o.levels, all_codes + head * groups * code_bytes, key_scale + head * padded, key_offset + head * padded);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < heads * groups; ++item) {
      const int64_t b = item / groups / s.key_heads, h = item / groups % s.key_heads, group = item % groups;
      const auto row = [&](int lane) -> const char* {
        const int64_t key = group * kLanes + lane;
        return key < s.keys && key >= s.start(b) ? v.row(b, h, key) : nullptr;
      };
      pack_rows<Half>(row, v.half, value_dim, all_values + item * value_floats);
    }

#pragma omp for schedule(dynamic, 1)
    for (size_t t = 0; t < tasks.size(); ++t) {
      const int64_t b = tasks[t].b, h = tasks[t].h, query = std::max<int64_t>(tasks[t].i * s.block - lead, 0);
      const int64_t rows = std::min((tasks[t].i + 1) * s.block - lead, s.queries) - query;
      const bool* kept = kept_by(b, h, tasks[t].i);
      const int64_t position = s.offset() + query, start = s.start(b), head = b * s.key_heads + s.group_of(h);
      const int64_t unseen = start > 0 ? std::clamp<int64_t>(start - position, 0, rows) : 0;  // rows of padding come first
      const int64_t end = s.causal ? position + rows : s.keys;  // no row sees a key from here on
      std::fill_n(query_mean, s.dim, 0.0f);
      if (o.smooth_q) mean_of(q, b, h, query + unseen, query + rows, s.dim, query_mean);
      const float mean_dot = dot(query_mean, mean + head * s.dim, s.dim);
      std::fill(most.begin(), most.end(), 0);
      for (int64_t r = unseen; r < rows; ++r) {
        float* row = rows_of_q + r * s.dim;
        to_words<false>(q.row(b, h, query + r), q.half, s.dim, row);
        correction[r] = o.scale * dot(row, mean + head * s.dim, s.dim);
        for (int64_t c = 0; c < s.dim; ++c) row[c] -= query_mean[c];
        most[o.queries.of(r)] = std::max(most[o.queries.of(r)], largest_bits(row, s.dim));
      }
      for (int64_t r = 0; r < rows; ++r) {
        row_scale[r] = r < unseen ? 0.0f : scale_of(most[o.queries.of(r)], o.levels);
        if (r < unseen) std::memset(query_codes + r * s.dim, 128, s.dim);
        else to_codes(rows_of_q + r * s.dim, s.dim, row_scale[r], 128, query_codes + r * s.dim);
      }
      std::fill_n(state.sums, rows * value_dim, 0.0f);
      std::fill_n(state.weights, rows * kLanes, 0.0f);
      std::fill_n(state.shift, rows, 0.0f);
      std::fill_n(state.limit, rows, -kInfinity);

      const int64_t begin = s.first_of(b, std::max(position, start));  // nor one before
      for (int64_t j = begin / key_block; j * key_block < end; ++j) {
        if (kept && !kept[j]) continue;
        const int64_t block_start = std::max(j * key_block, begin);
        while (kept && (j + 1) * key_block < end && kept[j + 1]) ++j;  // neighbouring blocks make one run
        const int64_t block_end = std::min((j + 1) * key_block, end);
        if (o.smooth_q) dots_of(k, b, s.group_of(h), block_start, block_end, query_mean, s.dim, mean_dot, bias);
        for (int64_t key = block_start / kLanes * kLanes; key < block_end; key += segment) {
          const int64_t key_end = std::min(key + segment, block_end), group = head * groups + key / kLanes;
          for_rows(
              rows,
              [&](auto m_, int64_t r) {
                constexpr int M = decltype(m_)::value;
                int64_t first[M], last[M];
                for (int m = 0; m < M; ++m) {
                  first[m] = s.first_of(b, position + r + m) - key;
                  last[m] = r + m < unseen ? 0 : std::min(key_end, s.causal ? position + r + m + 1 : key_end) - key;
                }
                if (last[M - 1] <= std::max<int64_t>(first[0], 0)) return;
                const uint8_t *codes_of_rows = query_codes + r * s.dim, *codes_of_keys = all_codes + group * code_bytes;
                const int64_t first_key = head * padded + key;
                const int64_t groups_seen = (last[M - 1] + kLanes - 1) / kLanes;
                const float* some_values = all_values + group * value_floats;
                // Products as int32, without the offsets of the keys, into scores.
                const auto to_score = [&](Ints product, int64_t row, int64_t place) __attribute__((always_inline)) {
                  const Vec whole = __builtin_convertvector(product + load_ints(key_offset + first_key + place), Vec);
                  return whole * (load(key_scale + first_key + place) * row_scale[row]) + load(bias + key + place);
                };
#ifdef ASSAY_AMX
                if constexpr (Half && M >= kTile) {
                  const auto products = [&](int64_t place, float* to) {
                    multiply_tiles<true, M / kTile, 2>(reinterpret_cast<const char*>(codes_of_rows), s.dim, codes_of_keys + place * s.dim,
                                                       kLanes, kLanes * words, words, to, kPair);
                  };
                  const auto finish = [&](int64_t first_row, int64_t place, auto& total) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int n = 0; n < 2; ++n)
#pragma GCC unroll 8
                      for (int m = 0; m < kSoftRows; ++m)
                        total[m][n] = to_score((Ints)total[m][n], r + first_row + m, place + n * kLanes);
                  };
                  attend_tiles<M / kTile>(products, finish, some_values, groups_seen, value_dim, o.scale * kLog2e, first, last, r, state,
                                          scratch);
                }
#endif
                if constexpr (M < kTile) {
                  const auto score = [&](auto& total, int64_t place) __attribute__((always_inline)) {
                    constexpr int N = std::extent_v<std::remove_reference_t<decltype(total)>, 1>;
                    Ints products[M][N] = {};
                    for (int64_t w = 0; w < words; ++w) {
                      Ints column[N];
#pragma GCC unroll 8
                      for (int n = 0; n < N; ++n)
                        column[n] = load_ints(codes_of_keys + (place + n * kLanes) * s.dim + w * kLanes * kWordCodes);
#pragma GCC unroll 8
                      for (int m = 0; m < M; ++m) {
                        uint32_t word;
                        std::memcpy(&word, codes_of_rows + m * s.dim + w * kWordCodes, 4);
#pragma GCC unroll 8
                        for (int n = 0; n < N; ++n) products[m][n] = dot4(products[m][n], word, column[n]);
                      }
                    }
#pragma GCC unroll 8
                    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
                      for (int m = 0; m < M; ++m) total[m][n] = to_score(products[m][n], r + m, place + n * kLanes);
                  };
                  attend_scores<Half, M>(score, some_values, groups_seen, value_dim, o.scale * kLog2e, first, last, r, state, scratch);
                }
              },
              amx.on);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float weight = sum(load(state.weights + r * kLanes));
        const bool seen = !(weight == 0.0f);  // NaN is passed on
        const float share = seen ? 1.0f / weight : 0.0f;
        const float* sums = state.sums + r * value_dim;
        lse[(b * s.heads + h) * s.queries + query + r] =
            seen ? (state.shift[r] + std::log2(weight)) / kLog2e + correction[r] : -kInfinity;
        if (out.half)
          for (int64_t c = 0; c < value_dim; ++c)
            reinterpret_cast<BFloat16*>(out.row(b, h, query + r))[c] = static_cast<BFloat16>(sums[c] * share);
        else
          for (int64_t c = 0; c < value_dim; ++c) out.floats(b, h, query + r)[c] = sums[c] * share;
      }
    }
  }
}

// ---- operator --------------------------------------------------------------------------------------------------------------

// `groups` = (size, classes) of the queries and of the keys; without a mask `block` means nothing. Returns the output
// (batch, heads, queries, value dim), lying in memory as (batch, queries, heads, value dim), and the natural log-sum-exp of the scaled scores (batch, heads, queries).
std::tuple<Tensor, Tensor> int8_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask,
                                             const OptTensor& key_start, int64_t block, bool causal, double scale, int64_t levels,
                                             at::IntArrayRef groups, bool smooth_q, bool smooth_k, bool half,
                                             int64_t window) {
  const bool last_of_keys = causal || key_start.has_value() || mask.has_value();
  Shape s = checked(q, k, block, causal, key_start, half, window, !last_of_keys);
  if (!mask.has_value()) s.block = kBlock;
  check_values(k, v);
  const bool* kept = checked_mask(mask, s);
  TORCH_CHECK_VALUE(k.size(2) > 0, "k must hold at least one token");
  TORCH_CHECK_VALUE(levels > 0 && levels <= 127, "levels must be 1 to 127, got ", levels);
  TORCH_CHECK_VALUE(groups.size() == 4, "groups must be (query rows, classes, key rows, classes), got ", groups);
  for (const int i : {0, 2})
    TORCH_CHECK_VALUE(groups[i] > 0 && groups[i] % 16 == 0 && kBlock % groups[i] == 0 && groups[i + 1] > 0 && 8 % groups[i + 1] == 0,
                      "groups must be of 16, 32, 64 or 128 rows and 1, 2, 4 or 8 classes, got ", groups);
  Tensor out = at::empty({s.batch, s.queries, s.heads, v.size(3)}, q.options()).transpose(1, 2);
  Tensor lse = at::empty({s.batch, s.heads, s.queries}, q.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  const Options o{kept, static_cast<float>(scale), static_cast<float>(levels),
                  {groups[0], groups[1]}, {groups[2], groups[3]}, smooth_q, smooth_k};
#ifdef ASSAY_BF16
  if (half) {
    int8_attention<true>(s, View(q), View(k), View(v), View(out), lse.data_ptr<float>(), v.size(3), o);
    return {out, lse};
  }
#endif
  int8_attention<false>(s, View(q), View(k), View(v), View(out), lse.data_ptr<float>(), v.size(3), o);
  return {out, lse};
}

bool has_vnni() {
#ifdef ASSAY_VNNI
  return true;
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def(
      "int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_start, int block, bool causal, float scale, "
      "int levels, int[] groups, bool smooth_q, bool smooth_k, bool half, *, int window=0) -> (Tensor, Tensor)");
  m.def("int8_attention_has_vnni() -> bool", &has_vnni);
}

TORCH_LIBRARY_IMPL(assay, CPU, m) { m.impl("int8_attention", int8_attention_op); }
