// Softmax of neighbouring rows: vector lanes are rows that lie side by side in memory, and a step takes each of them
// one element further.
#pragma once

#include <algorithm>
#include <limits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t max_lanes = RowUnits::max_lanes;

// `length` steps, `stride` elements apart, of `count` lanes side by side.
struct Columns {
  int64_t length, stride, count;
};

template <typename T>
using PerLane = T[max_lanes];

// The largest raw of each row, and the value there of each of `v`.
template <int values, typename Storage, typename T>
void find_largest(const Columns& s, const Storage* raw, PerLane<T>& largest, const Storage* const* v, PerLane<T>* at) {
  std::fill_n(largest, s.count, -std::numeric_limits<T>::infinity());
  for (int i = 0; i < values; ++i) std::fill_n(at[i], s.count, T(0));
  for (int64_t k = 0; k < s.length; ++k) {
    const Storage *r = raw + k * s.stride, *v0 = values > 0 ? v[0] + k * s.stride : r,
                  *v1 = values > 1 ? v[1] + k * s.stride : r;
#pragma GCC ivdep
    for (int64_t l = 0; l < s.count; ++l) {
      const T here = to_compute(r[l]);
      const bool larger = here > largest[l];
      const T here0 = to_compute(v0[l]), here1 = to_compute(v1[l]);  // loaded always: a load that depends is a slow one
      if (values > 0) at[0][l] = larger ? here0 : at[0][l];
      if (values > 1) at[values > 1][l] = larger ? here1 : at[values > 1][l];
      largest[l] = larger ? here : largest[l];
    }
  }
}

// Sums of term(step, lane, terms) along each row, `sums` of them at once.
template <int sums, typename T, typename Term>
void add_up(const Columns& s, PerLane<T>* total, Term term) {
  for (int i = 0; i < sums; ++i) std::fill_n(total[i], s.count, T(0));
  for (int64_t start = 0; start < s.length; start += sum_block) {
    PerLane<T> partial[sums];
    for (int i = 0; i < sums; ++i) std::fill_n(partial[i], s.count, T(0));
    for (int64_t k = start; k < std::min(s.length, start + sum_block); ++k) {
#pragma GCC ivdep
      for (int64_t l = 0; l < s.count; ++l) {
        T terms[sums];
        term(k, l, terms);
        for (int i = 0; i < sums; ++i) partial[i][l] += terms[i];
      }
    }
    for (int i = 0; i < sums; ++i)
      for (int64_t l = 0; l < s.count; ++l) total[i][l] += partial[i][l];
  }
}

template <typename Body>
CO_HD void for_each(const Columns& s, Body body) {
  for (int64_t k = 0; k < s.length; ++k) {
#pragma GCC ivdep
    for (int64_t l = 0; l < s.count; ++l) body(k, l);
  }
}

// exp(raw - largest): computed and kept by first(), handed out again by again().
template <typename Storage, bool kept>
struct Weights {
  using T = compute_t<Storage>;
  const Columns& s;
  const Storage* raw;
  const T* largest;
  T* scratch;

  CO_HD T first(int64_t k, int64_t l) const {
    const T weight = softmax_weight(to_compute(raw[k * s.stride + l]), largest[l]);
    if (kept) scratch[k * s.count + l] = weight;
    return weight;
  }
  CO_HD T again(int64_t k, int64_t l) const {
    return kept ? scratch[k * s.count + l] : softmax_weight(to_compute(raw[k * s.stride + l]), largest[l]);
  }
};

// `smallest`: the smallest positive number of the tensor's dtype, which a tile's type does not tell.
template <bool kept, typename Storage, typename T>
void columns_forward(const Columns& s, const Storage* const* in, Storage* const* out, T* scratch, T smallest) {
  PerLane<T> largest, inverse_sum[1];
  const Storage* raw = in[0];
  Storage* x = out[0];
  find_largest<0>(s, raw, largest, in, inverse_sum);
  const Weights<Storage, kept> weight{s, raw, largest, scratch};
  add_up<1>(s, inverse_sum, [=](int64_t k, int64_t l, T* terms) { terms[0] = weight.first(k, l); });
  for (int64_t l = 0; l < s.count; ++l) inverse_sum[0][l] = T(1) / inverse_sum[0][l];
  const T* inverse = inverse_sum[0];
  for_each(s, [=, &s](int64_t k, int64_t l) {
    const int64_t i = k * s.stride + l;
    x[i] = to_storage<Storage>(softmax_value(to_compute(raw[i]), weight.again(k, l), inverse[l], smallest));
  });
}

template <bool kept, typename Storage, typename T>
void columns_backward(const Columns& s, const Storage* const* in, Storage* const* out, T* scratch, T) {
  PerLane<T> largest, shift[1], sums[2];
  const Storage *raw = in[0], *g = in[1];
  Storage* grad_raw = out[0];
  find_largest<1>(s, raw, largest, in + 1, shift);
  const Weights<Storage, kept> weight{s, raw, largest, scratch};
  const T* g_at = shift[0];
  add_up<2>(s, sums, [=, &s](int64_t k, int64_t l, T* terms) {
    terms[0] = weight.first(k, l);
    terms[1] = terms[0] * (to_compute(g[k * s.stride + l]) - g_at[l]);
  });
  for (int64_t l = 0; l < s.count; ++l) {
    sums[0][l] = T(1) / sums[0][l];
    sums[1][l] *= sums[0][l];
  }
  const T *inverse = sums[0], *mean = sums[1];
  for_each(s, [=, &s](int64_t k, int64_t l) {
    const int64_t i = k * s.stride + l;
    grad_raw[i] =
        to_storage<Storage>(softmax_backward(weight.again(k, l) * inverse[l], to_compute(g[i]) - g_at[l], mean[l]));
  });
}

template <bool kept, typename Storage, typename T>
void columns_double_backward(const Columns& s, const Storage* const* in, Storage* const* out, T* scratch, T) {
  PerLane<T> largest, shift[2], sums[3], covariance[1];
  const Storage *raw = in[0], *along = in[1], *g = in[2];
  find_largest<2>(s, raw, largest, in + 1, shift);
  const Weights<Storage, kept> weight{s, raw, largest, scratch};
  const T *along_at = shift[0], *g_at = shift[1];
  add_up<3>(s, sums, [=, &s](int64_t k, int64_t l, T* terms) {
    const int64_t i = k * s.stride + l;
    terms[0] = weight.first(k, l);
    terms[1] = terms[0] * (to_compute(along[i]) - along_at[l]);
    terms[2] = terms[0] * (to_compute(g[i]) - g_at[l]);
  });
  for (int64_t l = 0; l < s.count; ++l) {
    sums[0][l] = T(1) / sums[0][l];
    sums[1][l] *= sums[0][l];
    sums[2][l] *= sums[0][l];
  }
  const T *inverse = sums[0], *mean_along = sums[1], *mean_g = sums[2];
  const auto product = [=](int64_t i, int64_t l) {
    return softmax_covariance(to_compute(along[i]) - along_at[l], mean_along[l], to_compute(g[i]) - g_at[l], mean_g[l]);
  };
  if (Storage* for_g = out[0]) {
    for_each(s, [=, &s](int64_t k, int64_t l) {
      const int64_t i = k * s.stride + l;
      const T x = weight.again(k, l) * inverse[l];
      for_g[i] = to_storage<Storage>(softmax_backward(x, to_compute(along[i]) - along_at[l], mean_along[l]));
    });
  }
  if (Storage* for_raw = out[1]) {
    add_up<1>(s, covariance, [=, &s](int64_t k, int64_t l, T* terms) {
      terms[0] = weight.again(k, l) * inverse[l] * product(k * s.stride + l, l);
    });
    const T* mean = covariance[0];
    for_each(s, [=, &s](int64_t k, int64_t l) {
      const int64_t i = k * s.stride + l;
      for_raw[i] = to_storage<Storage>(softmax_backward(weight.again(k, l) * inverse[l], product(i, l), mean[l]));
    });
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
