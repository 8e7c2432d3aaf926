// The projection of a step of Adam onto the simplex, for rows of float or double. From x and the moments m and v, with
//
//   d = sqrt(v) + eps, none less than its share of the row's largest,   u = 1 / d,   z = x - step_size m u,
//
// it is y = max(0, z - lambda u) as in csrc/math/projection.h. Newton's method starts from the support that x has: that
// has a lambda no larger than the wanted one, and mostly is the support of y already. metric_lanes.h takes rows that
// share vectors, metric_rows.h longer ones as they lie in memory, metric_columns.h rows as the columns of a tile. A
// row's result is the same whatever lies beside it. Here is what they have in common.
#pragma once

#include "../../math/adam.h"
#include "projection_steps.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// lambda on its way up, of rows in the lanes of a vector.
template <typename T>
struct MetricClimb {
  using V = Vector<T>;
  using Mask = decltype(V{} == V{});
  static constexpr int most_readings = 32;

  V lambda, rest = {};      // what leaves a row total is their sum
  V slope;                  // sum of u over the support at the last reading, or at the start
  Mask going = V{} == V{};  // rows that are not there yet
  Mask off = V{} != V{};    // rows that do not get there: no numbers, or ones that want more digits of lambda

  CO_HD MetricClimb() {}
  // From sums of z and u over a support.
  CO_HD MetricClimb(V sum_z, V sum_u, T total) : lambda((sum_z - total) * reciprocal(sum_u)), slope(sum_u) {}

  // After a reading at lambda, which found so much more than total, and so much u, in its support.
  CO_HD void step(V excess, V inside, T total) {
    const V rise = excess * reciprocal(inside);
    const auto unsettled =
        going & (inside != slope) & (size_of(excess) > 8 * std::numeric_limits<T>::epsilon() * total);
    rest = going ? rise : rest;
    off = going ? ~near(excess, total) : off;
    lambda = unsettled ? lambda + rise : lambda;
    slope = inside;
    going = unsettled;
  }
  // All that is left to do after a first reading; read(lambda, going, excess, inside) is another one.
  template <typename Read>
  CO_HD void go_on(V excess, V inside, T total, const Read& read) {
    for (int readings = 1;; ++readings) {
      step(excess, inside, total);
      if (readings == most_readings || !any(going)) break;
      read(lambda, going, excess, inside);
    }
    off |= going;
  }
  // Whether that was the last reading for all rows; sets no more than `rest`.
  CO_HD bool ends(V excess, V inside, T total) {
    rest = excess * reciprocal(inside);
    return !any(~((inside == slope) & near(excess, total)));
  }

  // A step by `rest` alone: the last one where it leaves the support as it is, which may be another one than at the
  // start. Returns the rows where one number is not digits enough for it.
  CO_HD Mask try_last(V excess, V inside, T total) {
    rest = excess * reciprocal(inside);
    return ~(size_of(excess) <= total * T(1 / 64.));
  }

 private:
  CO_HD static V size_of(V v) { return v < V{} ? -v : v; }
  // Whether one number is digits enough for `rest`.
  CO_HD static Mask near(V excess, T total) { return size_of(excess) <= total * T(1e-3); }
};

// Where Adam goes on a simplex, number by number.
template <typename T>
struct MetricTarget {
  using V = Vector<T>;
  Adam<T> adam;

  explicit MetricTarget(const Adam<T>& of) : adam(of.with_metric(root_factor<T>)) {}
  CO_HD V metric(V v) const { return adam_metric_of(adam, scaled_root(v)); }
  CO_HD V target(V x, V m, V u) const { return adam_target(adam, x, m * u); }
};

template <typename V>
CO_HD V add_where(decltype(V{} == V{}) mask, V sum, V term) {
  return mask ? sum + term : sum;
}

// Two vectors to one: what lies `distance` lanes apart combined, of a in lanes without that bit, of b in those with it.
// One of the two shuffles is a blend, for which a processor has more units than for the other.
template <int distance, typename V, typename Combine, int... lane>
CO_HD V halved(V a, V b, Combine combine, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return combine(chosen<distance>(a, b, std::integer_sequence<int, lane...>()),
                 __builtin_shufflevector(a, b, ((lane & distance ? lane + lanes : lane) ^ distance)...));
}

// As many vectors to one as are combined in a lane, neighbours, in the order of within(): vector i of them in the lanes
// that are i modulo count.
template <int count, int distance = 1, typename V, typename Combine>
CO_HD V across_each(const V* vectors, Combine combine) {
  if constexpr (distance == count) {
    return vectors[0];
  } else {
    V halves[count / distance / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / distance / 2; ++i)
      halves[i] = halved<distance>(vectors[2 * i], vectors[2 * i + 1], combine, lanes_of<V>());
    return across_each<count, 2 * distance>(halves, combine);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
