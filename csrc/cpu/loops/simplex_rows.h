// Softmax of one row at a time: vector lanes run along the row.
#pragma once

#include <algorithm>
#include <limits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename Storage, typename T>
T row_largest(const Storage* raw, int64_t length) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < length; ++i) {
    const T r = to_compute(raw[i]);
    largest = r > largest ? r : largest;
  }
  return largest;
}

// The value of v where raw is largest: among ties the greatest, any would do.
template <typename Storage, typename T>
T row_at_largest(const Storage* raw, const Storage* v, T largest, int64_t length) {
  T at = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : at)
  for (int64_t i = 0; i < length; ++i) {
    const T value = to_compute(v[i]);  // loaded always: a load that depends is a slow one
    const T here = to_compute(raw[i]) == largest ? value : -std::numeric_limits<T>::infinity();
    at = here > at ? here : at;
  }
  return at;
}

// exp(raw - largest): computed and kept by first(), handed out again by again().
template <typename Storage, bool kept>
struct RowWeights {
  using T = compute_t<Storage>;
  const Storage* raw;
  T largest;
  T* scratch;

  CO_HD T first(int64_t i) const {
    const T weight = softmax_weight(T(to_compute(raw[i])), largest);
    if (kept) scratch[i] = weight;
    return weight;
  }
  CO_HD T again(int64_t i) const { return kept ? scratch[i] : softmax_weight(T(to_compute(raw[i])), largest); }
};

template <bool kept, typename Storage, typename T>
void row_forward(int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T smallest) {
  const Storage* raw = in[0];
  Storage* x = out[0];
  const RowWeights<Storage, kept> weight{raw, row_largest<Storage, T>(raw, length), scratch};
  double total = 0;
  for (int64_t start = 0; start < length; start += sum_block) {
    T sum = 0;
    const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) sum += weight.first(i);
    total += sum;
  }
  const T inverse_sum = T(1 / total);
#pragma GCC ivdep
  for (int64_t i = 0; i < length; ++i)
    x[i] = to_storage<Storage>(softmax_value(T(to_compute(raw[i])), weight.again(i), inverse_sum, smallest));
}

template <bool kept, typename Storage, typename T>
void row_backward(int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T) {
  const Storage *raw = in[0], *g = in[1];
  Storage* grad_raw = out[0];
  const T largest = row_largest<Storage, T>(raw, length), g_at = row_at_largest(raw, g, largest, length);
  const RowWeights<Storage, kept> weight{raw, largest, scratch};
  double total = 0, total_g = 0;
  for (int64_t start = 0; start < length; start += sum_block) {
    T sum = 0, sum_g = 0;
    const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum, sum_g)
    for (int64_t i = start; i < end; ++i) {
      const T w = weight.first(i);
      sum += w;
      sum_g += w * (to_compute(g[i]) - g_at);
    }
    total += sum;
    total_g += sum_g;
  }
  const T inverse_sum = T(1 / total), mean_g = T(total_g / total);
#pragma GCC ivdep
  for (int64_t i = 0; i < length; ++i)
    grad_raw[i] = to_storage<Storage>(softmax_backward(weight.again(i) * inverse_sum, to_compute(g[i]) - g_at, mean_g));
}

template <bool kept, typename Storage, typename T>
void row_double_backward(int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T) {
  const Storage *raw = in[0], *along = in[1], *g = in[2];
  const T largest = row_largest<Storage, T>(raw, length);
  const T along_at = row_at_largest(raw, along, largest, length), g_at = row_at_largest(raw, g, largest, length);
  const RowWeights<Storage, kept> weight{raw, largest, scratch};
  double total = 0, total_along = 0, total_g = 0;
  for (int64_t start = 0; start < length; start += sum_block) {
    T sum = 0, sum_along = 0, sum_g = 0;
    const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum, sum_along, sum_g)
    for (int64_t i = start; i < end; ++i) {
      const T w = weight.first(i);
      sum += w;
      sum_along += w * (to_compute(along[i]) - along_at);
      sum_g += w * (to_compute(g[i]) - g_at);
    }
    total += sum;
    total_along += sum_along;
    total_g += sum_g;
  }
  const T inverse_sum = T(1 / total), mean_along = T(total_along / total), mean_g = T(total_g / total);
  const auto product = [=](int64_t i) {
    return softmax_covariance(to_compute(along[i]) - along_at, mean_along, to_compute(g[i]) - g_at, mean_g);
  };
  if (Storage* for_g = out[0]) {
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      for_g[i] = to_storage<Storage>(
          softmax_backward(weight.again(i) * inverse_sum, to_compute(along[i]) - along_at, mean_along));
  }
  if (Storage* for_raw = out[1]) {
    double covariance = 0;
    for (int64_t start = 0; start < length; start += sum_block) {
      T sum = 0;
      const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < end; ++i) sum += weight.again(i) * product(i);
      covariance += sum;
    }
    const T mean = T(covariance / total);
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      for_raw[i] = to_storage<Storage>(softmax_backward(weight.again(i) * inverse_sum, product(i), mean));
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
