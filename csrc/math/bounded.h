// raw -> an open interval, a half-line or the line. With e = exp(-|raw|), s = sigmoid(raw), w = upper - lower:
//
//   both bounds   x = lower + w s           dx = w s (1 - s)    d2x = -w s (1 - s) tanh(raw / 2)
//   lower only    x = lower + softplus(raw)   dx = s            d2x = s (1 - s)
//   upper only    x = upper - softplus(-raw)  dx = 1 - s        d2x = -s (1 - s)
//   neither       x = raw                     dx = 1            d2x = 0
//
// All is written in e, which neither overflows nor cancels, and x as a distance from the nearer bound.
#pragma once

#include "elementwise.h"

namespace constrained_ops {

// What the maps share at one raw. `near` = e / (1 + e) is the smaller of s and 1 - s, `far` the larger.
template <typename T>
struct Sigmoid {
  T raw, magnitude, e;
  T near, far;  // far = 1 - near = 1 / (1 + e)
  T slope;      // s (1 - s)
  T tanh_half;  // tanh(raw / 2)
  T log1p_e;
  bool upper_half;  // raw >= 0

  CO_HD static Sigmoid at(T raw) {
    const Exp<T> exponential = exp_nonpositive(-magnitude_of(raw));
    const T e = exponential.exp;
    return of(raw, e, exponential.expm1, e / (T(1) + e));
  }

  // From 2^lift e, where nobody asks for tanh_half, which would cancel. The derivative of a sigmoid wants no e itself.
  CO_HD static Sigmoid at(T raw, T lifted_e) {
    return at(raw, lifted_e, lifted_e / (power_of_two<T>(Format<T>::lift) + lifted_e));
  }
  // And from an estimate of near, which a step of Newton's squares the error of. Far and slope are as good as it was.
  CO_HD static Sigmoid at(T raw, T lifted_e, T quotient) {
    const T e = lifted_e * power_of_two<T>(-Format<T>::lift);
    return of(raw, e, e - T(1), quotient);
  }

  CO_HD static Sigmoid of(T raw, T e, T expm1, T quotient) {
    const T far = T(1) - quotient;
    const T near = quotient + far * ((e - e * quotient) - quotient);  // a step of Newton's: rounded once, not twice
    const T tanh_magnitude = -expm1 * far;
    const bool upper_half = raw >= T(0);
    const T tanh_half = upper_half ? tanh_magnitude : -tanh_magnitude;
    return {raw, magnitude_of(raw), e, near, far, quotient * far, tanh_half, log1p_unit(e), upper_half};
  }

  CO_HD T sigmoid() const { return upper_half ? far : near; }
  CO_HD T one_minus_sigmoid() const { return upper_half ? near : far; }
  CO_HD T softplus() const { return (upper_half ? raw : T(0)) + log1p_e; }         // log(1 + exp(raw))
  CO_HD T softplus_minus() const { return (upper_half ? T(0) : -raw) + log1p_e; }  // log(1 + exp(-raw))
};

// at() of the maps whose from(sigmoid, bounds) makes all they know of a Sigmoid.
template <typename Map>
struct OfSigmoid {
  template <typename T>
  CO_HD static Point<T> at(T raw, const Bounds<T>& b) {
    return Map::from(Sigmoid<T>::at(raw), b);
  }

  // In two halves, for loops that have other work between them and want x and x_raw alone.
  template <typename T>
  CO_HD static T exponential(T raw) {
    return lifted_exp_nonpositive(-magnitude_of(raw));
  }
  template <typename T>
  CO_HD static Point<T> at(T raw, T exponential, const Bounds<T>& b) {
    return Map::from(Sigmoid<T>::at(raw, exponential), b);
  }
  // x alone, from an estimate of the sigmoid's near.
  template <typename T>
  CO_HD static T x_at(T raw, T exponential, T near, const Bounds<T>& b) {
    return Map::from(Sigmoid<T>::at(raw, exponential, near), b).x;
  }
};

struct Interval : OfSigmoid<Interval> {
  template <typename T>
  CO_HD static Point<T> from(const Sigmoid<T>& s, const Bounds<T>& b) {
    const T distance = b.width * s.near, x = s.upper_half ? b.upper - distance : b.lower + distance;
    // The upper half starts where the lower one ends, whatever the bounds round to: x must not fall.
    const T middle = clamp(b.lower + b.width * T(0.5), b.smallest, b.largest);
    const T least = s.upper_half ? middle : b.smallest;
    Point<T> p;
    p.x = clamp(x, least, b.largest);
    p.x_raw = b.width * s.slope;
    p.x_raw_raw = -b.width * s.slope * s.tanh_half;
    p.x_lower = s.one_minus_sigmoid();
    p.x_upper = s.sigmoid();
    p.x_raw_width = s.slope;
    p.log_det = (b.log_width - s.magnitude) - T(2) * s.log1p_e;
    p.log_det_raw = -s.tanh_half;
    p.log_det_raw_raw = T(-2) * s.slope;
    p.log_det_width = b.inverse_width;
    p.log_det_width_width = -b.inverse_width * b.inverse_width;
    return p;
  }
};

struct LowerOnly : OfSigmoid<LowerOnly> {
  template <typename T>
  CO_HD static Point<T> from(const Sigmoid<T>& s, const Bounds<T>& b) {
    Point<T> p{};
    p.x = clamp(b.lower + s.softplus(), b.smallest, b.largest);
    p.x_raw = s.sigmoid();
    p.x_raw_raw = s.slope;
    p.x_lower = T(1);
    p.log_det = -s.softplus_minus();
    p.log_det_raw = s.one_minus_sigmoid();
    p.log_det_raw_raw = -s.slope;
    return p;
  }
};

struct UpperOnly : OfSigmoid<UpperOnly> {
  template <typename T>
  CO_HD static Point<T> from(const Sigmoid<T>& s, const Bounds<T>& b) {
    Point<T> p{};
    p.x = clamp(b.upper - s.softplus_minus(), b.smallest, b.largest);
    p.x_raw = s.one_minus_sigmoid();
    p.x_raw_raw = -s.slope;
    p.x_upper = T(1);
    p.log_det = -s.softplus();
    p.log_det_raw = -s.sigmoid();
    p.log_det_raw_raw = -s.slope;
    return p;
  }
};

struct Unbounded : OfSigmoid<Unbounded> {
  template <typename T>
  CO_HD static Point<T> from(const Sigmoid<T>& s, const Bounds<T>& b) {
    Point<T> p{};
    p.x = clamp(s.raw, b.smallest, b.largest);
    p.x_raw = T(1);
    return p;
  }
};

// Bounds that differ from element to element choose the map by which of them are finite. A NaN bound makes NaN.
struct ByElement : OfSigmoid<ByElement> {
  template <typename T>
  CO_HD static Point<T> from(const Sigmoid<T>& s, const Bounds<T>& b) {
    const bool no_lower = b.lower == -std::numeric_limits<T>::infinity();
    const bool no_upper = b.upper == std::numeric_limits<T>::infinity();
    const Point<T> with_lower = choose(no_upper, LowerOnly::from(s, b), Interval::from(s, b));
    const Point<T> without_lower = choose(no_upper, Unbounded::from(s, b), UpperOnly::from(s, b));
    return choose(no_lower, without_lower, with_lower);
  }

 private:
  template <typename T>
  CO_HD static Point<T> choose(bool condition, const Point<T>& yes, const Point<T>& no) {
    Point<T> p;
    p.x = condition ? yes.x : no.x;
    p.x_raw = condition ? yes.x_raw : no.x_raw;
    p.x_raw_raw = condition ? yes.x_raw_raw : no.x_raw_raw;
    p.x_lower = condition ? yes.x_lower : no.x_lower;
    p.x_upper = condition ? yes.x_upper : no.x_upper;
    p.x_raw_width = condition ? yes.x_raw_width : no.x_raw_width;
    p.log_det = condition ? yes.log_det : no.log_det;
    p.log_det_raw = condition ? yes.log_det_raw : no.log_det_raw;
    p.log_det_raw_raw = condition ? yes.log_det_raw_raw : no.log_det_raw_raw;
    p.log_det_width = condition ? yes.log_det_width : no.log_det_width;
    p.log_det_width_width = condition ? yes.log_det_width_width : no.log_det_width_width;
    return p;
  }
};

}  // namespace constrained_ops
