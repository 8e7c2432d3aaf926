// Softmax of neighbouring rows: lanes are rows that lie side by side in memory, and a step takes all of them one
// element further. The number of lanes is a constant of several vectors, independent work for the compiler to
// interleave. Steps a power of two apart in memory share few sets of every cache: operands are read once, into tiles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../math/simplex.h"
#include "../../math/storage.h"
#include "../loops.h"
#include "simplex_rows.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// One number of each lane.
template <typename T, int lanes, int vector = std::min(vector_lanes<T>, lanes)>
using Lanes = Block<T, vector, lanes / vector, 1, vector>;

template <int64_t lanes, typename Body>
CO_HD void each_lane(const Body& body) {
  if constexpr (lanes == fewest_lanes) {
#pragma GCC unroll 1  // unrolled it would not become vectors
#pragma GCC ivdep
    for (int64_t l = 0; l < lanes; ++l) body(l);
  } else {
#pragma GCC ivdep
    for (int64_t l = 0; l < lanes; ++l) body(l);
  }
}

// An operand: first() reads a number, again() does once more, from the tile if there is one.
template <int64_t lanes, bool tiled, typename Storage, typename T>
struct Column {
  const Storage* memory;
  int64_t stride;
  T* tile;  // [length, lanes]

  CO_HD T first(int64_t k, int64_t l) const {
    const T number = to_compute(memory[k * stride + l]);
    if constexpr (tiled) tile[k * lanes + l] = number;
    return number;
  }
  CO_HD T again(int64_t k, int64_t l) const {
    if constexpr (tiled)
      return tile[k * lanes + l];
    else
      return to_compute(memory[k * stride + l]);
  }
};

// exp(raw - largest), as RowWeights: `kept` in a tile, or in the result that is written last where no tile is and the
// result can hold it. The tile may be that of raw.
template <typename Storage, typename T, bool tiled, bool given = false>
constexpr Weights column_weights = given                                 ? Weights::given
                                   : tiled || std::is_same_v<Storage, T> ? Weights::kept
                                                                         : Weights::computed_again;

template <int64_t lanes, bool tiled, bool given, typename Storage, typename T>
struct ColumnWeights {
  static constexpr Weights weights = column_weights<Storage, T, tiled, given>;
  Column<lanes, tiled, Storage, T> raw;
  T* kept = nullptr;
  int64_t apart = 0;
  Lanes<T, lanes> largest;

  ColumnWeights(int64_t length, const Column<lanes, tiled, Storage, T>& raw, T* tile, Storage* result) : raw(raw) {
    if constexpr (weights == Weights::kept) {
      if constexpr (tiled)
        kept = tile;
      else
        kept = result;
      apart = tiled ? lanes : raw.stride;
    }
    if constexpr (!given) {
      each_lane<lanes>([&](int64_t l) CO_INLINE { largest[l] = raw.first(0, l); });
      for (int64_t k = 1; k < length; ++k)
        each_lane<lanes>([&](int64_t l) CO_INLINE {
          const T here = raw.first(k, l);
          largest[l] = here > largest[l] ? here : largest[l];
        });
    }
  }

  CO_HD T first(int64_t k, int64_t l) const {
    if constexpr (given) return raw.first(k, l);
    const T weight = softmax_lifted_weight(raw.again(k, l), largest[l]);
    if constexpr (weights == Weights::kept) kept[k * apart + l] = weight;
    return weight;
  }
  CO_HD T again(int64_t k, int64_t l) const {
    if constexpr (given) return raw.again(k, l);
    if constexpr (weights == Weights::kept)
      return kept[k * apart + l];
    else
      return softmax_lifted_weight(raw.again(k, l), largest[l]);
  }
};

// Sums over k of what body(k, l, values) puts into `n` values, block by block.
template <int64_t lanes, int n, typename T, typename Body>
CO_HD void add_lanes(int64_t length, Lanes<T, lanes> (&totals)[n], const Body& body) {
  for (int i = 0; i < n; ++i) totals[i].clear();
  for (int64_t start = 0; start < length; start += sum_block) {
    Lanes<T, lanes> sums[n];
    for (int i = 0; i < n; ++i) sums[i].clear();
    for (int64_t k = start; k < std::min(length, start + sum_block); ++k)
      each_lane<lanes>([&](int64_t l) CO_INLINE {
        T values[n];
        body(k, l, values);
        for (int i = 0; i < n; ++i) sums[i][l] += values[i];
      });
    for (int i = 0; i < n; ++i) each_lane<lanes>([&](int64_t l) CO_INLINE { totals[i][l] += sums[i][l]; });
  }
}

// `smallest`: the smallest positive number of the tensor's dtype, which a tile's type does not tell.
template <int64_t lanes, bool tiled, typename Storage, typename T>
[[gnu::noinline]] void columns_forward(int64_t length, int64_t stride, T smallest, const Storage* const* in,
                                       Storage* const* out, T* const* tiles) {
  Storage* const x = out[0];
  const Column<lanes, tiled, Storage, T> raw{in[0], stride, tiles[0]};
  const ColumnWeights<lanes, tiled, false, Storage, T> weight(length, raw, tiles[1], x);
  Lanes<T, lanes> total[1], inverse;
  add_lanes<lanes>(length, total, [&](int64_t k, int64_t l, T* values) CO_INLINE { values[0] = weight.first(k, l); });
  each_lane<lanes>([&](int64_t l) CO_INLINE { inverse[l] = T(1) / total[0][l]; });
  for (int64_t k = 0; k < length; ++k)
    each_lane<lanes>([&](int64_t l) CO_INLINE {
      x[k * stride + l] = to_storage<Storage>(softmax_value(raw.again(k, l), weight.again(k, l), inverse[l], smallest));
    });
}

// Means in two steps, as in rows_backward. given: raw holds x, its own weight, and that sums to 1.
template <int64_t lanes, bool tiled, bool given, typename Storage, typename T>
[[gnu::noinline]] void columns_backward(int64_t length, int64_t stride, T, const Storage* const* in,
                                        Storage* const* out, T* const* tiles) {
  Storage* const grad_raw = out[0];
  const Column<lanes, tiled, Storage, T> raw{in[0], stride, tiles[0]}, g{in[1], stride, tiles[1]};
  const ColumnWeights<lanes, tiled, given, Storage, T> weight(length, raw, tiles[0], grad_raw);
  Lanes<T, lanes> first, inverse, rest[1];
  each_lane<lanes>([&](int64_t l) CO_INLINE { first[l] = to_compute(in[1][l]); });
  if constexpr (given) {
    Lanes<T, lanes> total[1];
    add_lanes<lanes>(length, total, [&](int64_t k, int64_t l, T* values) CO_INLINE {
      values[0] = weight.first(k, l) * (g.first(k, l) - first[l]);
    });
    each_lane<lanes>([&](int64_t l) CO_INLINE {
      inverse[l] = 1;
      first[l] += total[0][l];
    });
  } else {
    Lanes<T, lanes> total[2];
    add_lanes<lanes>(length, total, [&](int64_t k, int64_t l, T* values) CO_INLINE {
      values[0] = weight.first(k, l);
      values[1] = values[0] * (g.first(k, l) - first[l]);
    });
    each_lane<lanes>([&](int64_t l) CO_INLINE {
      inverse[l] = T(1) / total[0][l];
      first[l] += total[1][l] * inverse[l];
    });
  }
  add_lanes<lanes>(length, rest, [&](int64_t k, int64_t l, T* values) CO_INLINE {
    values[0] = weight.again(k, l) * (g.again(k, l) - first[l]);
  });
  each_lane<lanes>([&](int64_t l) CO_INLINE { rest[0][l] *= inverse[l]; });
  for (int64_t k = 0; k < length; ++k)
    each_lane<lanes>([&](int64_t l) CO_INLINE {
      grad_raw[k * stride + l] =
          to_storage<Storage>(softmax_backward(weight.again(k, l) * inverse[l], g.again(k, l) - first[l], rest[0][l]));
    });
}

// Either result may be null.
template <int64_t lanes, bool tiled, typename Storage, typename T>
[[gnu::noinline]] void columns_double_backward(int64_t length, int64_t stride, T, const Storage* const* in,
                                               Storage* const* out, T* const* tiles) {
  Storage *const for_g = out[0], *const for_raw = out[1];
  using Operand = Column<lanes, tiled, Storage, T>;
  const Operand raw{in[0], stride, tiles[0]}, a{in[1], stride, tiles[1]}, g{in[2], stride, tiles[2]};
  const ColumnWeights<lanes, tiled, false, Storage, T> weight(length, raw, tiles[0], for_raw ? for_raw : for_g);
  Lanes<T, lanes> a_first, g_first, inverse, total[3], rest[2], covariance[1];
  each_lane<lanes>([&](int64_t l) CO_INLINE {
    a_first[l] = to_compute(in[1][l]);
    g_first[l] = to_compute(in[2][l]);
  });
  add_lanes<lanes>(length, total, [&](int64_t k, int64_t l, T* values) CO_INLINE {
    values[0] = weight.first(k, l);
    values[1] = values[0] * (a.first(k, l) - a_first[l]);
    values[2] = values[0] * (g.first(k, l) - g_first[l]);
  });
  each_lane<lanes>([&](int64_t l) CO_INLINE {
    inverse[l] = T(1) / total[0][l];
    a_first[l] += total[1][l] * inverse[l];
    g_first[l] += total[2][l] * inverse[l];
  });
  add_lanes<lanes>(length, rest, [&](int64_t k, int64_t l, T* values) CO_INLINE {
    values[0] = weight.again(k, l) * (a.again(k, l) - a_first[l]);
    values[1] = weight.again(k, l) * (g.again(k, l) - g_first[l]);
  });
  each_lane<lanes>([&](int64_t l) CO_INLINE {
    rest[0][l] *= inverse[l];
    rest[1][l] *= inverse[l];
  });
  if (for_g) {
    for (int64_t k = 0; k < length; ++k)
      each_lane<lanes>([&](int64_t l) CO_INLINE {
        for_g[k * stride + l] = to_storage<Storage>(
            softmax_backward(weight.again(k, l) * inverse[l], a.again(k, l) - a_first[l], rest[0][l]));
      });
  }
  if (!for_raw) return;
  const auto product = [&](int64_t k, int64_t l) CO_INLINE {
    return softmax_covariance(a.again(k, l) - a_first[l], rest[0][l], g.again(k, l) - g_first[l], rest[1][l]);
  };
  add_lanes<lanes>(length, covariance,
                   [&](int64_t k, int64_t l, T* values) CO_INLINE { values[0] = weight.again(k, l) * product(k, l); });
  each_lane<lanes>([&](int64_t l) CO_INLINE { covariance[0][l] *= inverse[l]; });
  for (int64_t k = 0; k < length; ++k)
    each_lane<lanes>([&](int64_t l) CO_INLINE {
      for_raw[k * stride + l] =
          to_storage<Storage>(softmax_backward(weight.again(k, l) * inverse[l], product(k, l), covariance[0][l]));
    });
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
