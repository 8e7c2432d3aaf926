// The projection onto the simplex, a vector of numbers at a step. Lanes are rows that lie side by side, or neighbours
// of one row; which of the two makes a difference only to what is summed or compared along the row.
#pragma once

#include <algorithm>
#include <cstring>

#include "../../math/projection.h"
#include "../../math/storage.h"
#include "../loops.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: of functions that are inlined, all of them

#define CO_INLINE __attribute__((always_inline))

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int lanes_of = 64 / sizeof(T);

// The first n numbers from p on, `fill` after them.
template <typename T, typename Storage>
CO_HD Vector<T> load(const Storage* p, int n, T fill) {
  T values[lanes_of<T>];
  if (n == lanes_of<T>) {
    for (int l = 0; l < lanes_of<T>; ++l) values[l] = to_compute(p[l]);
  } else {
    for (int l = 0; l < lanes_of<T>; ++l) values[l] = l < n ? T(to_compute(p[l])) : fill;
  }
  Vector<T> v;
  std::memcpy(&v, values, sizeof(v));
  return v;
}

template <typename T, typename Storage>
CO_HD void store(Storage* p, int n, Vector<T> v) {
  T values[lanes_of<T>];
  std::memcpy(values, &v, sizeof(v));
  if (n == lanes_of<T>) {
    for (int l = 0; l < lanes_of<T>; ++l) p[l] = to_storage<Storage>(values[l]);
  } else {
    for (int l = 0; l < n; ++l) p[l] = to_storage<Storage>(values[l]);
  }
}

constexpr int64_t block_steps = 16;  // steps are added up in T, blocks of them in double

// `count` steps, `stride` numbers apart, of `lanes` numbers each; the last of `last_lanes`.
struct Steps {
  bool along_row;
  int64_t count, stride;
  int lanes, last_lanes;

  template <typename T>
  static Steps along(int64_t length) {
    const int64_t count = (length + lanes_of<T> - 1) / lanes_of<T>;
    return {true, count, lanes_of<T>, lanes_of<T>, static_cast<int>(length - (count - 1) * lanes_of<T>)};
  }
  static Steps side_by_side(int64_t length, int64_t stride, int lanes) { return {false, length, stride, lanes, lanes}; }
};

// body(step, lanes) for the steps of a block; the number of lanes is a constant where it is the usual one.
template <typename T, typename Body>
CO_HD void for_block(const Steps& steps, int64_t block, const Body& body) {
  const int64_t start = block * block_steps, end = std::min(start + block_steps, steps.count);
  const bool whole = steps.lanes == lanes_of<T>;
  const int64_t whole_end = whole && (end < steps.count || steps.last_lanes == lanes_of<T>) ? end : end - 1;
  if (whole)
    for (int64_t k = start; k < whole_end; ++k) body(k, lanes_of<T>);
  else
    for (int64_t k = start; k < whole_end; ++k) body(k, steps.lanes);
  if (whole_end < end) body(whole_end, end < steps.count ? steps.lanes : steps.last_lanes);
}

CO_HD int64_t blocks_of(const Steps& steps) { return (steps.count + block_steps - 1) / block_steps; }

// Sums along the rows, each lane getting that of its row: body(step, lanes, sums) adds to n of them. A block that
// skip(block) is true of adds nothing.
template <typename T, int n, typename Skip, typename Body>
CO_HD void add_up(const Steps& steps, Vector<T> (&sums)[n], const Skip& skip, const Body& body) {
  for (int i = 0; i < n; ++i) sums[i] = Vector<T>{};
  if (!steps.along_row && steps.count <= block_steps)
    return for_block<T>(steps, 0, [&](int64_t k, int lanes) CO_INLINE { body(k, lanes, sums); });
  double total[n][lanes_of<T>] = {};
  for (int64_t block = 0; block < blocks_of(steps); ++block) {
    if (skip(block)) continue;
    Vector<T> part[n] = {};
    for_block<T>(steps, block, [&](int64_t k, int lanes) CO_INLINE { body(k, lanes, part); });
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < lanes_of<T>; ++l) total[i][l] += part[i][l];
  }
  for (int i = 0; i < n; ++i) {
    double all = 0;
    for (int l = 0; l < lanes_of<T>; ++l) all += total[i][l];
    for (int l = 0; l < lanes_of<T>; ++l) sums[i][l] = T(steps.along_row ? all : total[i][l]);
  }
}

template <typename T>
CO_HD T largest_lane(Vector<T> v) {
  T values[lanes_of<T>];
  std::memcpy(values, &v, sizeof(v));
  for (int half = lanes_of<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) values[l] = larger_or_nan(values[l], values[l + half]);
  return values[0];
}

// x[, weight] -> y. `tops`: room for a number for each block, or null; blocks that are all below lambda are then
// passed.
template <bool weighted, typename T, typename Storage>
[[gnu::noinline]] void project(const Steps& steps, const Storage* x, const Storage* weight, Storage* y, T total,
                               T* tops) {
  using V = Vector<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const V none = V{} - infinity, one = V{} + T(1);
  const auto read = [&](int64_t k, int lanes, V& x_k, V& u_k) CO_INLINE {
    x_k = load<T>(x + k * steps.stride, lanes, -infinity);
    u_k = weighted ? load<T>(weight + k * steps.stride, lanes, T(1)) : one;
    return projection_bound<weighted>(x_k, u_k, total);
  };

  V bound = none;
  for (int64_t block = 0; block < blocks_of(steps); ++block) {
    V top = none;
    for_block<T>(steps, block, [&](int64_t k, int lanes) CO_INLINE {
      V x_k, u_k;
      top = larger_or_nan(top, read(k, lanes, x_k, u_k));
    });
    if (tops) tops[block] = largest_lane<T>(top);
    bound = larger_or_nan(bound, top);
  }
  if (steps.along_row) bound = V{} + largest_lane<T>(bound);

  auto at = Ascent<V>::template from<weighted>(bound, total);
  const auto rest_of = [&](int64_t k, int lanes, V& u_k) CO_INLINE {
    V x_k;
    read(k, lanes, x_k, u_k);
    return projection_rest<weighted>(projection_anchored<weighted>(x_k, u_k, at.anchor), u_k, at.high, at.low);
  };
  const auto below = [&](int64_t block) CO_INLINE {
    return tops != nullptr && projection_rest<false>(tops[block] - at.anchor[0], T(1), at.high[0], at.low[0]) <= T(0);
  };
  do {
    V sums[2];
    add_up<T>(steps, sums, below, [&](int64_t k, int lanes, V(&to)[2]) CO_INLINE {
      V u_k;
      const V rest = rest_of(k, lanes, u_k);
      to[0] += rest > T(0) ? rest : V{};
      to[1] += rest > T(0) ? u_k : V{};
    });
    at.step(sums[0], sums[1], total);
  } while (largest_lane<T>(at.left) > T(0));

  for (int64_t block = 0; block < blocks_of(steps); ++block) {
    if (below(block))
      for_block<T>(steps, block, [&](int64_t k, int lanes) CO_INLINE { store<T>(y + k * steps.stride, lanes, V{}); });
    else
      for_block<T>(steps, block, [&](int64_t k, int lanes) CO_INLINE {
        V u_k;
        store<T>(y + k * steps.stride, lanes, projection_value(rest_of(k, lanes, u_k)));
      });
  }
}

// grad_y, y[, weight[, x]] -> grad_x[, grad_weight], of which one may be null if there are two.
template <bool weighted, bool to_weight, typename T, typename Storage>
[[gnu::noinline]] void project_backward(const Steps& steps, const Storage* grad_y, const Storage* y,
                                        const Storage* weight, const Storage* x, Storage* grad_x,
                                        Storage* grad_weight) {
  using V = Vector<T>;
  const V one = V{} + T(1);
  const auto read = [&](int64_t k, int lanes, V& g_k, V& u_k) CO_INLINE {
    const int64_t i = k * steps.stride;
    const auto inside = projection_supports(load<T>(y + i, lanes, T(0)));
    g_k = inside ? load<T>(grad_y + i, lanes, T(0)) : V{};
    u_k = inside ? (weighted ? T(1) / load<T>(weight + i, lanes, T(1)) : one) : V{};
    return inside;
  };
  V sums[2 + to_weight];
  add_up<T>(
      steps, sums, [](int64_t) { return false; },
      [&](int64_t k, int lanes, V(&to)[2 + to_weight]) CO_INLINE {
        V g_k, u_k;
        const auto inside = read(k, lanes, g_k, u_k);
        to[0] += g_k * u_k;
        to[1] += u_k;
        if constexpr (to_weight) {
          const int64_t i = k * steps.stride;
          to[2] += inside ? load<T>(x + i, lanes, T(0)) - load<T>(y + i, lanes, T(0)) : V{};
        }
      });
  const V mean = sums[0] / sums[1], multiplier = sums[1 + to_weight] / sums[1];
  for (int64_t block = 0; block < blocks_of(steps); ++block) {
    for_block<T>(steps, block, [&](int64_t k, int lanes) CO_INLINE {
      V g_k, u_k;
      const auto inside = read(k, lanes, g_k, u_k);
      const V grad = inside ? projection_grad_x(g_k, mean) : V{};
      if (!to_weight || grad_x) store<T>(grad_x + k * steps.stride, lanes, grad);
      if (to_weight) store<T>(grad_weight + k * steps.stride, lanes, projection_grad_weight(grad, u_k, multiplier));
    });
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
