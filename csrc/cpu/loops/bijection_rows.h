// The bijections onto the simplex (math/bijection.h) on rows of float or double: `lanes` rows side by side, element k
// of row l at k * lanes + l, or with lanes = 1 a row by itself. What needs no neighbour is done for many numbers at
// once; in between, sums go along the row in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../math/bijection.h"
#include "simplex_rows.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Operands and results of the compute type; names as in BijectionCall.
template <typename T>
struct BijectionRows {
  const T *raw, *along, *g, *h;  // null: zeros
  T *x, *log_det, *grad_raw;     // null: not wanted
};

constexpr int bijection_scratch = 5;  // tiles of T, as large as that of x

// f(step, element) in any order.
template <int64_t lanes, typename F>
CO_HD void for_each(int64_t steps, const F& f) {
  if constexpr (lanes == 1) {
#pragma GCC ivdep
    for (int64_t k = 0; k < steps; ++k) f(k, k);
  } else {
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC ivdep
      for (int64_t l = 0; l < lanes; ++l) f(k, k * lanes + l);
    }
  }
}

// The sum of f(step, element) for each lane.
template <int64_t lanes, typename T, typename F>
CO_HD void sum_up(int64_t steps, double (&totals)[lanes], const F& f) {
  std::fill_n(totals, lanes, 0.0);
  if constexpr (lanes == 1) {
    add_up<T>(steps, totals, [&](int64_t i, T* values) CO_INLINE { values[0] = f(i, i); });
  } else {
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC ivdep
      for (int64_t l = 0; l < lanes; ++l) totals[l] += f(k, k * lanes + l);
    }
  }
}

#define CO_EACH_LANE_OF(lanes) _Pragma("GCC ivdep") for (int64_t l = 0; l < lanes; ++l)

template <int64_t lanes, typename T>
class Ilr {
 public:
  // `table`: memory for two numbers per element.
  Ilr(int64_t size, T smallest, T* table) : size_(size), smallest_(smallest), scale_(table) {
    for (int64_t n = 1; n < size; ++n) table[n] = ilr_scale(T(n));
  }

  void forward(const BijectionRows<T>& at, T* scratch) const {
    double total[lanes], sum[lanes];
    T largest[lanes];
    T* z = scratch;
    logits(at.raw, z, total);
    find_largest(z, largest);
    weigh(z, largest, sum);
    const T smallest = smallest_;
    T inverse[lanes];
    CO_EACH_LANE_OF(lanes) inverse[l] = T(1 / sum[l]);
    for_each<lanes>(size_, [=, x = at.x](int64_t, int64_t i)
                               CO_INLINE { x[i] = kept_positive(z[i] * inverse[i % lanes], smallest); });
    if (at.log_det)
      for (int64_t l = 0; l < lanes; ++l)
        at.log_det[l] = T(0.5 * std::log(double(size_)) - size_ * (total[l] + largest[l] + std::log(sum[l])));
  }

  void backward(const BijectionRows<T>& at, T* scratch) const {
    T *x = scratch, peak_g[lanes] = {};
    double total[lanes], mean_g[lanes] = {};
    logits(at.raw, x, total);
    softmax(x, at.g, peak_g, nullptr, nullptr);
    if (at.g) mean(x, at.g, peak_g, mean_g);
    add_log_det(at.h, mean_g);
    to_raw(at.grad_raw, [=, g = at.g, &peak_g, &mean_g](int64_t i, int64_t l)
                            CO_INLINE { return x[i] * T((g ? g[i] - peak_g[l] : T(0)) - mean_g[l]); });
  }

  void double_backward(const BijectionRows<T>& at, T* scratch) const {
    T *x = scratch, *b = scratch + size_ * lanes, *c = b + size_ * lanes;
    T peak_g[lanes] = {}, peak_b[lanes];
    double total[lanes], total_along[lanes], mean_g[lanes] = {}, mean_b[lanes], mean_c[lanes];
    logits(at.raw, x, total);
    logits(at.along, b, total_along);
    softmax(x, at.g, peak_g, b, peak_b);
    if (at.g) mean(x, at.g, peak_g, mean_g);
    mean(x, b, peak_b, mean_b);
    if (at.log_det)
      for (int64_t l = 0; l < lanes; ++l) at.log_det[l] = T(-size_ * (total_along[l] + peak_b[l] + mean_b[l]));
    add_log_det(at.h, mean_g);
    for_each<lanes>(size_, [=, g = at.g, to = at.x, &peak_g, &peak_b, &mean_g, &mean_b](int64_t, int64_t i) CO_INLINE {
      const int64_t l = i % lanes;
      const T along = T(b[i] - peak_b[l] - mean_b[l]);
      if (to) to[i] = x[i] * along;
      c[i] = along * T((g ? g[i] - peak_g[l] : T(0)) - mean_g[l]);
    });
    if (!at.grad_raw) return;
    sum_up<lanes, T>(size_, mean_c, [=](int64_t, int64_t i) CO_INLINE { return x[i] * c[i]; });
    to_raw(at.grad_raw, [=, &mean_c](int64_t i, int64_t l) CO_INLINE { return x[i] * T(c[i] - mean_c[l]); });
  }

 private:
  void logits(const T* raw, T* z, double (&total)[lanes]) const {
    std::fill_n(total, lanes, 0.0);
    std::fill_n(z, lanes, T(0));
    for (int64_t n = 1; n < size_; ++n) {
      const T scale = scale_[n], *from = raw + (n - 1) * lanes;
      T* to = z + n * lanes;
      CO_EACH_LANE_OF(lanes) {
        const T w = from[l] * scale;
        to[l] = ilr_logit(T(total[l]), T(n), w);
        total[l] += w;
      }
    }
  }

  // Also what v, unless null, is at the largest z.
  void find_largest(const T* z, T (&largest)[lanes], const T* v = nullptr, T* v_there = nullptr, const T* w = nullptr,
                    T* w_there = nullptr) const {
    std::fill_n(largest, lanes, -std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < size_; ++k) {
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t i = k * lanes + l;
        const bool larger = z[i] > largest[l];
        largest[l] = larger ? z[i] : largest[l];
        if (v) v_there[l] = larger ? v[i] : v_there[l];
        if (w) w_there[l] = larger ? w[i] : w_there[l];
      }
    }
  }

  // z becomes exp(z - largest).
  void weigh(T* z, const T (&largest)[lanes], double (&sum)[lanes]) const {
    for_each<lanes>(size_,
                    [=, &largest](int64_t, int64_t i) CO_INLINE { z[i] = softmax_weight(z[i], largest[i % lanes]); });
    sum_up<lanes, T>(size_, sum, [=](int64_t, int64_t i) CO_INLINE { return z[i]; });
  }

  // z becomes x.
  void softmax(T* z, const T* v, T* v_there, const T* w, T* w_there) const {
    T largest[lanes], inverse[lanes];
    double sum[lanes];
    find_largest(z, largest, v, v_there, w, w_there);
    weigh(z, largest, sum);
    CO_EACH_LANE_OF(lanes) inverse[l] = T(1 / sum[l]);
    for_each<lanes>(size_, [=](int64_t, int64_t i) CO_INLINE { z[i] *= inverse[i % lanes]; });
  }

  void mean(const T* x, const T* v, const T (&there)[lanes], double (&of)[lanes]) const {
    sum_up<lanes, T>(size_, of, [=](int64_t, int64_t i) CO_INLINE { return x[i] * (v[i] - there[i % lanes]); });
  }

  void add_log_det(const T* h, double (&mean_g)[lanes]) const {
    if (h) CO_EACH_LANE_OF(lanes) mean_g[l] += double(h[l]) * size_;
  }

  // The transpose of logits(), of u(element, lane).
  template <typename U>
  CO_HD void to_raw(T* grad_raw, const U& u) const {
    double before[lanes];
    for (int64_t l = 0; l < lanes; ++l) before[l] = u(l, l);
    for (int64_t n = 1; n < size_; ++n) {
      const double scale = scale_[n];
      T* to = grad_raw + (n - 1) * lanes;
      CO_EACH_LANE_OF(lanes) {
        const double u_next = u(n * lanes + l, l);
        to[l] = T(ilr_to_w(before[l], double(n), u_next) * scale);
        before[l] += u_next;
      }
    }
  }

  const int64_t size_;
  const T smallest_, *scale_;
};

template <int64_t lanes, typename T>
class StickBreaking {
 public:
  StickBreaking(int64_t size, T smallest, T* table)
      : breaks_(size - 1), smallest_(smallest), rest_(table), log_rest_(table + size) {
    for (int64_t n = 0; n < breaks_; ++n) {
      table[n] = T(breaks_ - n);
      table[size + n] = T(std::log(double(breaks_ - n)));
    }
  }

  void forward(const BijectionRows<T>& at, T* scratch) const {
    T *taken = scratch, *log_left = taken + tile(), *log_det = log_left + tile();
    for_each<lanes>(breaks_, [=, this, raw = at.raw](int64_t n, int64_t i) CO_INLINE {
      const Break<T> broken(raw[i], rest_[n], log_rest_[n]);
      taken[i] = broken.taken;
      log_left[i] = broken.log_left();
      log_det[i] = stick_log_det(broken, rest_[n]);
    });
    sum_before(log_left);
    std::fill_n(taken + breaks_ * lanes, lanes, T(1));
    const T smallest = smallest_;
    for_each<lanes>(breaks_ + 1, [=, x = at.x](int64_t, int64_t i)
                                     CO_INLINE { x[i] = kept_positive(stick_value(taken[i], log_left[i]), smallest); });
    if (at.log_det) {
      double sum[lanes];
      add_lanes(sum, [=](int64_t, int64_t i) CO_INLINE { return log_det[i]; });
      for (int64_t l = 0; l < lanes; ++l) at.log_det[l] = T(sum[l]);
    }
  }

  void backward(const BijectionRows<T>& at, T* scratch) const {
    T *taken = scratch, *left = taken + tile(), *remaining = left + tile();
    break_up(at.raw, taken, left, remaining);
    double mean[lanes] = {};
    if (at.g)
      for (int64_t l = 0; l < lanes; ++l) mean[l] = at.g[breaks_ * lanes + l];
    for (int64_t n = breaks_; n-- > 0;) {
      const T rest = rest_[n];
      CO_EACH_LANE_OF(lanes) {
        const int64_t i = n * lanes + l;
        const double deviation = (at.g ? at.g[i] : T(0)) - mean[l];
        const T of_log_det = at.h ? at.h[l] * stick_log_det_raw(taken[i], left[i], rest) : T(0);
        at.grad_raw[i] = T(deviation) * stick_slope(taken[i], left[i], remaining[i]) + of_log_det;
        mean[l] += taken[i] * deviation;
      }
    }
  }

  void double_backward(const BijectionRows<T>& at, T* scratch) const {
    T *taken = scratch, *left = taken + tile(), *remaining = left + tile(), *before = remaining + tile();
    const T* a = at.along;
    break_up(at.raw, taken, left, remaining);
    for_each<lanes>(breaks_, [=](int64_t, int64_t i) CO_INLINE { before[i] = taken[i] * a[i]; });
    sum_before(before);
    if (T* for_g = at.x) {
      for_each<lanes>(breaks_, [=](int64_t, int64_t i) CO_INLINE {
        for_g[i] = remaining[i] * taken[i] * stick_along(left[i], a[i], before[i]);
      });
      for (int64_t i = breaks_ * lanes; i < (breaks_ + 1) * lanes; ++i)
        for_g[i] = remaining[i] * stick_along(T(0), T(0), before[i]);
    }
    if (at.log_det) {
      double sum[lanes];
      add_lanes(sum, [=, this](int64_t n, int64_t i)
                         CO_INLINE { return a[i] * stick_log_det_raw(taken[i], left[i], rest_[n]); });
      for (int64_t l = 0; l < lanes; ++l) at.log_det[l] = T(sum[l]);
    }
    if (!at.grad_raw) return;
    double mean[lanes] = {}, after[lanes] = {};
    if (at.g)
      for (int64_t l = 0; l < lanes; ++l) mean[l] = at.g[breaks_ * lanes + l];
    for (int64_t n = breaks_; n-- > 0;) {
      const T rest = rest_[n];
      CO_EACH_LANE_OF(lanes) {
        const int64_t i = n * lanes + l;
        const double s = taken[i], deviation = (at.g ? at.g[i] : T(0)) - mean[l];
        const double second = stick_second<double>(deviation, a[i], s, left[i], before[i], after[l]);
        const T of_log_det = at.h ? at.h[l] * a[i] * stick_log_det_raw_raw(taken[i], left[i], rest) : T(0);
        at.grad_raw[i] = T(second) * stick_slope(taken[i], left[i], remaining[i]) + of_log_det;
        after[l] = stick_after<double>(deviation, a[i], s, left[i], after[l]);
        mean[l] += s * deviation;
      }
    }
  }

 private:
  int64_t tile() const { return (breaks_ + 1) * lanes; }

  // Also what remains of the stick before each break, and in the end.
  void break_up(const T* raw, T* taken, T* left, T* remaining) const {
    for_each<lanes>(breaks_, [=, this](int64_t n, int64_t i) CO_INLINE {
      const Break<T> broken(raw[i], rest_[n], log_rest_[n]);
      taken[i] = broken.taken;
      left[i] = broken.left;
      remaining[i] = broken.log_left();
    });
    sum_before(remaining);
    for_each<lanes>(breaks_ + 1, [=](int64_t, int64_t i) CO_INLINE { remaining[i] = stick_value(T(1), remaining[i]); });
  }

  // Each number becomes the sum of those before it; one more than there are breaks.
  void sum_before(T* v) const {
    double before[lanes] = {};
    for (int64_t n = 0; n < breaks_; ++n) {
      CO_EACH_LANE_OF(lanes) {
        const T here = v[n * lanes + l];
        v[n * lanes + l] = T(before[l]);
        before[l] += here;
      }
    }
    CO_EACH_LANE_OF(lanes) v[breaks_ * lanes + l] = T(before[l]);
  }

  template <typename F>
  CO_HD void add_lanes(double (&sum)[lanes], const F& f) const {
    sum_up<lanes, T>(breaks_, sum, f);
  }

  const int64_t breaks_;
  const T smallest_, *rest_, *log_rest_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
