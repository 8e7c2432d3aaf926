// x -> the simplex {y >= 0, sum y = total}, nearest in the metric of weights d > 0 (1 without): with u = 1 / d
//
//   y_i = max(0, x_i - lambda u_i),  where lambda is the root of  sum_i max(0, x_i - lambda u_i) - total.
//
// That function is convex and falls, so Newton's method climbs to the root from any lambda below it, and stops once the
// support S = {i: x_i > lambda u_i} stays. On S: grad_x_i = g_i - m with m = sum_S g_i u_i / sum_S u_i, and
// grad_weight_i = lambda u_i^2 grad_x_i.
//
// lambda is a sum, anchor + high + low. z_i = x_i - anchor u_i is rounded once and taken as given from there on; the
// distance that is left has two numbers' digits, so that a million small y add up to total, and numbers far larger than
// total lose no more than z does.
//
// T is a number, or a vector of numbers whose type is S. Products are subtracted with one rounding where the compiler
// may contract, as it may in all builds for real.
#pragma once

#include "numeric.h"

namespace constrained_ops {

// Turns a weight into u, and x into NaN where there is no such weight. Returns x's lower bound of lambda: the lambda
// that would leave x nothing but total. Without a weight, x itself.
template <bool weighted, typename T, typename S>
CO_HD T projection_bound(T& x, T& weight, S total) {
  if constexpr (weighted) {
    const T d = weight, no_number = T{} + std::numeric_limits<S>::quiet_NaN();
    weight = S(1) / d;
    x = (weight > S(0)) & (weight < std::numeric_limits<S>::infinity()) ? x : no_number;
    return (x - total) * d;
  } else {
    return x;
  }
}

// lambda of four numbers alone, the largest of which is 0: a lower bound, to rounding, of that of a row they are from.
template <typename T, typename S>
CO_HD T projection_of_four(const T (&z)[4], S total) {
  const auto larger = [](T p, T q) { return q > p ? q : p; };
  const auto smaller = [](T p, T q) { return q > p ? p : q; };
  const T winners[] = {larger(z[0], z[1]), larger(z[2], z[3])}, losers[] = {smaller(z[0], z[1]), smaller(z[2], z[3])};
  const T loser = smaller(winners[0], winners[1]), winner = larger(losers[0], losers[1]);
  const T second = larger(loser, winner), third = smaller(loser, winner), fourth = smaller(losers[0], losers[1]);
  const T of_two = (second - total) * S(1 / 2.0), of_three = (second + third - total) * S(1 / 3.0),
          of_four = (second + third + fourth - total) * S(1 / 4.0);
  return larger(larger(T{} - total, of_two), larger(of_three, of_four));
}

// lambda of some numbers alone, from the sum of x over them less total and that of u: a lower bound, whichever they
// are, which stays behind by more than the rounding of such a sum.
template <typename T, typename S>
CO_HD T projection_of_support(T excess, T sum_u, S total) {
  return (excess - 4 * std::numeric_limits<S>::epsilon() * total) / sum_u;
}

// a + b rounded, and in `rest` what rounding took from it (Knuth).
template <typename T>
CO_HD T two_sum(T a, T b, T& rest) {
  const T sum = a + b, of_b = sum - a;
  rest = (a - (sum - of_b)) + (b - of_b);
  return sum;
}

// Residual times slope falls to a quarter or less with each reading: more than any row of numbers can take.
inline constexpr int most_readings = 100;

// lambda on its way up.
template <typename T>
struct Ascent {
  T anchor, high, low;
  T slope;  // sum_S u at the last reading
  T left;   // readings; 0 when done

  // From the largest bound of the row, downwards by more than rounding could have lifted it. An infinite one, as a row
  // with +inf or of nothing but -inf has, makes NaN of the row.
  template <bool weighted, typename S>
  CO_HD static Ascent from(T bound, S total) {
    constexpr S eps = std::numeric_limits<S>::epsilon();
    const T no_number = T{} + std::numeric_limits<S>::quiet_NaN();
    const T below = weighted ? bound - 4 * eps * (bound < S(0) ? -bound : bound) : bound;
    return {bound - bound == S(0) ? below : no_number, weighted ? T{} : T{} - total, T{},
            T{} + std::numeric_limits<S>::infinity(), T{} + S(most_readings)};
  }

  // What a reading found on S: the sum of z - lambda u, and that of u.
  template <typename S>
  CO_HD void step(T sum, T sum_u, S total) {
    step_by(sum - total, sum_u, total);
  }

  // The same from the sum less total. Short of the last step, a step stays behind by more than the rounding of the sum,
  // lest it should overshoot and leave the support empty.
  template <typename S>
  CO_HD void step_by(T excess, T sum_u, S total) {
    constexpr S eps = std::numeric_limits<S>::epsilon();
    const T no_number = T{} + std::numeric_limits<S>::quiet_NaN();
    const T sum = excess + total;
    const auto unsettled = (excess > 8 * eps * total) & ((sum_u < slope) | (sum > 2 * total)) & (left > S(1));
    const T rise = (unsettled ? excess - 4 * eps * sum : excess) / sum_u;
    const T more = low + (sum_u > S(0) ? rise : no_number);
    T rest;
    const T raised = two_sum(high, more, rest);
    const auto going = left > S(0);
    high = going ? raised : high;
    low = going ? rest : low;
    slope = going ? sum_u : slope;
    left = going & unsettled ? left - S(1) : T{};
  }
};

template <bool weighted, typename T>
CO_HD T projection_anchored(T x, T u, T anchor) {
  return weighted ? x - anchor * u : x - anchor;
}

// z - lambda u: positive on S, where it is y.
template <bool weighted, typename T>
CO_HD T projection_rest(T z, T u, T high, T low) {
  return weighted ? (z - high * u) - low * u : (z - high) - low;
}

template <typename T>
CO_HD T projection_value(T rest) {
  return T{} > rest ? T{} : rest;
}

// Whether a result counts as of the support: a NaN does, so that a row of it stays NaN.
template <typename T>
CO_HD auto projection_supports(T y) {
  return y != T{};
}

// The gradient to x on S, and from it that to the weight.
template <typename T>
CO_HD T projection_grad_x(T g, T mean) {
  return g - mean;
}
template <typename T>
CO_HD T projection_grad_weight(T grad_x, T u, T multiplier) {
  return multiplier * u * u * grad_x;
}

}  // namespace constrained_ops
