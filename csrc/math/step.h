// What stands around Adam in a step on one element: a hook says on which number Adam walks, and what becomes of it.
#pragma once

#include "adam.h"
#include "elementwise.h"

namespace constrained_ops {

// On the parameter itself.
struct NoConstraint {
  static constexpr bool on_raw = false, by_element = false;
};

// On the parameter, which is then projected: in a box the projection is the same in every diagonal metric.
template <bool each>
struct Projected {
  static constexpr bool on_raw = false, by_element = each;
};

// On raw, whose transform the parameter is.
template <typename Map, bool each>
struct OnRaw {
  static constexpr bool on_raw = true, by_element = each;
};

template <typename T>
CO_HD T finish(NoConstraint, T y, const Bounds<T>&) {
  return y;
}
template <bool each, typename T>
CO_HD T finish(Projected<each>, T y, const Bounds<T>& b) {
  return clamp(y, b.lower, b.upper);
}
template <typename Map, bool each, typename T>
CO_HD T finish(OnRaw<Map, each>, T y, const Bounds<T>& b) {
  return Map::at(y, b).x;
}

template <typename Hook, typename T>
CO_HD T derivative(Hook, T, const Bounds<T>&) {
  return T(1);
}
template <typename Map, bool each, typename T>
CO_HD T derivative(OnRaw<Map, each>, T raw, const Bounds<T>& b) {
  return Map::at(raw, b).x_raw;
}

}  // namespace constrained_ops
