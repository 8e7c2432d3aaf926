// Softmax along rows (math/simplex.h), as a program for rowwise.cuh: order 0 is forward, 1 backward, 2 double backward.
// Inputs are raw, then g, then along. Backward computes x anew, since nothing but raw is kept.
#pragma once

#include "../math/simplex.h"
#include "rowwise.cuh"

namespace constrained_ops {

// The largest raw and what the other inputs are there. Where it occurs more than once, the largest of those decide: all
// threads must come to the same, whatever the order in which they merge.
template <typename T, int n>
struct Peak {
  static constexpr int count = n;
  T values[n];

  CO_HD static Peak none() {
    Peak peak{};
    peak.values[0] = -std::numeric_limits<T>::infinity();
    return peak;
  }
  CO_HD static Peak merge(const Peak& a, const Peak& b) {
    bool larger = false, equal = true;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      larger = larger || (equal && b.values[i] > a.values[i]);
      equal = equal && b.values[i] == a.values[i];
    }
    Peak peak;
#pragma unroll
    for (int i = 0; i < n; ++i) peak.values[i] = larger ? b.values[i] : a.values[i];
    return peak;
  }
};

template <typename Scalar, int order>
struct Softmax {
  using T = Scalar;
  static constexpr int inputs = 1 + order, results = order == 2 ? 2 : 1;
  static constexpr bool rereads = order == 2, heavy = false;

  using Part =
      Sums<T, inputs>;       // of the weights, and of the weights times the other inputs less their values at the peak
  using Extra = Sums<T, 1>;  // of the weights times the covariance

  // What is known of a row from some of its items.
  struct State {
    static constexpr int count = 2 * inputs;
    T values[count];  // Peak, then Part

    CO_HD static State none() { return of(Peak<T, inputs>::none(), Part::none()); }
    CO_HD static State of(const Peak<T, inputs>& peak, const Part& part) {
      State state;
#pragma unroll
      for (int i = 0; i < inputs; ++i) {
        state.values[i] = peak.values[i];
        state.values[inputs + i] = part.values[i];
      }
      return state;
    }
    CO_HD Peak<T, inputs> peak() const {
      Peak<T, inputs> peak;
#pragma unroll
      for (int i = 0; i < inputs; ++i) peak.values[i] = values[i];
      return peak;
    }
    CO_HD Part part() const {
      Part part;
#pragma unroll
      for (int i = 0; i < inputs; ++i) part.values[i] = values[inputs + i];
      return part;
    }
    // The sums as they would be with another peak.
    CO_HD Part relative_to(const Peak<T, inputs>& peak) const {
      const T scale = softmax_weight(values[0], reference(peak));
      Part part;
      part.values[0] = values[inputs] * scale;
#pragma unroll
      for (int i = 1; i < inputs; ++i) {
        part.values[i] = (values[inputs + i] + values[inputs] * (values[i] - peak.values[i])) * scale;
      }
      return part;
    }
    CO_HD static State merge(const State& a, const State& b) {
      const Peak<T, inputs> peak = Peak<T, inputs>::merge(a.peak(), b.peak());
      return of(peak, Part::merge(a.relative_to(peak), b.relative_to(peak)));
    }
  };

  using Known = State;

  T smallest;  // the least positive number of the storage format

  CO_HD static T padding(int input) { return input == 0 ? -std::numeric_limits<T>::infinity() : T(0); }

  // What weights are relative to: the peak, unless all that has been seen so far is masked by -inf.
  CO_HD static T reference(const Peak<T, inputs>& peak) {
    return peak.values[0] == -std::numeric_limits<T>::infinity() ? T(0) : peak.values[0];
  }

  template <int items>
  CO_HD static Peak<T, inputs> find_peak(const T (&values)[inputs][items]) {
    Peak<T, inputs> peak = Peak<T, inputs>::none();
#pragma unroll
    for (int i = 0; i < items; ++i) {
      Peak<T, inputs> item;
#pragma unroll
      for (int k = 0; k < inputs; ++k) item.values[k] = values[k][i];
      peak = Peak<T, inputs>::merge(peak, item);
    }
    return peak;
  }

  // Puts the weights in the place of raw, the differences from the peak in the place of the others; their sums. The
  // weight of a finite raw is kept above 0, so that it still tells that raw was finite.
  template <int items>
  CO_HD static Part weigh(const Peak<T, inputs>& peak, T (&values)[inputs][items]) {
    const T largest = reference(peak);
    Part sums = Part::none();
#pragma unroll
    for (int i = 0; i < items; ++i) {
      const T raw = values[0][i];
      T weight = softmax_weight(raw, largest);
      if constexpr (order == 0) {
        constexpr T least = std::numeric_limits<T>::denorm_min();
        weight = raw > -std::numeric_limits<T>::infinity() && weight < least ? least : weight;
      }
      values[0][i] = weight;
      sums.values[0] += weight;
#pragma unroll
      for (int k = 1; k < inputs; ++k) {
        values[k][i] -= peak.values[k];
        sums.values[k] += weight * values[k][i];
      }
    }
    return sums;
  }

  // For values that weigh() has been at.
  template <int items>
  CO_HD static void sum_covariance(const Part& sums, const T (&values)[inputs][items], Extra& extra) {
    if constexpr (order == 2) {
      const T mean_g = sums.values[1] / sums.values[0], mean_along = sums.values[2] / sums.values[0];
#pragma unroll
      for (int i = 0; i < items; ++i) {
        extra.values[0] += values[0][i] * softmax_covariance(values[2][i], mean_along, values[1][i], mean_g);
      }
    }
  }

  template <int items>
  CO_HD void results_of(const Part& sums, const Extra& extra, T (&values)[inputs][items]) const {
    const T inverse_sum = T(1) / sums.values[0];
    if constexpr (order == 0) {
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const T weight = values[0][i];
        const T finite_or_masked = weight > T(0) ? T(0) : -std::numeric_limits<T>::infinity();
        values[0][i] = softmax_value(finite_or_masked, weight, inverse_sum, smallest);
      }
    } else {
      const T mean_g = sums.values[1] / sums.values[0];
#pragma unroll
      for (int i = 0; i < items; ++i) {
        const T x = values[0][i] * inverse_sum;
        if constexpr (order == 1) {
          values[0][i] = softmax_backward(x, values[1][i], mean_g);
        } else {
          const T mean_along = sums.values[2] / sums.values[0], mean_covariance = extra.values[0] * inverse_sum;
          const T covariance = softmax_covariance(values[2][i], mean_along, values[1][i], mean_g);
          values[0][i] = softmax_backward(x, values[2][i], mean_along);
          values[1][i] = softmax_backward(x, covariance, mean_covariance);
        }
      }
    }
  }

  template <typename Group, int batch, int items>
  __device__ __forceinline__ void whole(Group& group, T (&values)[batch][inputs][items]) const {
    Peak<T, inputs> peak[batch];
    Part sums[batch];
    Extra extra[batch] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) peak[b] = find_peak(values[b]);
    group.merge(peak);
#pragma unroll
    for (int b = 0; b < batch; ++b) sums[b] = weigh(peak[b], values[b]);
    group.merge(sums);
    if constexpr (rereads) {
#pragma unroll
      for (int b = 0; b < batch; ++b) sum_covariance(sums[b], values[b], extra[b]);
      group.merge(extra);
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) results_of(sums[b], extra[b], values[b]);
  }

  template <int items>
  CO_HD void add(State& state, T (&values)[inputs][items]) const {
    const Peak<T, inputs> peak = find_peak(values);
    state = State::merge(state, State::of(peak, weigh(peak, values)));
  }

  CO_HD const Known& know(const State& state) const { return state; }

  CO_HD static bool again(const Known&, const Extra&) { return false; }

  template <int items>
  CO_HD void extend(const State& state, Extra& extra, T (&values)[inputs][items]) const {
    weigh(state.peak(), values);
    sum_covariance(state.part(), values, extra);
  }

  template <int items>
  CO_HD void finish(const State& state, const Extra& extra, T (&values)[inputs][items]) const {
    weigh(state.peak(), values);
    results_of(state.part(), extra, values);
  }
};

}  // namespace constrained_ops
