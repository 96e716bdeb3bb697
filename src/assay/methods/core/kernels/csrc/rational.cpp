// Group rational functions y = P(x) / Q(x), degrees 5 and 4, and their gradients, in one pass over memory each way.
//
// x is (rows, channels), the channels of a group lie together; a is (groups, 6), b is (groups, 4), and either may have one row
// that all groups share. Q = 1 + sum |b_i| |x|^i, or 1 + |sum b_i x^i|.
//
// A row is cut into spans: the groups where these are whole vectors, else single vectors, whose lanes then have coefficients of
// their own (a group of 12 channels would leave a quarter of every vector idle). Sums of gradients stay in vectors for a block
// of rows and are then added in double; those of the threads are added in order: the same threads give the same bits. float32 does
// not hold the fifth power of numbers beyond 10^7 or so: a row with any beyond kFar is computed in double, number by number.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kRows = 16;  // of a block
constexpr float kFar = 1 << 20;

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <class T>
struct Lanes {
  static constexpr int64_t count = 64 / sizeof(T);
  typedef T vector __attribute__((vector_size(64)));
};

// f(c, n) for the vectors of [begin, end): n is their number of lanes, a constant for all but a last, shorter one.
template <class T, class F>
inline void vectors(int64_t begin, int64_t end, F&& f) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (; begin + lanes <= end; begin += lanes) f(begin, std::integral_constant<int64_t, lanes>{});
  if (begin < end) f(begin, end - begin);
}

template <class V, class T, class N>
inline V read(const T* from, N n) {  // the lanes past n are 0
  V v = {};
  std::memcpy(&v, from, n * sizeof(T));
  return v;
}

template <class V>
inline V absolute(const V& v) {
  return v < 0 ? -v : v;
}

// How a row is cut, and the ten coefficients of each span: a, then b, whose absolute values are taken where only those count.
template <class T, bool AbsOfSum>
struct Spans {
  using V = typename Lanes<T>::vector;
  static constexpr int64_t lanes = Lanes<T>::count;
  int64_t channels, groups, width, length, count;
  std::vector<std::array<V, 10>> coefficients;

  Spans(const Tensor& x, const Tensor& a, const Tensor& b)
      : channels(x.size(1)),
        groups(std::max(a.size(0), b.size(0))),
        width(channels / groups),
        length(width % lanes ? lanes : std::max(width, lanes)),
        count((channels + length - 1) / length),
        coefficients(count) {
    for (int64_t span = 0; span < count; ++span)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* ag = a.data_ptr<T>() + (a.size(0) == 1 ? 0 : group(span, lane)) * 6;
        const T* bg = b.data_ptr<T>() + (b.size(0) == 1 ? 0 : group(span, lane)) * 4;
        for (int i = 0; i < 6; ++i) coefficients[span][i][lane] = ag[i];
        for (int i = 0; i < 4; ++i) coefficients[span][6 + i][lane] = AbsOfSum ? bg[i] : std::abs(bg[i]);
      }
  }

  int64_t group(int64_t span, int64_t lane) const { return std::min((span * length + lane) / width, groups - 1); }
};

template <bool AbsOfSum, class V>
inline V value(const V& v, const std::array<V, 10>& k) {
  const V u = AbsOfSum ? v : absolute(v);
  const V s = u * (k[6] + u * (k[7] + u * (k[8] + u * k[9])));
  const V p = k[0] + v * (k[1] + v * (k[2] + v * (k[3] + v * (k[4] + v * k[5]))));
  return p / (1 + (AbsOfSum ? absolute(s) : s));
}

// The gradient of v where that of the value is up; adds to sum those of a and of |b| (AbsOfSum: of b).
template <bool AbsOfSum, class V>
inline V slopes(const V& v, const V& up, const std::array<V, 10>& k, std::array<V, 10>& sum) {
  const V u = AbsOfSum ? v : absolute(v);
  const V s = u * (k[6] + u * (k[7] + u * (k[8] + u * k[9])));
  const V slope = k[6] + u * (2 * k[7] + u * (3 * k[8] + u * (4 * k[9])));  // ds / du
  const V& side = AbsOfSum ? s : v;
  const V turned = side > 0 ? slope : (side < 0 ? -slope : V{});  // dQ / dx
  const V over = 1 / (1 + (AbsOfSum ? absolute(s) : s));
  const V p = k[0] + v * (k[1] + v * (k[2] + v * (k[3] + v * (k[4] + v * k[5]))));
  const V rise = k[1] + v * (2 * k[2] + v * (3 * k[3] + v * (4 * k[4] + v * (5 * k[5]))));
  const V y = p * over;
  V w = up * over;
  const V found = w * (rise - y * turned);
  V z = -w * y;
  if (AbsOfSum) z = s > 0 ? z : (s < 0 ? -z : V{});
  sum[0] += w;
  for (int i = 1; i < 6; ++i) sum[i] += (w *= v);
  for (int i = 6; i < 10; ++i) sum[i] += (z *= u);
  return found;
}

inline bool far(const double*, int64_t) { return false; }
inline bool far(const float* row, int64_t count) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t c = 0; c < count; ++c) most = std::max(most, std::abs(row[c]));
  return most > kFar;
}

// f(c, span, lane, k) for each channel of a row, with its ten coefficients in double.
template <class T, bool AbsOfSum, class F>
void each(const Spans<T, AbsOfSum>& spans, F&& f) {
  for (int64_t c = 0; c < spans.channels; ++c) {
    const int64_t span = c / spans.length, lane = (c - span * spans.length) % spans.lanes;
    std::array<double, 10> k;
    for (int i = 0; i < 10; ++i) k[i] = spans.coefficients[span][i][lane];
    f(c, span, lane, k);
  }
}

template <class T, bool AbsOfSum>
void forward(const T* x, const Spans<T, AbsOfSum>& spans, T* y, int64_t rows) {
  using V = typename Lanes<T>::vector;
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * spans.channels;
    T* to = y + r * spans.channels;
    if (far(from, spans.channels)) {
      each(spans, [&](int64_t c, int64_t, int64_t, const std::array<double, 10>& k) {
        to[c] = static_cast<T>(value<AbsOfSum>(static_cast<double>(from[c]), k));
      });
      continue;
    }
    for (int64_t span = 0; span < spans.count; ++span) {
      const std::array<V, 10> k = spans.coefficients[span];
      const int64_t end = std::min((span + 1) * spans.length, spans.channels);
      vectors<T>(span * spans.length, end, [&](int64_t c, auto n) {
        const V found = value<AbsOfSum>(read<V>(from + c, n), k);
        std::memcpy(to + c, &found, n * sizeof(T));
      });
    }
  }
}

// Adds to total (groups, 10) the gradients of a and of |b| (AbsOfSum: of b).
template <class T, bool AbsOfSum>
void backward(const T* grad, const T* x, const Spans<T, AbsOfSum>& spans, T* dx, std::vector<double>& total, int64_t rows) {
  using V = typename Lanes<T>::vector;
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t blocks = (rows + kRows - 1) / kRows, parts = threads(), numbers = spans.count * 10 * lanes;
  std::vector<double> sums(parts * numbers, 0.0);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    std::vector<std::array<V, 10>> own(spans.count);
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      std::fill(own.begin(), own.end(), std::array<V, 10>{});
      for (int64_t r = block * kRows; r < std::min((block + 1) * kRows, rows); ++r) {
        const T *from_x = x + r * spans.channels, *from_grad = grad + r * spans.channels;
        T* to = dx + r * spans.channels;
        if (far(from_x, spans.channels)) {
          each(spans, [&](int64_t c, int64_t span, int64_t lane, const std::array<double, 10>& k) {
            std::array<double, 10> sum = {};
            to[c] = static_cast<T>(slopes<AbsOfSum>(static_cast<double>(from_x[c]), static_cast<double>(from_grad[c]), k, sum));
            for (int i = 0; i < 10; ++i) sums[part * numbers + (span * 10 + i) * lanes + lane] += sum[i];
          });
          continue;
        }
        for (int64_t span = 0; span < spans.count; ++span) {
          const std::array<V, 10> k = spans.coefficients[span];
          std::array<V, 10> sum = own[span];
          const int64_t end = std::min((span + 1) * spans.length, spans.channels);
          vectors<T>(span * spans.length, end, [&](int64_t c, auto n) {
            const V found = slopes<AbsOfSum>(read<V>(from_x + c, n), read<V>(from_grad + c, n), k, sum);
            std::memcpy(to + c, &found, n * sizeof(T));
          });
          own[span] = sum;
        }
      }
      const T* from = reinterpret_cast<const T*>(own.data());
      for (int64_t i = 0; i < numbers; ++i) sums[part * numbers + i] += from[i];
    }
  }
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t span = 0; span < spans.count; ++span)
      for (int i = 0; i < 10; ++i)
        for (int64_t lane = 0; lane < lanes; ++lane)  // lanes past the last channel hold 0
          total[spans.group(span, lane) * 10 + i] += sums[part * numbers + (span * 10 + i) * lanes + lane];
}

void check(const Tensor& x, const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (rows, channels)");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "x must be float32 or float64");
  TORCH_CHECK_VALUE(a.dim() == 2 && a.size(1) == 6 && b.dim() == 2 && b.size(1) == 4 && a.is_contiguous() && b.is_contiguous() &&
                        a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type(),
                    "a and b must be contiguous (groups, 6) and (groups, 4) in the dtype of x");
  const int64_t groups = std::max(a.size(0), b.size(0));
  TORCH_CHECK_VALUE(std::min(a.size(0), b.size(0)) > 0 && (a.size(0) == groups || a.size(0) == 1) &&
                        (b.size(0) == groups || b.size(0) == 1) && x.size(1) % groups == 0,
                    "a and b must have as many rows as there are groups, or one, and groups must divide the channels");
}

template <class F>
void dispatch(const Tensor& x, bool abs_of_sum, F&& f) {
  if (x.scalar_type() == at::kFloat)
    abs_of_sum ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
  else
    abs_of_sum ? f(double{}, std::true_type{}) : f(double{}, std::false_type{});
}

Tensor rational(const Tensor& x, const Tensor& a, const Tensor& b, bool abs_of_sum) {
  check(x, a, b);
  Tensor y = at::empty_like(x);
  dispatch(x, abs_of_sum, [&](auto number, auto form) {
    using T = decltype(number);
    forward(x.data_ptr<T>(), Spans<T, decltype(form)::value>(x, a, b), y.data_ptr<T>(), x.size(0));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> rational_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                                                     bool abs_of_sum) {
  check(x, a, b);
  TORCH_CHECK_VALUE(grad.is_contiguous() && grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
                    "grad must be like x");
  Tensor dx = at::empty_like(x), da = at::zeros_like(a), db = at::zeros_like(b);
  dispatch(x, abs_of_sum, [&](auto number, auto form) {
    using T = decltype(number);
    const Spans<T, decltype(form)::value> spans(x, a, b);
    std::vector<double> total(spans.groups * 10, 0.0);
    backward(grad.data_ptr<T>(), x.data_ptr<T>(), spans, dx.data_ptr<T>(), total, x.size(0));
    for (int64_t g = spans.groups - 1; g > 0; --g)  // a row that all groups share gets the gradients of all
      for (int i = 0; i < 10; ++i)
        if ((i < 6 ? a : b).size(0) == 1) total[i] += total[g * 10 + i];
    for (int64_t g = 0; g < a.size(0); ++g)
      for (int i = 0; i < 6; ++i) da.data_ptr<T>()[g * 6 + i] = static_cast<T>(total[g * 10 + i]);
    for (int64_t g = 0; g < b.size(0); ++g)
      for (int i = 0; i < 4; ++i) {
        const T weight = b.data_ptr<T>()[g * 4 + i], sign = abs_of_sum ? T(1) : T(weight > 0) - T(weight < 0);
        db.data_ptr<T>()[g * 4 + i] = static_cast<T>(total[g * 10 + 6 + i]) * sign;
      }
  });
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(assay, m) {
  m.def("rational(Tensor x, Tensor a, Tensor b, bool abs_of_sum) -> Tensor");
  m.def("rational_backward(Tensor grad, Tensor x, Tensor a, Tensor b, bool abs_of_sum) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(assay, CPU, m) {
  m.impl("rational", rational);
  m.impl("rational_backward", rational_backward);
}
