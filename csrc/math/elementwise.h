// What every elementwise transform has, and the programs made of it. A transform is a struct with
//   static Point<T> at(T raw, const Bounds<T>& bounds)
// that fills in all it knows; a program reads what it needs and the compiler drops the rest.
#pragma once

#include "storage.h"

namespace constrained_ops {

// The bounds of one element. `smallest` and `largest` are the storage format's innermost neighbours of the bounds.
template <typename T>
struct Bounds {
  T lower, upper;
  T width, inverse_width, log_width;
  T smallest, largest;
};

template <typename Storage>
CO_HD Bounds<compute_t<Storage>> bounds_of_element(compute_t<Storage> lower, compute_t<Storage> upper) {
  using T = compute_t<Storage>;
  const T width = upper - lower;
  return {lower, upper, width, T(1) / width, log(width), next_above<Storage>(lower), next_below<Storage>(upper)};
}

// Bounds given once for all elements keep their double precision until here. Rounding them to T is harmless to
// strictness: the neighbour above the rounded bound lies above the bound itself.
template <typename Storage>
CO_HD Bounds<compute_t<Storage>> bounds_of_scalars(double lower, double upper) {
  using T = compute_t<Storage>;
  const double width = upper - lower;
  const T lower_t = static_cast<T>(lower), upper_t = static_cast<T>(upper);
  return {lower_t,
          upper_t,
          static_cast<T>(width),
          static_cast<T>(1 / width),
          static_cast<T>(std::log(width)),
          next_above<Storage>(lower_t),
          next_below<Storage>(upper_t)};
}

// Value, log-derivative and all derivatives up to the second at one raw. Derivatives to the two bounds of an
// interval differ by sign only, so one number to the width w = upper - lower stands for both: d/dlower = -d/dw.
template <typename T>
struct Point {
  T x, x_raw, x_raw_raw;                    // x, strictly between the bounds, and its derivatives as if nothing rounded
  T x_lower, x_upper, x_raw_width;          // ... to the bounds, and mixed
  T log_det, log_det_raw, log_det_raw_raw;  // log |dx/draw| and its derivatives
  T log_det_width, log_det_width_width;
};

// Programs: from the point and the operands besides raw and bounds (`in`) to the results (`out`).

template <bool with_log_det>
struct Forward {
  static constexpr int inputs = 0, outputs = with_log_det ? 2 : 1;

  template <typename T>
  CO_HD static void run(const Point<T>& at, const Bounds<T>&, const T*, T* out) {
    out[0] = at.x;
    if constexpr (with_log_det) out[1] = at.log_det;
  }
};

// in: grad_x[, grad_log_det]; out: grad_raw[, grad_lower, grad_upper].
template <bool with_log_det, bool with_bounds>
struct Backward {
  static constexpr int inputs = with_log_det ? 2 : 1, outputs = with_bounds ? 3 : 1;

  template <typename T>
  CO_HD static void run(const Point<T>& at, const Bounds<T>&, const T* in, T* out) {
    const T grad_x = in[0];
    T grad_raw = grad_x * at.x_raw, grad_width = T(0);
    if constexpr (with_log_det) {
      grad_raw += in[1] * at.log_det_raw;
      grad_width = in[1] * at.log_det_width;
    }
    out[0] = grad_raw;
    if constexpr (with_bounds) {
      out[1] = grad_x * at.x_lower - grad_width;
      out[2] = grad_x * at.x_upper + grad_width;
    }
  }
};

// The derivative of Backward along the cotangents of its results.
// in: cotangent of grad_raw, grad_x, grad_log_det[, cotangents of grad_lower, grad_upper];
// out: for grad_x, for grad_log_det, for raw[, for lower, for upper].
template <bool with_bounds>
struct DoubleBackward {
  static constexpr int inputs = with_bounds ? 5 : 3, outputs = with_bounds ? 5 : 3;

  template <typename T>
  CO_HD static void run(const Point<T>& at, const Bounds<T>&, const T* in, T* out) {
    const T along_raw = in[0], grad_x = in[1], grad_log_det = in[2];
    out[0] = along_raw * at.x_raw;
    out[1] = along_raw * at.log_det_raw;
    out[2] = along_raw * (grad_x * at.x_raw_raw + grad_log_det * at.log_det_raw_raw);
    if constexpr (with_bounds) {
      const T along_lower = in[3], along_upper = in[4], along_width = along_upper - along_lower;
      out[0] += along_lower * at.x_lower + along_upper * at.x_upper;
      out[1] += along_width * at.log_det_width;
      out[2] += along_width * grad_x * at.x_raw_width;
      const T for_width = along_raw * grad_x * at.x_raw_width + along_width * grad_log_det * at.log_det_width_width;
      out[3] = -for_width;
      out[4] = for_width;
    }
  }
};

}  // namespace constrained_ops
