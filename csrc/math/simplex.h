// raw -> the simplex by softmax along a row: x_i = exp(raw_i - max) / sum_j exp(raw_j - max).
// With <v> = sum_i x_i v_i, the derivative along g is x_i (g_i - <g>), and it is symmetric: backward and forward
// mode are one map. Means are taken of differences from the value at the row's largest x: that entry then adds
// nothing, so that <g> keeps its digits when one x is nearly 1.
#pragma once

#include "numeric.h"

namespace constrained_ops {

// x_i before the division by the row's sum.
template <typename T>
CO_HD T softmax_weight(T raw, T largest_raw) {
  return exp_nonpositive(raw - largest_raw).exp;
}

// The same times a power of two that the division takes out again. It is chosen so that a weight whose x would round to
// 0 still does, that of raw = -inf among them.
template <typename T>
CO_HD T softmax_lifted_weight(T raw, T largest_raw) {
  return lifted_exp_nonpositive(raw - largest_raw);
}

// A finite raw never gives an exact 0, so that the logarithm of the result is finite; raw = -inf does.
template <typename T>
CO_HD T softmax_value(T raw, T weight, T inverse_sum, T smallest) {
  const T x = weight * inverse_sum;
  const bool underflow = x < smallest && raw > -std::numeric_limits<T>::infinity();
  return underflow ? smallest : x;
}

// g shifted by its value at the row's largest x, and its mean <g>.
template <typename T>
CO_HD T softmax_backward(T x, T shifted_g, T mean_g) {
  return x * (shifted_g - mean_g);
}

// The derivative of sum_i along_i x_i (g_i - <g>) to raw is x_i (c_i - <c>) with this c; to g it is the map above.
template <typename T>
CO_HD T softmax_covariance(T shifted_along, T mean_along, T shifted_g, T mean_g) {
  return (shifted_along - mean_along) * (shifted_g - mean_g);
}

}  // namespace constrained_ops
