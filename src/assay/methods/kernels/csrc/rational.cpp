// Group rational functions y = P(x) / Q(x), degrees 5 and 4, and their gradients, in one pass over memory each way.
//
// x is (rows, groups * width): the channels of a group lie together and share coefficients a (groups, 6), b (groups, 4).
// Q = 1 + sum |b_i| |x|^i, or 1 + |sum b_i x^i|. Gradients of coefficients are summed in double over the rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <class T>
inline T sign(T x) {
  return static_cast<T>(x > 0) - static_cast<T>(x < 0);
}

template <class T>
inline T numerator(const T* a, T x) {
  return a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))));
}

template <class T, bool AbsOfSum>
void forward(const T* x, const T* a, const T* b, T* y, int64_t rows, int64_t groups, int64_t width) {
#pragma omp parallel for num_threads(threads()) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const T *from = x + (r * groups + g) * width, *ag = a + g * 6, *bg = b + g * 4;
      T* to = y + (r * groups + g) * width;
      const T a0[6] = {ag[0], ag[1], ag[2], ag[3], ag[4], ag[5]};
      const T b1 = AbsOfSum ? bg[0] : std::abs(bg[0]), b2 = AbsOfSum ? bg[1] : std::abs(bg[1]);
      const T b3 = AbsOfSum ? bg[2] : std::abs(bg[2]), b4 = AbsOfSum ? bg[3] : std::abs(bg[3]);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const T v = from[c], u = AbsOfSum ? v : std::abs(v);
        const T s = u * (b1 + u * (b2 + u * (b3 + u * b4)));
        to[c] = numerator(a0, v) / (1 + (AbsOfSum ? std::abs(s) : s));
      }
    }
}

template <class T, bool AbsOfSum>
void backward(const T* grad, const T* x, const T* a, const T* b, T* dx, double* da, double* db, int64_t rows, int64_t groups,
              int64_t width) {
#pragma omp parallel num_threads(threads())
  {
    std::vector<double> own(groups * 10, 0.0);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (r * groups + g) * width;
        const T *from = x + at, *up = grad + at, *ag = a + g * 6, *bg = b + g * 4;
        T* to = dx + at;
        const T a0[6] = {ag[0], ag[1], ag[2], ag[3], ag[4], ag[5]};
        const T b1 = AbsOfSum ? bg[0] : std::abs(bg[0]), b2 = AbsOfSum ? bg[1] : std::abs(bg[1]);
        const T b3 = AbsOfSum ? bg[2] : std::abs(bg[2]), b4 = AbsOfSum ? bg[3] : std::abs(bg[3]);
        T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, t1 = 0, t2 = 0, t3 = 0, t4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, t1, t2, t3, t4)
        for (int64_t c = 0; c < width; ++c) {
          const T v = from[c], u = AbsOfSum ? v : std::abs(v);
          const T s = u * (b1 + u * (b2 + u * (b3 + u * b4)));
          const T slope = b1 + u * (2 * b2 + u * (3 * b3 + u * (4 * b4)));  // ds / du
          const T turn = AbsOfSum ? sign(s) : sign(v);
          const T one_over = 1 / (1 + (AbsOfSum ? std::abs(s) : s));
          const T y = numerator(a0, v) * one_over, rise = a0[1] + v * (2 * a0[2] + v * (3 * a0[3] + v * (4 * a0[4] + v * (5 * a0[5]))));
          to[c] = up[c] * one_over * (rise - y * turn * slope);
          T w = up[c] * one_over;
          s0 += w;
          s1 += (w *= v);
          s2 += (w *= v);
          s3 += (w *= v);
          s4 += (w *= v);
          s5 += (w *= v);
          T z = -up[c] * one_over * y * (AbsOfSum ? turn : T(1));
          t1 += (z *= u);
          t2 += (z *= u);
          t3 += (z *= u);
          t4 += (z *= u);
        }
        const T numerators[6] = {s0, s1, s2, s3, s4, s5}, denominators[4] = {t1, t2, t3, t4};
        for (int i = 0; i < 6; ++i) own[g * 10 + i] += numerators[i];
        for (int i = 0; i < 4; ++i) own[g * 10 + 6 + i] += denominators[i] * (AbsOfSum ? T(1) : sign(bg[i]));
      }
#pragma omp critical
    for (int64_t g = 0; g < groups; ++g) {
      for (int i = 0; i < 6; ++i) da[g * 6 + i] += own[g * 10 + i];
      for (int i = 0; i < 4; ++i) db[g * 4 + i] += own[g * 10 + 6 + i];
    }
  }
}

void check(const Tensor& x, const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x must be contiguous (rows, channels)");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "x must be float32 or float64");
  TORCH_CHECK_VALUE(a.dim() == 2 && a.size(1) == 6 && b.sizes() == at::IntArrayRef({a.size(0), 4}) && a.is_contiguous() &&
                        b.is_contiguous() && a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type(),
                    "a and b must be contiguous (groups, 6) and (groups, 4) in the dtype of x");
  TORCH_CHECK_VALUE(a.size(0) > 0 && x.size(1) % a.size(0) == 0, "groups must divide the channels");
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
    forward<T, decltype(form)::value>(x.data_ptr<T>(), a.data_ptr<T>(), b.data_ptr<T>(), y.data_ptr<T>(), x.size(0), a.size(0),
                                      x.size(1) / a.size(0));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> rational_backward(const Tensor& grad, const Tensor& x, const Tensor& a, const Tensor& b,
                                                     bool abs_of_sum) {
  check(x, a, b);
  TORCH_CHECK_VALUE(grad.is_contiguous() && grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(),
                    "grad must be like x");
  Tensor dx = at::empty_like(x);
  Tensor da = at::zeros_like(a, a.options().dtype(at::kDouble)), db = at::zeros_like(b, b.options().dtype(at::kDouble));
  dispatch(x, abs_of_sum, [&](auto number, auto form) {
    using T = decltype(number);
    backward<T, decltype(form)::value>(grad.data_ptr<T>(), x.data_ptr<T>(), a.data_ptr<T>(), b.data_ptr<T>(), dx.data_ptr<T>(),
                                       da.data_ptr<double>(), db.data_ptr<double>(), x.size(0), a.size(0), x.size(1) / a.size(0));
  });
  return {dx, da.to(a.scalar_type()), db.to(b.scalar_type())};
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
