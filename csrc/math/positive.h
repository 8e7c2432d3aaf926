// raw -> (lower, infinity) by the exponential: x = lower + exp(raw), every derivative exp(raw), log-det raw.
// The softplus kind is bounded.h with the lower bound alone.
#pragma once

#include "elementwise.h"

namespace constrained_ops {

struct Exponential {
  template <typename T>
  CO_HD static Point<T> at(T raw, const Bounds<T>& b) {
    return at(raw, exponential(raw), b);
  }

  // In two halves, as OfSigmoid.
  template <typename T>
  CO_HD static T exponential(T raw) {
    return exp(raw);
  }
  template <typename T>
  CO_HD static Point<T> at(T raw, T value, const Bounds<T>& b) {
    Point<T> p{};
    p.x = clamp(b.lower + value, b.smallest, b.largest);
    p.x_raw = value;
    p.x_raw_raw = value;
    p.x_lower = T(1);
    p.log_det = raw;
    p.log_det_raw = T(1);
    return p;
  }
};

}  // namespace constrained_ops
