// Softmax of rows that lie one after the other: vector lanes run along a row. Each stage goes through several rows
// before the next one starts, so that what a row waits for, its largest element and its sum, is known by then.
#pragma once

#include <algorithm>
#include <limits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int max_rows = RowUnits::max_rows;

template <typename T>
struct Range {
  T smallest, largest;
};

template <typename Storage, typename T>
Range<T> row_range(const Storage* raw, int64_t length) {
  T smallest = std::numeric_limits<T>::infinity(), largest = -smallest;
#pragma omp simd reduction(min : smallest) reduction(max : largest)
  for (int64_t i = 0; i < length; ++i) {
    const T r = to_compute(raw[i]);
    smallest = r < smallest ? r : smallest;
    largest = r > largest ? r : largest;
  }
  return {smallest, largest};
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

// exp(raw - largest) of one row: computed and kept by first(), handed out again by again(). The memory may be that of
// the result, where a weight has had its use when its place is taken.
template <bool kept, typename Storage, typename T>
struct RowWeights {
  const Storage* raw;
  T largest;
  T* scratch;

  CO_HD T first(int64_t i) const {
    const T weight = softmax_lifted_weight(T(to_compute(raw[i])), largest);
    if (kept) scratch[i] = weight;
    return weight;
  }
  CO_HD T again(int64_t i) const { return kept ? scratch[i] : softmax_lifted_weight(T(to_compute(raw[i])), largest); }
};

template <bool kept, typename Storage, typename T>
void rows_forward(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T smallest) {
  const Storage* raw = in[0];
  Range<T> range[max_rows];
  double total[max_rows] = {};
  for (int r = 0; r < rows; ++r) range[r] = row_range<Storage, T>(raw + r * length, length);
  const auto weights = [=](int r) {
    return RowWeights<kept, Storage, T>{raw + r * length, range[r].largest, scratch + r * length};
  };
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    for (int64_t start = 0; start < length; start += sum_block) {
      T sum = 0;
      const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < end; ++i) sum += weight.first(i);
      total[r] += sum;
    }
  }
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const T inverse_sum = T(1 / total[r]);
    const Storage* row = raw + r * length;
    Storage* x = out[0] + r * length;
    if (softmax_lifted_weight(range[r].smallest, range[r].largest) * inverse_sum >=
        smallest) {  // as in most rows: none underflows
#pragma GCC ivdep
      for (int64_t i = 0; i < length; ++i) x[i] = to_storage<Storage>(weight.again(i) * inverse_sum);
      continue;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      x[i] = to_storage<Storage>(softmax_value(T(to_compute(row[i])), weight.again(i), inverse_sum, smallest));
  }
}

template <bool kept, typename Storage, typename T>
void rows_backward(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T) {
  const Storage *raw = in[0], *grad_x = in[1];
  T largest[max_rows], g_at[max_rows];
  double total[max_rows] = {}, total_g[max_rows] = {};
  for (int r = 0; r < rows; ++r) largest[r] = row_range<Storage, T>(raw + r * length, length).largest;
  for (int r = 0; r < rows; ++r) g_at[r] = row_at_largest(raw + r * length, grad_x + r * length, largest[r], length);
  const auto weights = [=](int r) {
    return RowWeights<kept, Storage, T>{raw + r * length, largest[r], scratch + r * length};
  };
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const Storage* g = grad_x + r * length;
    const T at = g_at[r];
    for (int64_t start = 0; start < length; start += sum_block) {
      T sum = 0, sum_g = 0;
      const int64_t end = std::min(length, start + sum_block);
#pragma omp simd reduction(+ : sum, sum_g)
      for (int64_t i = start; i < end; ++i) {
        const T w = weight.first(i);
        sum += w;
        sum_g += w * (to_compute(g[i]) - at);
      }
      total[r] += sum;
      total_g[r] += sum_g;
    }
  }
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const T inverse_sum = T(1 / total[r]), at = g_at[r], mean_g = T(total_g[r] / total[r]);
    const Storage* g = grad_x + r * length;
    Storage* grad_raw = out[0] + r * length;
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      grad_raw[i] = to_storage<Storage>(softmax_backward(weight.again(i) * inverse_sum, to_compute(g[i]) - at, mean_g));
  }
}

// Second order is rare enough to go row by row.
template <bool kept, typename Storage, typename T>
void row_double_backward(int64_t length, const Storage* const* in, Storage* const* out, T* scratch) {
  const Storage *raw = in[0], *along = in[1], *g = in[2];
  const T largest = row_range<Storage, T>(raw, length).largest;
  const T along_at = row_at_largest(raw, along, largest, length), g_at = row_at_largest(raw, g, largest, length);
  const RowWeights<kept, Storage, T> weight{raw, largest, scratch};
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

template <bool kept, typename Storage, typename T>
void rows_double_backward(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T) {
  for (int r = 0; r < rows; ++r) {
    const int64_t at = r * length;
    const Storage* const row_in[] = {in[0] + at, in[1] + at, in[2] + at};
    Storage* const row_out[] = {out[0] ? out[0] + at : nullptr, out[1] ? out[1] + at : nullptr};
    row_double_backward<kept>(length, row_in, row_out, scratch + at);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
