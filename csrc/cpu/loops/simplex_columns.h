// Softmax of neighbouring rows: lanes are rows that lie side by side in memory, and a step takes all of them one
// element further. The number of lanes is a constant of several vectors, independent work for the compiler to
// interleave.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

#define CO_EACH_LANE _Pragma("GCC ivdep") for (int64_t l = 0; l < lanes; ++l)

// exp(raw - largest) is computed once if the result can hold it meanwhile, otherwise again.
template <typename Storage>
constexpr bool keeps_weights = std::is_same_v<Storage, compute_t<Storage>>;

template <typename Storage, typename T>
CO_HD T keep_weight(const Storage& raw, T largest, Storage& kept) {
  const T weight = softmax_lifted_weight(T(to_compute(raw)), largest);
  if constexpr (keeps_weights<Storage>) kept = weight;
  return weight;
}

template <typename Storage, typename T>
CO_HD T kept_weight(const Storage& raw, T largest, const Storage& kept) {
  if constexpr (keeps_weights<Storage>)
    return kept;
  else
    return softmax_lifted_weight(T(to_compute(raw)), largest);
}

// `smallest`: the smallest positive number of the tensor's dtype, which a tile's type does not tell.
template <int64_t lanes, typename Storage, typename T>
[[gnu::noinline]] void columns_forward(int64_t length, int64_t stride, T smallest, const Storage* __restrict raw,
                                       Storage* __restrict x) {
  T largest[lanes], sum[lanes] = {}, inverse[lanes];
  CO_EACH_LANE largest[l] = to_compute(raw[l]);
  for (int64_t k = 1; k < length; ++k) {
    const Storage* r = raw + k * stride;
    CO_EACH_LANE largest[l] = to_compute(r[l]) > largest[l] ? to_compute(r[l]) : largest[l];
  }
  for (int64_t start = 0; start < length; start += sum_block) {
    T part[lanes] = {};
    for (int64_t k = start; k < std::min(length, start + sum_block); ++k) {
      const Storage* r = raw + k * stride;
      Storage* kept = x + k * stride;
      CO_EACH_LANE part[l] += keep_weight(r[l], largest[l], kept[l]);
    }
    CO_EACH_LANE sum[l] += part[l];
  }
  CO_EACH_LANE inverse[l] = T(1) / sum[l];
  for (int64_t k = 0; k < length; ++k) {
    const Storage* r = raw + k * stride;
    Storage* to = x + k * stride;
    CO_EACH_LANE to[l] = to_storage<Storage>(
        softmax_value(T(to_compute(r[l])), kept_weight(r[l], largest[l], to[l]), inverse[l], smallest));
  }
}

// given: `raw` holds x, its own weight.
template <int64_t lanes, bool given, typename Storage, typename T>
[[gnu::noinline]] void columns_backward(int64_t length, int64_t stride, T, const Storage* __restrict raw,
                                        const Storage* __restrict grad_x, Storage* __restrict grad_raw) {
  T largest[lanes], g_at[lanes], sum[lanes] = {}, sum_g[lanes] = {}, inverse[lanes], mean_g[lanes];
  CO_EACH_LANE {
    largest[l] = to_compute(raw[l]);
    g_at[l] = to_compute(grad_x[l]);
  }
  for (int64_t k = 1; k < length; ++k) {
    const Storage *r = raw + k * stride, *g = grad_x + k * stride;
    CO_EACH_LANE {
      const T here = to_compute(r[l]), g_here = to_compute(g[l]);  // loaded always: a load that depends is a slow one
      const bool larger = here > largest[l];
      g_at[l] = larger ? g_here : g_at[l];
      largest[l] = larger ? here : largest[l];
    }
  }
  for (int64_t start = 0; start < length; start += sum_block) {
    T part[lanes] = {}, part_g[lanes] = {};
    for (int64_t k = start; k < std::min(length, start + sum_block); ++k) {
      const Storage *r = raw + k * stride, *g = grad_x + k * stride;
      Storage* kept = grad_raw + k * stride;
      CO_EACH_LANE {
        const T weight = given ? T(to_compute(r[l])) : keep_weight(r[l], largest[l], kept[l]);
        part[l] += weight;
        part_g[l] += weight * (to_compute(g[l]) - g_at[l]);
      }
    }
    CO_EACH_LANE {
      sum[l] += part[l];
      sum_g[l] += part_g[l];
    }
  }
  CO_EACH_LANE {
    inverse[l] = T(1) / sum[l];
    mean_g[l] = sum_g[l] * inverse[l];
  }
  for (int64_t k = 0; k < length; ++k) {
    const Storage *r = raw + k * stride, *g = grad_x + k * stride;
    Storage* to = grad_raw + k * stride;
    CO_EACH_LANE {
      const T weight = given ? T(to_compute(r[l])) : kept_weight(r[l], largest[l], to[l]);
      to[l] = to_storage<Storage>(softmax_backward(weight * inverse[l], to_compute(g[l]) - g_at[l], mean_g[l]));
    }
  }
}

// Either result may be null.
template <int64_t lanes, typename Storage, typename T>
[[gnu::noinline]] void columns_double_backward(int64_t length, int64_t stride, T, const Storage* __restrict raw,
                                               const Storage* __restrict along, const Storage* __restrict grad_x,
                                               Storage* __restrict for_g, Storage* __restrict for_raw) {
  T largest[lanes], a_at[lanes], g_at[lanes], sum[lanes] = {}, sum_a[lanes] = {}, sum_g[lanes] = {};
  CO_EACH_LANE {
    largest[l] = to_compute(raw[l]);
    a_at[l] = to_compute(along[l]);
    g_at[l] = to_compute(grad_x[l]);
  }
  for (int64_t k = 1; k < length; ++k) {
    const Storage *r = raw + k * stride, *a = along + k * stride, *g = grad_x + k * stride;
    CO_EACH_LANE {
      const T here = to_compute(r[l]), a_here = to_compute(a[l]), g_here = to_compute(g[l]);
      const bool larger = here > largest[l];
      a_at[l] = larger ? a_here : a_at[l];
      g_at[l] = larger ? g_here : g_at[l];
      largest[l] = larger ? here : largest[l];
    }
  }
  Storage* weights = for_raw ? for_raw : for_g;  // the result that is written last
  for (int64_t start = 0; start < length; start += sum_block) {
    T part[lanes] = {}, part_a[lanes] = {}, part_g[lanes] = {};
    for (int64_t k = start; k < std::min(length, start + sum_block); ++k) {
      const Storage *r = raw + k * stride, *a = along + k * stride, *g = grad_x + k * stride;
      Storage* kept = weights + k * stride;
      CO_EACH_LANE {
        const T weight = keep_weight(r[l], largest[l], kept[l]);
        part[l] += weight;
        part_a[l] += weight * (to_compute(a[l]) - a_at[l]);
        part_g[l] += weight * (to_compute(g[l]) - g_at[l]);
      }
    }
    CO_EACH_LANE {
      sum[l] += part[l];
      sum_a[l] += part_a[l];
      sum_g[l] += part_g[l];
    }
  }
  T inverse[lanes], mean_a[lanes], mean_g[lanes];
  CO_EACH_LANE {
    inverse[l] = T(1) / sum[l];
    mean_a[l] = sum_a[l] * inverse[l];
    mean_g[l] = sum_g[l] * inverse[l];
  }
  if (for_g) {
    for (int64_t k = 0; k < length; ++k) {
      const Storage *r = raw + k * stride, *a = along + k * stride, *kept = weights + k * stride;
      Storage* to = for_g + k * stride;
      CO_EACH_LANE to[l] = to_storage<Storage>(
          softmax_backward(kept_weight(r[l], largest[l], kept[l]) * inverse[l], to_compute(a[l]) - a_at[l], mean_a[l]));
    }
  }
  if (!for_raw) return;
  T covariance[lanes] = {};
  for (int64_t start = 0; start < length; start += sum_block) {
    T part[lanes] = {};
    for (int64_t k = start; k < std::min(length, start + sum_block); ++k) {
      const Storage *r = raw + k * stride, *a = along + k * stride, *g = grad_x + k * stride;
      const Storage* kept = weights + k * stride;
      CO_EACH_LANE part[l] +=
          kept_weight(r[l], largest[l], kept[l]) * inverse[l] *
          softmax_covariance(to_compute(a[l]) - a_at[l], mean_a[l], to_compute(g[l]) - g_at[l], mean_g[l]);
    }
    CO_EACH_LANE covariance[l] += part[l];
  }
  for (int64_t k = 0; k < length; ++k) {
    const Storage *r = raw + k * stride, *a = along + k * stride, *g = grad_x + k * stride;
    Storage* to = for_raw + k * stride;
    CO_EACH_LANE to[l] = to_storage<Storage>(softmax_backward(
        kept_weight(r[l], largest[l], to[l]) * inverse[l],
        softmax_covariance(to_compute(a[l]) - a_at[l], mean_a[l], to_compute(g[l]) - g_at[l], mean_g[l]),
        covariance[l]));
  }
}

#undef CO_EACH_LANE

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
