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
#pragma once

#include "numeric.h"

namespace constrained_ops {

// a - b c, rounded once where the hardware can.
template <typename T>
CO_HD T minus_product(T a, T b, T c) {
#if CO_HAS_FMA
  return fused_multiply_add(-b, c, a);
#else
  return a - b * c;
#endif
}

// The larger of two, NaN if either is.
template <typename T>
CO_HD T larger_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

// Turns a weight into u, and x into NaN where there is no such weight. Returns x's lower bound of lambda: the lambda
// that would leave x nothing but total. Without a weight, x itself.
template <bool weighted, typename T>
CO_HD T projection_bound(T& x, T& weight, T total) {
  if constexpr (weighted) {
    const T d = weight;
    weight = T(1) / d;
    const bool possible = weight > T(0) && weight < std::numeric_limits<T>::infinity();
    x = possible ? x : std::numeric_limits<T>::quiet_NaN();
    return (x - total) * d;
  } else {
    return x;
  }
}

// lambda on its way up.
template <typename T>
struct Ascent {
  T anchor, high, low;
  T slope;  // sum_S u at the last reading
  T left;   // readings; 0 when done

  // From the largest bound of the row, downwards by more than rounding could have lifted it. An infinite one, as a row
  // with +inf or of nothing but -inf has, makes NaN of the row.
  template <bool weighted>
  CO_HD static Ascent from(T bound, T total) {
    constexpr T eps = std::numeric_limits<T>::epsilon();
    const T below = weighted ? bound - 4 * eps * magnitude_of(bound) : bound;
    // Residual times slope falls to a quarter or less with each step: 100 are more than any row of numbers can take.
    return {is_finite(bound) ? below : std::numeric_limits<T>::quiet_NaN(), weighted ? T(0) : -total, T(0),
            std::numeric_limits<T>::infinity(), T(100)};
  }

  // What a reading found on S: the sum of z - lambda u, and that of u. Short of the last step, a step stays behind
  // by more than the rounding of the sum, lest it should overshoot and leave the support empty.
  CO_HD void step(T sum, T sum_u, T total) {
    constexpr T eps = std::numeric_limits<T>::epsilon();
    const T excess = sum - total;
    const bool settled = !(excess > 8 * eps * total) || (sum_u >= slope && sum <= 2 * total) || left == T(1);
    const T rise = (settled ? excess : excess - 4 * eps * sum) / sum_u;
    const T more = low + (sum_u > T(0) ? rise : std::numeric_limits<T>::quiet_NaN());
    // high + more, and what rounding takes from it (Knuth).
    const T raised = high + more, added = raised - high;
    const T rest = (high - (raised - added)) + (more - added);
    const bool going = left > T(0);
    high = going ? raised : high;
    low = going ? rest : low;
    slope = going ? sum_u : slope;
    left = going && !settled ? left - T(1) : T(0);
  }
};

template <bool weighted, typename T>
CO_HD T projection_anchored(T x, T u, T anchor) {
  return weighted ? minus_product(x, anchor, u) : x - anchor;
}

// z - lambda u: positive on S, where it is y.
template <bool weighted, typename T>
CO_HD T projection_rest(T z, T u, T high, T low) {
  return weighted ? minus_product(minus_product(z, high, u), low, u) : (z - high) - low;
}

template <typename T>
CO_HD T projection_value(T rest) {
  return rest <= T(0) ? T(0) : rest;
}

// Whether a result counts as of the support: a NaN does, so that a row of it stays NaN.
template <typename T>
CO_HD bool projection_supports(T y) {
  return y != T(0);
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
