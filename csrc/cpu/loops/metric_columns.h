// A step of Adam on the simplex (metric_climb.h) for rows as the columns of a tile.
#pragma once

#include <memory>

#include "metric_climb.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Rows side by side: the lanes of a group, two vectors at each of `length` steps, in tiles.
template <typename T>
class MetricColumns {
  using V = Vector<T>;
  using Climb = MetricClimb<T>;
  static constexpr int64_t stride = RowUnits::lanes;

 public:
  // z: x, and then y. u: v.
  MetricColumns(const Adam<T>& adam, T total, int64_t length, T* z, const T* m, T* u)
      : of_(adam), total_(total), length_(length), z_(z), m_(m), u_(u) {}

  // n: the length, or 0 where that is not known before.
  template <int n>
  CO_HD void project() {
    const MetricTarget<T> of = of_;  // a local, which no store can change
    V largest[2] = {}, sum_z[2] = {}, sum_u[2] = {};
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V d = of.metric(load(u_ + at));
      store(u_ + at, d);
      largest[v] = larger_of(largest[v], d);
    });
    for (V& of_row : largest) of_row *= adam_floor<T>;
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V u = reciprocal(larger_of(load(u_ + at), largest[v])), x = load(z_ + at);
      const V z = of.target(x, load(m_ + at), u);
      store(z_ + at, z);
      store(u_ + at, u);
      sum_z[v] = add_where(x > V{}, sum_z[v], z);
      sum_u[v] = add_where(x > V{}, sum_u[v], u);
    });
    Climb climb[2];
    V excess[2], inside[2];
    for (int v = 0; v < 2; ++v) climb[v] = Climb(sum_z[v], sum_u[v], total_);
    read<n>(climb[0].lambda, climb[1].lambda, excess, inside);
    bool ends = true;
    for (int v = 0; v < 2; ++v) ends &= climb[v].ends(excess[v], inside[v], total_);
    if (!ends) {
      Climb on[2] = {climb[0], climb[1]};
      V last_excess[] = {excess[0], excess[1]}, last_inside[] = {inside[0], inside[1]};
      climb_on(on, last_excess, last_inside);
      for (int v = 0; v < 2; ++v) climb[v].lambda = on[v].lambda, climb[v].rest = on[v].rest;
    }
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V u = load(u_ + at);
      store(z_ + at, value_of_rest(projection_rest<true>(load(z_ + at), u, climb[v].lambda, climb[v].rest)));
    });
  }

 private:
  static constexpr int64_t steps_per_sum = 16;

  // body(vector, where its numbers are) for steps [begin, end), or all n.
  template <int n, typename Body>
  CO_HD void for_each(const Body& body, int64_t begin = 0, int64_t end = -1) const {
    const auto step = [&](int64_t k) CO_INLINE {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) body(v, k * stride + v * width<T>);
    };
    if constexpr (n > 0) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) step(k);
    } else {
      if (end < 0) end = length_;
      for (int64_t k = begin; k < end; ++k) step(k);
    }
  }

  template <int n>
  CO_HD void read(V lambda_0, V lambda_1, V (&excess)[2], V (&inside)[2]) const {
    const auto add = [&](V(&sum)[2], int64_t begin, int64_t end) CO_INLINE {
      for_each<n>(
          [&](int v, int64_t at) CO_INLINE {
            const V u = load(u_ + at);
            const V left = projection_anchored<true>(load(z_ + at), u, v == 0 ? lambda_0 : lambda_1);
            const auto counts = ~(left <= V{});  // a NaN, too
            sum[v] = add_where(counts, sum[v], left);
            inside[v] = add_where(counts, inside[v], u);
          },
          begin, end);
    };
    for (int v = 0; v < 2; ++v) excess[v] = V{} - total_, inside[v] = V{};
    if (n > 0) return add(excess, 0, n);
    V lost[2] = {};
    for (int64_t k = 0; k < length_; k += steps_per_sum) {
      V sum[2] = {};
      add(sum, k, std::min(k + steps_per_sum, length_));
      for (int v = 0; v < 2; ++v) {
        V rounding;
        excess[v] = two_sum(excess[v], sum[v], rounding);
        lost[v] += rounding;
      }
    }
    for (int v = 0; v < 2; ++v) excess[v] += lost[v];
  }

  [[gnu::noinline]] void climb_on(Climb (&climb)[2], V (&excess)[2], V (&inside)[2]) {
    for (int readings = 1;; ++readings) {
      for (int v = 0; v < 2; ++v) climb[v].step(excess[v], inside[v], total_);
      if (readings == Climb::most_readings || !(any(climb[0].going) || any(climb[1].going))) break;
      read<0>(climb[0].lambda, climb[1].lambda, excess, inside);
    }
    for (int v = 0; v < 2; ++v) climb[v].off |= climb[v].going;
    if (any(climb[0].off) || any(climb[1].off)) project_anew(climb);
  }

  // Rows that are off take their y from the projection of any numbers.
  [[gnu::noinline]] void project_anew(Climb (&climb)[2]) {
    const std::unique_ptr<T[]> memory(new T[2 * length_ * group<T>]);
    T *const y = memory.get(), *const d = y + length_ * group<T>;
    for_each<0>([&](int v, int64_t at) CO_INLINE {
      const int64_t to = at / stride * group<T> + v * width<T>;
      store(y + to, load(z_ + at));
      store(d + to, 1 / load(u_ + at));
    });
    ProjectionScratch scratch(length_);
    constrained_ops::CO_LEVEL::project<true, false>(length_, group<T>, y, d, y, total_, scratch.live());
    for_each<0>([&](int v, int64_t at) CO_INLINE {
      const int64_t from = at / stride * group<T> + v * width<T>;
      store(z_ + at, climb[v].off ? load(y + from) : load(z_ + at));
    });
    for (int v = 0; v < 2; ++v) {
      climb[v].lambda = climb[v].off ? V{} : climb[v].lambda;
      climb[v].rest = climb[v].off ? V{} : climb[v].rest;
    }
  }

  const MetricTarget<T> of_;
  const T total_;
  const int64_t length_;
  T* const z_;
  const T* const m_;
  T* const u_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
