// K - 1 numbers raw_n -> the simplex of K, for n from 1 and k from 1, along a row:
//
//   isometric log-ratios   x = softmax(z),  z_k = -(sum_{n < k} w_n) - (k - 1) w_{k-1},  w_n = raw_n / sqrt(n (n + 1))
//   stick-breaking         x_n = s_n prod_{j < n} (1 - s_j), x_K what is left,  s_n = sigmoid(raw_n - log(K - n))
//
// z is less by the sum of all w than the z that sums to 0, of which softmax sees nothing, and so needs sums in one
// direction only. With the gradients g to x and h to log_det (constrained_ops/bijection.py has the derivation):
//
//   isometric log-ratios   softmax's, with h K added to the mean of g, to u; then (sum_{k <= n} u_k - n u_{n+1}) of w
//   stick-breaking         x_n (1 - s_n) (g_n - m_n) + h (1 - s_n - (K - n) s_n), m_n the mean of g over x after n:
//                          m_{n-1} = m_n + s_n (g_n - m_n), which needs x no more
#pragma once

#include "numeric.h"

namespace constrained_ops {

// --- Isometric log-ratios ---

// w_n / raw_n.
template <typename T>
CO_HD T ilr_scale(T n) {
  return T(1) / std::sqrt(n * (n + T(1)));
}

// z_{n+1}, `before` = w_1 + ... + w_{n-1}.
template <typename T>
CO_HD T ilr_logit(T before, T n, T w) {
  return -(before + (n + T(1)) * w);
}

// The gradient to w_n, `before` = u_1 + ... + u_n.
template <typename T>
CO_HD T ilr_to_w(T before, T n, T u_next) {
  return before - n * u_next;
}

// --- Stick-breaking ---

// The last but `rest` breaks the stick that it finds: s and 1 - s, neither by a subtraction.
template <typename T>
struct Break {
  T taken, left;
  T odds, q;  // raw - log(rest), and exp(-|odds|)

  CO_HD Break(T raw, T rest, T log_rest) : odds(raw - log_rest) {
    const bool most = odds > T(0);
    const T e = exp(most ? -raw : raw);  // not of the odds, which are rounded where they are large
    const T ratio = most ? e * rest : e / rest;
    q = ratio > T(1) ? T(1) : ratio;
    const T larger = T(1) / (T(1) + q), smaller = q * larger;
    taken = most ? larger : smaller;
    left = most ? smaller : larger;
  }

  CO_HD T log_left() const { return -(odds > T(0) ? odds : T(0)) - log1p_unit(q); }
  CO_HD T log_taken() const { return (odds > T(0) ? T(0) : odds) - log1p_unit(q); }
};

// x_n, or with taken = 1 the last x; log_before <= 0 is the logarithm of what the others have left of the stick.
template <typename T>
CO_HD T stick_value(T taken, T log_before) {
  return taken * exp_nonpositive(log_before).exp;
}

template <typename T>
CO_HD T stick_log_det(const Break<T>& at, T rest) {
  return at.log_taken() + rest * at.log_left();
}
template <typename T>
CO_HD T stick_log_det_raw(T taken, T left, T rest) {
  return left - rest * taken;
}
// Along a; of h times the above.
template <typename T>
CO_HD T stick_log_det_raw_raw(T taken, T left, T rest) {
  return -(rest + T(1)) * taken * left;
}

// g_n - m_n times this is the gradient from x.
template <typename T>
CO_HD T stick_slope(T taken, T left, T remaining) {
  return remaining * taken * left;
}

// x_k along a, without the factor x_k; `before` = sum_{j < k} s_j a_j.
template <typename T>
CO_HD T stick_along(T left, T a, T before) {
  return left * a - before;
}

// for_raw_n without the factor stick_slope(); `after` = sum_{m > n} a_m grad_raw_m over what is left of the stick.
template <typename T>
CO_HD T stick_second(T deviation, T a, T taken, T left, T before, T after) {
  return deviation * (a * (left - taken) - before) - after;
}
// after_{n-1}, as a sum that m_n enters in the same way.
template <typename T>
CO_HD T stick_after(T deviation, T a, T taken, T left, T after) {
  return left * (after + taken * a * deviation);
}

// A result strictly above 0, NaN if it was one.
template <typename T>
CO_HD T kept_positive(T x, T smallest) {
  return x < smallest ? smallest : x;
}

}  // namespace constrained_ops
