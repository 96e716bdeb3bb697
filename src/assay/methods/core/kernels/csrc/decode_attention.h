// Attention of one position over keys and values in pages, for the query heads that share a key-value head.
//
// A sequence is cut at the multiples of 256 positions, wherever it lies and however many threads there are. Each chunk is done by
// itself: the largest score, the sum of the weights and the weighted values of every head ("a part"). Parts are folded together in
// the order of their chunks. So the floats that come out depend on the position and the window alone.

#pragma once
#include "panels.h"

namespace {

constexpr int64_t PAGE = 16, CHUNK = 256;
constexpr int64_t MOST_AHEAD = 2;  // pages of keys asked for early

// The positions of one chunk: in each page `keys` are [head][16] and `values` [16][head]. Of the first page the first `skip`
// positions lie before the window; `count` are counted from the beginning of the first page.
template <typename T>
struct Chunk {
  const T* keys[CHUNK / PAGE + MOST_AHEAD];  // `known` of them
  const T* values[CHUNK / PAGE];
  int64_t known, skip, count;
};

// A part of `group` heads: their maxima, their sums, their outputs [group][head].
inline int64_t part_floats(int64_t group, int64_t head) { return (group * (head + 2) + 15) / 16 * 16; }

template <int R, typename T>
inline void page_scores(const T* k, const float* q, int64_t head, float* s) {  // one page, R heads
  v16f even[R] = {}, odd[R] = {};
  for (int64_t d = 0; d < head; d += 2) {
    const v16f k0 = load_values(k + d * PAGE), k1 = load_values(k + d * PAGE + PAGE);
    for (int r = 0; r < R; ++r) {
      even[r] += k0 * splat(q[r * head + d]);
      odd[r] += k1 * splat(q[r * head + d + 1]);
    }
  }
  for (int r = 0; r < R; ++r) store(s + r * CHUNK, even[r] + odd[r]);
}

template <int R, int V, typename T>
inline void add_values(const Chunk<T>& chunk, const float* p, int64_t head, int64_t d, float* out) {  // V vectors of 16 of R heads
  v16f a[R][V] = {};
  for (int64_t page = 0, i = chunk.skip; i < chunk.count; ++page) {
    const int64_t stop = std::min(chunk.count, (page + 1) * PAGE);
    const T* v = chunk.values[page] + (i - page * PAGE) * head + d;
    for (; i < stop; ++i, v += head) {
      v16f x[V];
      for (int j = 0; j < V; ++j) x[j] = load_values(v + 16 * j);
      for (int r = 0; r < R; ++r) {
        const v16f w = splat(p[r * CHUNK + i]);
        for (int j = 0; j < V; ++j) a[r][j] += w * x[j];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < V; ++j) store(out + r * head + d + 16 * j, a[r][j]);
}

// R heads of a chunk: q [R][head] (scaled), scores s [R][CHUNK], and their places in the part.
template <int R, typename T>
inline void attend_heads(const Chunk<T>& chunk, const float* q, int64_t head, float* s, float* m, float* l, float* out) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const int64_t pages = (chunk.count + PAGE - 1) / PAGE, bytes = PAGE * head * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < pages; ++b) {
    const char* later = reinterpret_cast<const char*>(chunk.keys[std::min(b + MOST_AHEAD, chunk.known - 1)]);
    const char* values = reinterpret_cast<const char*>(chunk.values[b]);
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(later + i);
      __builtin_prefetch(values + i);
    }
    page_scores<R>(chunk.keys[b], q, head, s + b * PAGE);
  }
  for (int r = 0; r < R; ++r) {
    float* p = s + r * CHUNK;
    for (int64_t i = 0; i < chunk.skip; ++i) p[i] = lowest;
    for (int64_t i = chunk.count; i < pages * PAGE; ++i) p[i] = lowest;
    v16f top = splat(lowest);
    for (int64_t i = 0; i < pages * PAGE; i += 16) top = vmax(top, load<v16f>(p + i));
    m[r] = hmax(top);
    v16f sum = {};
    for (int64_t i = 0; i < pages * PAGE; i += 16) {
      const v16f below = load<v16f>(p + i) - splat(m[r]);
      const v16f e = below == below ? vexp(below) : below;  // what is no number stays none
      store(p + i, e);
      sum += e;
    }
    l[r] = hsum(sum);
  }
  int64_t d = 0;
  for (; d + 64 <= head; d += 64) add_values<R, 4>(chunk, s, head, d, out);
  for (; d + 32 <= head; d += 32) add_values<R, 2>(chunk, s, head, d, out);
  for (; d < head; d += 16) add_values<R, 1>(chunk, s, head, d, out);
}

// All heads of a group over one chunk: the part. `s` has room for 4 x CHUNK scores.
template <typename T>
[[gnu::noinline]] void attend_chunk(const Chunk<T>& chunk, const float* q, int64_t group, int64_t head, float* s, float* part) {
  float *m = part, *l = part + group, *out = part + 2 * group;
  int64_t r = 0;
  for (; r + 4 <= group; r += 4) attend_heads<4>(chunk, q + r * head, head, s, m + r, l + r, out + r * head);
  switch (group - r) {
    case 3: attend_heads<3>(chunk, q + r * head, head, s, m + r, l + r, out + r * head); break;
    case 2: attend_heads<2>(chunk, q + r * head, head, s, m + r, l + r, out + r * head); break;
    case 1: attend_heads<1>(chunk, q + r * head, head, s, m + r, l + r, out + r * head); break;
    default: break;
  }
}

// Add the part of the next chunk to what the chunks before it gave.
[[gnu::noinline]] void fold(float* whole, const float* part, int64_t group, int64_t head) {
  for (int64_t r = 0; r < group; ++r) {
    const float largest = part[r] > whole[r] ? part[r] : whole[r];
    const float before = std::exp(whole[r] - largest), now = std::exp(part[r] - largest);
    whole[r] = largest;
    whole[group + r] = whole[group + r] * before + part[group + r] * now;
    float* to = whole + 2 * group + r * head;
    const float* from = part + 2 * group + r * head;
    for (int64_t d = 0; d < head; d += 16) store(to + d, load<v16f>(to + d) * splat(before) + load<v16f>(from + d) * splat(now));
  }
}

// The outputs [group][head] of all chunks together; false if they hold what is no number.
[[gnu::noinline]] bool finish(const float* whole, int64_t group, int64_t head, float* out) {
  v16f zero = {};
  for (int64_t r = 0; r < group; ++r) {
    const v16f inverse = splat(1.0f / whole[group + r]);
    for (int64_t d = 0; d < head; d += 16) {
      const v16f y = load<v16f>(whole + 2 * group + r * head + d) * inverse;
      store(out + r * head + d, y);
      zero += y * v16f{};
    }
  }
  return hsum(zero) == 0;
}

}  // namespace
