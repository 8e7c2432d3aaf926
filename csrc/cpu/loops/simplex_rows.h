// Softmax of rows that lie one after the other: vector lanes run along a row. Each stage goes through several rows
// before the next one starts, so that what a row waits for, its largest element and its sum, is known by then.
#pragma once

#include <algorithm>
#include <limits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"
#include "simplex_blocks.h"

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

// exp(raw - largest) of one row: computed by first(), handed out again by again(). The memory where it is kept may be
// that of the result, where a weight has had its use when its place is taken. Or raw is x itself, its own weight.
enum class Weights { kept, computed_again, given };

template <Weights weights, typename Storage, typename T>
struct RowWeights {
  const Storage* raw;
  T largest;
  T* scratch;

  CO_HD T first(int64_t i) const {
    if (weights == Weights::given) return to_compute(raw[i]);
    const T weight = softmax_lifted_weight(T(to_compute(raw[i])), largest);
    if (weights == Weights::kept) scratch[i] = weight;
    return weight;
  }
  CO_HD T again(int64_t i) const { return weights == Weights::kept ? scratch[i] : first(i); }
};

// Sums over a row of what body(i, values) puts into `n` values: side by side in several vectors, since an addition
// waits for the one before, and block by block.
template <typename T, int n, typename Body>
CO_HD void add_up(int64_t length, double (&totals)[n], const Body& body) {
  constexpr int lanes = std::max(32, 4 * vector_lanes<T>);  // as many numbers as the shortest row has, at most
  using Sums = Block<T, vector_lanes<T>, lanes / vector_lanes<T>, 1>;
  T values[n][lanes];
  const auto fill = [&](int64_t start) CO_INLINE {
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) {
      T at[n];
      body(start + l, at);
      for (int k = 0; k < n; ++k) values[k][l] = at[k];
    }
  };
  for (int64_t start = 0; start < length; start += sum_block) {
    const int64_t end = std::min(length, start + sum_block);
    Sums sums[n];
    for (int k = 0; k < n; ++k) sums[k].clear();
    int64_t i = start;
    for (; i + lanes <= end; i += lanes) {
      fill(i);
      for (int k = 0; k < n; ++k) sums[k].add(values[k]);
    }
    if (i < end) {  // once more the last lanes of the row, of which some were counted
      fill(end - lanes);
      const int counted = static_cast<int>(lanes - (end - i));
      for (int k = 0; k < n; ++k) {
        for (int l = 0; l < lanes; ++l) values[k][l] = l < counted ? T(0) : values[k][l];
        sums[k].add(values[k]);
      }
    }
    for (int k = 0; k < n; ++k) totals[k] += sums[k].sum();
  }
}

template <Weights kept, typename Storage, typename T>
void rows_forward(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T smallest) {
  const Storage* raw = in[0];
  Range<T> range[max_rows];
  double total[max_rows][1] = {};
  for (int r = 0; r < rows; ++r) range[r] = row_range<Storage, T>(raw + r * length, length);
  const auto weights = [=](int r) {
    return RowWeights<kept, Storage, T>{raw + r * length, range[r].largest, scratch + r * length};
  };
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    add_up<T>(length, total[r], [=](int64_t i, T* values) CO_INLINE { values[0] = weight.first(i); });
  }
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const T inverse_sum = T(1 / total[r][0]);
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

// Means are taken of differences from a first mean: so they keep their digits where one weight is nearly all. That one
// is taken of differences from the row's first number: so equal numbers have exactly their mean.
template <Weights kept, typename Storage, typename T>
void rows_backward(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* scratch, T) {
  const Storage *raw = in[0], *grad_x = in[1];
  T largest[max_rows] = {}, first_mean[max_rows], mean[max_rows];
  double total[max_rows][2] = {};
  if (kept != Weights::given)
    for (int r = 0; r < rows; ++r) largest[r] = row_range<Storage, T>(raw + r * length, length).largest;
  const auto weights = [=](int r) {
    return RowWeights<kept, Storage, T>{raw + r * length, largest[r], scratch + r * length};
  };
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const Storage* g = grad_x + r * length;
    const T head = to_compute(g[0]);
    if constexpr (kept == Weights::given) {
      double sum[1] = {};
      add_up<T>(length, sum,
                [=](int64_t i, T* values) CO_INLINE { values[0] = weight.first(i) * (to_compute(g[i]) - head); });
      total[r][0] = 1;
      total[r][1] = sum[0];
    } else {
      add_up<T>(length, total[r], [=](int64_t i, T* values) CO_INLINE {
        values[0] = weight.first(i);
        values[1] = values[0] * (to_compute(g[i]) - head);
      });
    }
    first_mean[r] = T(head + total[r][1] / total[r][0]);
  }
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const Storage* g = grad_x + r * length;
    const T first = first_mean[r];
    double rest[1] = {};
    add_up<T>(length, rest,
              [=](int64_t i, T* values) CO_INLINE { values[0] = weight.again(i) * (to_compute(g[i]) - first); });
    mean[r] = T(rest[0] / total[r][0]);
  }
  for (int r = 0; r < rows; ++r) {
    const auto weight = weights(r);
    const T inverse_sum = T(1 / total[r][0]), first = first_mean[r], second = mean[r];
    const Storage* g = grad_x + r * length;
    Storage* grad_raw = out[0] + r * length;
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      grad_raw[i] =
          to_storage<Storage>(softmax_backward(weight.again(i) * inverse_sum, to_compute(g[i]) - first, second));
  }
}

// Second order is rare enough to go row by row.
template <Weights kept, typename Storage, typename T>
void row_double_backward(int64_t length, const Storage* const* in, Storage* const* out, T* scratch) {
  const Storage *raw = in[0], *along = in[1], *g = in[2];
  const RowWeights<kept, Storage, T> weight{raw, row_range<Storage, T>(raw, length).largest, scratch};
  const T along_head = to_compute(along[0]), g_head = to_compute(g[0]);
  double total[3] = {}, rest[2] = {};
  add_up<T>(length, total, [=](int64_t i, T* values) CO_INLINE {
    values[0] = weight.first(i);
    values[1] = values[0] * (to_compute(along[i]) - along_head);
    values[2] = values[0] * (to_compute(g[i]) - g_head);
  });
  const T along_first = T(along_head + total[1] / total[0]), g_first = T(g_head + total[2] / total[0]);
  add_up<T>(length, rest, [=](int64_t i, T* values) CO_INLINE {
    const T w = weight.again(i);
    values[0] = w * (to_compute(along[i]) - along_first);
    values[1] = w * (to_compute(g[i]) - g_first);
  });
  const T inverse_sum = T(1 / total[0]), mean_along = T(rest[0] / total[0]), mean_g = T(rest[1] / total[0]);
  const auto product = [=](int64_t i) CO_INLINE {
    return softmax_covariance(to_compute(along[i]) - along_first, mean_along, to_compute(g[i]) - g_first, mean_g);
  };
  if (Storage* for_g = out[0]) {
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      for_g[i] = to_storage<Storage>(
          softmax_backward(weight.again(i) * inverse_sum, to_compute(along[i]) - along_first, mean_along));
  }
  if (Storage* for_raw = out[1]) {
    double covariance[1] = {};
    add_up<T>(length, covariance, [=](int64_t i, T* values) CO_INLINE { values[0] = weight.again(i) * product(i); });
    const T mean = T(covariance[0] / total[0]);
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i)
      for_raw[i] = to_storage<Storage>(softmax_backward(weight.again(i) * inverse_sum, product(i), mean));
  }
}

template <Weights kept, typename Storage, typename T>
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
