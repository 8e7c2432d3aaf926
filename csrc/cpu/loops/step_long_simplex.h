// A step of Adam along rows of a simplex that are too long for a copy of one. Every pass computes moments, metric and
// target anew from what there was before the step, and the last one writes: so 16 bits round none of what is projected.
#pragma once

#include <vector>

#include "metric_climb.h"
#include "step_long_rows.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// One row on its way: Adam, and the projection in its metric or, with u = 1, the Euclidean one. lambda climbs as it
// does in projection_steps.h, from the support that x has, which mostly is that of the result, or from the bound of the
// row.
template <typename T>
class LongProjection {
  using V = Vector<T>;
  using Mask = decltype(V{} == V{});

 public:
  LongProjection(const Adam<T>& adam, T total, bool euclidean) : of_(adam), total_(total), euclidean_(euclidean) {
    start_sums();
  }

  // First of all, in Adam's metric: the largest d.
  [[gnu::noinline]] void measure(int64_t n, const StepChunk<T>& at) {
    const MetricTarget<T> of = of_;
    V largest = largest_;
    for_each(n, at, [&](int, int64_t, int64_t, V, const Moments<V>&, V v) CO_INLINE {
      largest = larger_of(largest, of.metric(v));
    });
    largest_ = largest;
    floor_ = V{} + adam_floor<T> * largest_of(largest);
  }

  // What there is to start from.
  [[gnu::noinline]] void look(int64_t n, const StepChunk<T>& at) {
    const T total = total_;
    V bound = bound_;
    Sums<T, 2> sums = sums_;
    for_targets(n, at, [&](int i, int64_t, int64_t, V x, const Moments<V>&, V z, V u, V d) CO_INLINE {
      sums.part[0][i] = add_where(x > V{}, sums.part[0][i], z);
      sums.part[1][i] = add_where(x > V{}, sums.part[1][i], u);
      bound = larger_of(bound, projection_bound<true>(z, d, total));
    });
    sums.settle();
    sums_ = sums;
    bound_ = bound;
  }
  void start() {
    const T of_row = largest_of(bound_), of_support = projection_of_support(sum(0), sum(1), total_);
    on_support_ = of_support > of_row;
    lambda_ = Ascent<T>::template from<true>(on_support_ ? of_support : of_row, total_);
    start_sums();
  }

  bool going() const { return lambda_.left > T(0); }
  [[gnu::noinline]] void read(int64_t n, const StepChunk<T>& at) {
    const Ascent<T> lambda = lambda_;
    Sums<T, 2> sums = sums_;
    for_targets(n, at, [&](int i, int64_t, int64_t, V, const Moments<V>&, V z, V u, V) CO_INLINE {
      const V rest = rest_of(lambda, z, u);
      sums.part[0][i] += value_of_rest(rest);
      sums.part[1][i] += rest <= V{} ? V{} : u;
    });
    sums.settle();
    sums_ = sums;
  }
  void step() {
    if (on_support_ && sum(0) < T(0))  // a start that rounding took past the root
      lambda_ = Ascent<T>::template from<true>(largest_of(bound_), total_);
    else
      lambda_.step_by(sum(0), sum(1), total_);
    on_support_ = false;
    start_sums();
  }

  [[gnu::noinline]] void finish(int64_t n, const StepChunk<T>& at) {
    const Ascent<T> lambda = lambda_;
    for_targets(n, at, [&](int, int64_t k, int64_t rest, V, const Moments<V>& moments, V z, V u, V) CO_INLINE {
      store_some(at.x + k, value_of_rest(rest_of(lambda, z, u)), rest);
      store_some(at.m + k, moments.m, rest);
      store_some(at.v + k, moments.v, rest);
      if (at.largest_v) store_some(at.largest_v + k, moments.largest_v, rest);
    });
  }

 private:
  // body(0 or 1 in turns, where, how many are left from there on, x, moments, the v of which the metric is made).
  template <typename Body>
  CO_HD void for_each(int64_t n, const StepChunk<T>& at, const Body& body) const {
    const Adam<T> adam = of_.adam;
    const auto vector = [&](int i, int64_t k, int64_t rest) CO_INLINE {
      const auto read = [=](const T* from) CO_INLINE { return load_some(from + k, rest); };
      Moments<V> moments{read(at.m), read(at.v), V{}};
      if (at.largest_v) moments.largest_v = read(at.largest_v);
      const V x = read(at.x), g = adam.scaled(read(at.grad));
      const V v = at.largest_v ? adam_moments<true>(adam, g, x, moments) : adam_moments<false>(adam, g, x, moments);
      body(i, k, rest, x, moments, v);
    };
    int64_t k = 0;
    for (; k + group<T> <= n; k += group<T>) {
      // A processor foresees what is read next only within a page.
      fetch<Cache::second>(k + 2 * RowsChunk<T>::most, group<T>, at.grad, at.x, at.m, at.v);
      vector(0, k, width<T>);
      vector(1, k + width<T>, width<T>);
    }
    for (; k < n; k += width<T>) vector(0, k, n - k);
  }

  // body(0 or 1, where, how many are left, x, moments, z, u, d of the projection); no support has what is not there.
  template <typename Body>
  CO_HD void for_targets(int64_t n, const StepChunk<T>& at, const Body& body) const {
    const MetricTarget<T> of = of_;
    const V floor = floor_;
    const bool euclidean = euclidean_;
    for_each(n, at, [&](int i, int64_t k, int64_t rest, V x, const Moments<V>& moments, V v) CO_INLINE {
      V z, u = V{} + 1, d = u;
      if (euclidean) {
        z = adam_target(of.adam, x, moments.m / adam_metric_of(of.adam, scaled_root<true>(v)));
      } else {
        d = larger_of(of.metric(v), floor);
        u = reciprocal(d);
        z = of.target(x, moments.m, u);
      }
      if (rest < width<T>) z = first_lanes(rest) ? z : V{} - std::numeric_limits<T>::infinity();
      body(i, k, rest, x, moments, z, u, d);
    });
  }
  static T largest_of(V v) {
    T largest = v[0];
    for (int l = 1; l < width<T>; ++l) largest = std::max<T>(largest, v[l]);
    return largest;
  }
  static Mask first_lanes(int64_t count) {
    Mask mask;
    for (int l = 0; l < width<T>; ++l) mask[l] = l < count ? -1 : 0;
    return mask;
  }

  CO_HD static V rest_of(const Ascent<T>& lambda, V z, V u) {
    return projection_rest<true>(projection_anchored<true>(z, u, V{} + lambda.anchor), u, V{} + lambda.high,
                                 V{} + lambda.low);
  }

  // Of the first one total is taken beforehand, for near the root what is left then has most digits.
  void start_sums() {
    sums_ = {};
    sums_.high[0][0][0] = -total_;
  }
  T sum(int i) const { return sums_.template total<true>(i, 0)[0]; }

  const MetricTarget<T> of_;
  const T total_;
  const bool euclidean_;
  V largest_ = {}, floor_ = {}, bound_ = V{} - std::numeric_limits<T>::infinity();
  Sums<T, 2> sums_;
  Ascent<T> lambda_;
  bool on_support_;  // started there
};

template <typename Storage, typename State>
void step_long_simplex(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin,
                       int64_t end) {
  using T = compute_t<Storage>;
  using Row = LongProjection<T>;
  const LongRows<Storage, State> memory(slot, grads);
  const Row row_before(numbers.adam.as<T>(), T(slot.total), numbers.euclidean);
  for (int64_t index = begin; index < end; ++index) {
    std::vector<Row> rows(memory.rows(index), row_before);
    const auto pass = [&](void (Row::*body)(int64_t, const StepChunk<T>&), bool all = true, bool write = false) {
      memory.pass(index, [&](const RowsChunk<T>& chunk) {
        const T* grad = chunk.open(memory.grad, memory.copy(0));
        T *x = chunk.open(memory.param, memory.copy(1)), *m = chunk.open(memory.m, memory.copy(2)),
          *v = chunk.open(memory.v, memory.copy(3)), *largest_v = chunk.open(memory.largest_v, memory.copy(4));
        for (int64_t r = 0; r < chunk.rows; ++r) {
          const int64_t at = r * chunk.most;
          if (all || rows[r].going())
            (rows[r].*body)(chunk.n, {grad + at, x + at, nullptr, m + at, v + at, largest_v ? largest_v + at : nullptr,
                                      nullptr, nullptr});
        }
        if (!write) return;
        chunk.close(memory.param, x);
        chunk.close(memory.m, m);
        chunk.close(memory.v, v);
        chunk.close(memory.largest_v, largest_v);
      });
    };
    if (!numbers.euclidean) pass(&Row::measure);
    pass(&Row::look);
    for (Row& row : rows) row.start();
    for (bool going = true; going;) {
      pass(&Row::read, false);
      going = false;
      for (Row& row : rows) {
        if (row.going()) row.step();
        going |= row.going();
      }
    }
    pass(&Row::finish, true, true);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
