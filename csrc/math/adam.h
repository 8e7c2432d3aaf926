// One step of Adam on one number, without what its constraint adds: the derivative of the transform before it, the
// projection or the transform after it. With g the gradient, divided by the scale of mixed precision and negated to
// maximise, t the step and x the parameter, or raw:
//
//   g <- g + weight_decay x   or, decoupled,   x <- x (1 - lr weight_decay)
//   m <- beta1 m + (1 - beta1) g      v <- beta2 v + (1 - beta2) g^2      amsgrad: v <- max of all v so far
//   d = sqrt(v) + eps r      y = x - lr r / (1 - beta1^t) m / d      with r = sqrt(1 - beta2^t)
//
// This is d as others have it, times r, which takes a multiplication from each element. A projection in the metric d is
// the same in any multiple of it.
#pragma once

#include "numeric.h"

namespace constrained_ops {

// The hyperparameters of a parameter group, as a user gives them.
struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize, amsgrad;
};

// The same as the formulas want them, for one parameter in one step.
template <typename T>
struct Adam {
  T grad_factor;  // of the gradient as it comes
  T weight_decay, decay;
  T beta1_rest, beta2, beta2_rest;  // 1 - beta1, beta2, 1 - beta2
  T step_size, eps;                 // lr r / (1 - beta1^t), eps r

  // `step` counts this one in: 1 in the first.
  CO_HD static Adam at(const AdamOptions& o, double step, double grad_scale = 1) {
    const double shrink = o.decoupled ? 1 - o.lr * o.weight_decay : 1;
    const double root = std::sqrt(1 - std::pow(o.beta2, step));
    return {T((o.maximize ? -1 : 1) / grad_scale),
            T(o.decoupled ? 0 : o.weight_decay),
            T(shrink),
            T(1 - o.beta1),
            T(o.beta2),
            T(1 - o.beta2),
            T(o.lr * root / (1 - std::pow(o.beta1, step))),
            T(o.eps * root)};
  }

  // What comes before Adam: to a gradient, as it comes and with that of L2 regularisation, and to the number itself.
  template <typename V>
  CO_HD V scaled(V grad) const {
    return grad * grad_factor;
  }
  template <typename V>
  CO_HD V regularised(V g, V x) const {
    return g + (weight_decay == T(0) ? V{} : weight_decay * x);  // x may be infinite
  }
  template <typename V>
  CO_HD V decayed(V x) const {
    return x * decay;
  }

  template <typename U>
  CO_HD Adam<U> as() const {
    return {U(grad_factor), U(weight_decay), U(decay), U(beta1_rest), U(beta2), U(beta2_rest), U(step_size), U(eps)};
  }

  // The same step with a metric that is `factor` times as large.
  Adam with_metric(T factor) const {
    Adam adam = *this;
    adam.eps *= factor;
    adam.step_size *= factor;
    return adam;
  }
};

// The same for a step that takes gradients as they come and decays nothing, as most do: an operation less for each.
template <typename T>
struct PlainAdam : Adam<T> {
  CO_HD static bool suits(const Adam<T>& adam) {
    return adam.grad_factor == T(1) && adam.weight_decay == T(0) && adam.decay == T(1);
  }
  template <typename V>
  CO_HD V scaled(V grad) const {
    return grad;
  }
  template <typename V>
  CO_HD V regularised(V g, V) const {
    return g;
  }
  template <typename V>
  CO_HD V decayed(V x) const {
    return x;
  }
};

template <typename T>
struct Moments {
  T m, v, largest_v;  // largest_v: with amsgrad
};

// Moments after a gradient g at x; g after its transform's derivative. Returns that v of which the metric is made. Here
// and below V is T, or a vector of it, and A is Adam<T> or PlainAdam<T>.
template <bool amsgrad, typename A, typename V>
CO_HD V adam_moments(const A& adam, V g, V x, Moments<V>& moments) {
  g = adam.regularised(g, x);
  moments.m += adam.beta1_rest * (g - moments.m);
  moments.v = adam.beta2 * moments.v + adam.beta2_rest * g * g;
  if constexpr (amsgrad) moments.largest_v = larger_or_nan(moments.largest_v, moments.v);
  return amsgrad ? moments.largest_v : moments.v;
}

// The metric d, from the square root of v.
template <typename A, typename V>
CO_HD V adam_metric_of(const A& adam, V root) {
  return root + adam.eps;
}

// Moments as above; returns the metric d.
template <bool amsgrad, typename A, typename T>
CO_HD T adam_metric(const A& adam, T g, T x, Moments<T>& moments) {
  return adam_metric_of(adam, std::sqrt(adam_moments<amsgrad>(adam, g, x, moments)));
}

// Where Adam goes from x in `direction` m / d, before a projection.
template <typename A, typename V>
CO_HD V adam_target(const A& adam, V x, V direction) {
  return adam.decayed(x) - adam.step_size * direction;
}

// On a simplex no d is less than this share of its row's largest: a coordinate that has never seen a gradient would
// otherwise absorb whatever the rest of its row gains or loses.
template <typename T>
inline constexpr T adam_floor = T(1e-3);

}  // namespace constrained_ops
