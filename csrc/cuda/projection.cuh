// The projection onto the simplex along rows (math/projection.h), as programs for rowwise.cuh.
#pragma once

#include "../math/projection.h"
#include "rowwise.cuh"

namespace constrained_ops {

// Inputs: x[, weight]. Every further reading of the row is a step of Newton's method.
template <typename Scalar, bool weighted>
struct Project {
  using T = Scalar;
  static constexpr int inputs = weighted ? 2 : 1, results = 1;
  static constexpr bool rereads = true, heavy = weighted;

  // The largest bound of lambda.
  struct State {
    static constexpr int count = 1;
    T values[count];

    CO_HD static State none() { return {{-std::numeric_limits<T>::infinity()}}; }
    CO_HD static State merge(const State& a, const State& b) { return {{larger_or_nan(a.values[0], b.values[0])}}; }
  };
  using Known = Ascent<T>;
  using Extra = Sums<T, 2>;  // over the support: of what exceeds lambda u, and of u
  using Part = Extra;

  T total;

  CO_HD static T padding(int input) { return input == 0 ? -std::numeric_limits<T>::infinity() : T(1); }

  template <int items>
  CO_HD static T u(const T (&values)[inputs][items], int i) {
    return weighted ? values[inputs - 1][i] : T(1);
  }

  template <int items>
  CO_HD void add(State& state, T (&values)[inputs][items]) const {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const T bound = projection_bound<weighted>(values[0][i], values[inputs - 1][i], total);
      state.values[0] = larger_or_nan(state.values[0], bound);
    }
  }

  CO_HD Known know(const State& state) const { return Known::template from<weighted>(state.values[0], total); }

  // Puts z in the place of x, for values that add() has been at.
  template <int items>
  CO_HD static void anchor(const Known& known, T (&values)[inputs][items]) {
#pragma unroll
    for (int i = 0; i < items; ++i)
      values[0][i] = projection_anchored<weighted>(values[0][i], u(values, i), known.anchor);
  }

  template <int items>
  CO_HD static Extra exceeding(const Known& known, const T (&values)[inputs][items]) {
    Extra sums = Extra::none();
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const T rest = projection_rest<weighted>(values[0][i], u(values, i), known.high, known.low);
      sums.values[0] += rest > T(0) ? rest : T(0);
      sums.values[1] += rest > T(0) ? u(values, i) : T(0);
    }
    return sums;
  }

  CO_HD bool again(Known& known, const Extra& sums) const {
    known.step(sums.values[0], sums.values[1], total);
    return known.left > T(0);
  }

  template <int items>
  CO_HD static void results_of(const Known& known, T (&values)[inputs][items]) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      values[0][i] = projection_value(projection_rest<weighted>(values[0][i], u(values, i), known.high, known.low));
    }
  }

  template <typename Group, int batch, int items>
  __device__ __forceinline__ void whole(Group& group, T (&values)[batch][inputs][items]) const {
    State state[batch];
    Known known[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      state[b] = State::none();
      add(state[b], values[b]);
    }
    group.merge(state);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      known[b] = know(state[b]);
      anchor(known[b], values[b]);
    }
    bool going;
    do {
      Extra sums[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) sums[b] = exceeding(known[b], values[b]);
      group.merge(sums);
      going = false;
#pragma unroll
      for (int b = 0; b < batch; ++b) going = again(known[b], sums[b]) || going;
    } while (group.any(going));
#pragma unroll
    for (int b = 0; b < batch; ++b) results_of(known[b], values[b]);
  }

  // Parts come from memory as they were.
  template <int items>
  CO_HD void prepare(const Known& known, T (&values)[inputs][items]) const {
    State unused = State::none();
    add(unused, values);
    anchor(known, values);
  }

  template <int items>
  CO_HD void extend(const Known& known, Extra& extra, T (&values)[inputs][items]) const {
    prepare(known, values);
    extra = Extra::merge(extra, exceeding(known, values));
  }

  template <int items>
  CO_HD void finish(const Known& known, const Extra&, T (&values)[inputs][items]) const {
    prepare(known, values);
    results_of(known, values);
  }
};

// Inputs: grad_y, y; with a weight grad_y, weight, y, and x last if the weight has a gradient.
template <typename Scalar, bool weighted, bool to_weight>
struct ProjectBackward {
  using T = Scalar;
  static constexpr int inputs = 2 + weighted + to_weight, results = 1 + to_weight;
  static constexpr int y_at = 1 + weighted, x_at = inputs - 1;
  static constexpr bool rereads = false, heavy = false;

  using State = Sums<T, 2 + to_weight>;  // over the support: of g u, of u, of x - y
  using Part = State;
  using Known = State;
  using Extra = Sums<T, 1>;  // nothing

  CO_HD static T padding(int input) { return weighted && input == 1 ? T(1) : T(0); }

  // Puts u in the place of the weight, zeros where y has them.
  template <int items>
  CO_HD static void prepare(T (&values)[inputs][items]) {
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const bool inside = projection_supports(values[y_at][i]);
      values[0][i] = inside ? values[0][i] : T(0);
      if constexpr (weighted) values[1][i] = inside ? T(1) / values[1][i] : T(0);
    }
  }

  template <int items>
  CO_HD static T u(const T (&values)[inputs][items], int i) {
    return weighted ? values[1][i] : T(projection_supports(values[y_at][i]));
  }

  template <int items>
  CO_HD static State sums_of(const T (&values)[inputs][items]) {
    State sums = State::none();
#pragma unroll
    for (int i = 0; i < items; ++i) {
      sums.values[0] += values[0][i] * u(values, i);
      sums.values[1] += u(values, i);
      if constexpr (to_weight) {
        const T y = values[y_at][i];
        sums.values[2] += projection_supports(y) ? values[x_at][i] - y : T(0);
      }
    }
    return sums;
  }

  template <int items>
  CO_HD static void results_of(const State& sums, T (&values)[inputs][items]) {
    const T mean = sums.values[0] / sums.values[1];
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const T grad_x = projection_supports(values[y_at][i]) ? projection_grad_x(values[0][i], mean) : T(0);
      values[0][i] = grad_x;
      if constexpr (to_weight) {
        values[1][i] = projection_grad_weight(grad_x, values[1][i], sums.values[2] / sums.values[1]);
      }
    }
  }

  template <typename Group, int batch, int items>
  __device__ __forceinline__ void whole(Group& group, T (&values)[batch][inputs][items]) const {
    State sums[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      prepare(values[b]);
      sums[b] = sums_of(values[b]);
    }
    group.merge(sums);
#pragma unroll
    for (int b = 0; b < batch; ++b) results_of(sums[b], values[b]);
  }

  template <int items>
  CO_HD void add(State& state, T (&values)[inputs][items]) const {
    prepare(values);
    state = State::merge(state, sums_of(values));
  }

  CO_HD const Known& know(const State& state) const { return state; }

  template <int items>
  CO_HD void finish(const Known& known, const Extra&, T (&values)[inputs][items]) const {
    prepare(values);
    results_of(known, values);
  }
};

}  // namespace constrained_ops
