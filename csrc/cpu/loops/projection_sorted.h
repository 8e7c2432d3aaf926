// The projection of short rows, as the columns of a tile, where every lane is a row of its own: the largest elements
// are sorted, by comparisons that are the same for all lanes, and lambda follows from their sums.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "projection_steps.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t sorted_block = 8;  // elements of a row

// Batcher's odd-even merge sort of n numbers, as pairs to compare.
template <int n>
class SortingNetwork {
  template <typename Visit>
  static constexpr void for_each(Visit visit) {
    for (int p = 1; p < n; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < n; j += 2 * k)
          for (int i = j; i < j + k && i + k < n; ++i)
            if (i / (2 * p) == (i + k) / (2 * p)) visit(i, i + k);
  }

 public:
  static constexpr int size = [] {
    int count = 0;
    for_each([&](int, int) { ++count; });
    return count;
  }();
  static constexpr auto pairs = [] {
    std::array<std::pair<int, int>, size> result{};
    int count = 0;
    for_each([&](int a, int b) { result[count++] = {a, b}; });
    return result;
  }();
};

// A NaN changes places, or stays.
template <typename V>
CO_HD void put_larger_first(V& a, V& b) {
  const V larger = larger_of(a, b), smaller = smaller_of(a, b);
  a = larger;
  b = smaller;
}

// Rows of n elements each, in turns.
template <typename E, int count, int n, size_t... pair>
CO_HD void sort_falling(E (&z)[count][n], std::index_sequence<pair...>) {
  [[maybe_unused]] const auto compare = [&](std::pair<int, int> at) CO_INLINE {  // n of 1 has nothing to compare
#pragma GCC unroll 8
    for (int v = 0; v < count; ++v) put_larger_first(z[v][at.first], z[v][at.second]);
  };
  (compare(SortingNetwork<n>::pairs[pair]), ...);
}
template <typename E, int count, int n>
CO_HD void sort_falling(E (&z)[count][n]) {
  sort_falling(z, std::make_index_sequence<SortingNetwork<n>::size>());
}

// The largest of n vectors, by halves: no comparison waits for more than log2 n others.
template <int n, typename V>
CO_HD V largest_of(const V* z) {
  if constexpr (n == 1)
    return z[0];
  else
    return larger_of(largest_of<n / 2>(z), largest_of<n / 2>(z + n / 2));
}

// Sorts numbers that first fall and then rise, or the other way round, into falling order.
template <typename V, int n>
CO_HD void sort_turning(V (&z)[n]) {
#pragma GCC unroll 8
  for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k)
      if (!(k & half)) put_larger_first(z[k], z[k + half]);
}

// z becomes the larger half of it and `other`, both falling. The smaller half is left in `other`, for sort_turning(). A
// NaN stays where it is, in z or in `other`.
template <typename V, int n>
CO_HD void take_larger(V (&z)[n], V (&other)[n]) {
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) put_larger_first(z[k], other[n - 1 - k]);
  sort_turning(z);
}

// lambda, less `top`, if the support is among these elements, largest first: the largest that any number of largest
// ones alone would have. Else a lower bound of it, both to rounding.
template <typename V, int n, typename T>
CO_HD V root_of_largest(const V (&x)[n], V top, T total) {
  V sum = V{} - total, root = sum;
#pragma GCC unroll 16
  for (int k = 1; k < n; ++k) {
    sum += x[k] - top;
    const V of_k = sum * T(1.0 / (k + 1));
    root = larger_of(root, of_k);
  }
  return (sum == sum) & (top - top == T(0)) ? root : V{} + std::numeric_limits<T>::quiet_NaN();
}

// A step of Newton's, which takes what the rounding of sums left between a root and lambda: rest is x less what is near
// lambda, u what it falls by with lambda. The sums of up to eight are the same where neighbours, pairs or fours of them
// have changed places.
template <bool weighted, typename V, int n, typename T>
CO_HD V root_correction(T total, const V (&rest)[n], const std::type_identity_t<V>* u) {
  V sum, lost = {}, slope = {}, rounding;
  constexpr int together = std::min(n, 4);
#pragma GCC unroll 4
  for (int start = 0; start < n; start += together) {
    V sums[2] = {}, slopes[2] = {};
#pragma GCC unroll 4
    for (int k = start; k < start + together; ++k) {
      if (k >= n) break;
      const V value = value_of_rest(rest[k]), u_k = rest[k] > V{} ? (weighted ? u[k] : V{} + T(1)) : V{};
      const bool first = k < start + 2;
      sums[k % 2] = first ? value : sums[k % 2] + value;
      slopes[k % 2] = first ? u_k : slopes[k % 2] + u_k;
    }
    sum = start == 0 ? sums[0] + sums[1] : two_sum(sum, sums[0] + sums[1], rounding);
    if (start > 0) lost += rounding;
    slope += slopes[0] + slopes[1];
  }
  const V excess = two_sum(sum, V{} - total, rounding);
  lost += rounding;
  return weighted ? (excess + lost) / slope : (excess + lost) * reciprocal(slope);  // weights may be of any size
}

// The same without weights, of x less `top`.
template <typename V, int n, typename T>
CO_HD V root_correction(T total, const V (&x)[n], V top, V root) {
  V rest[n];
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) rest[k] = (x[k] - top) - root;
  return root_correction<false>(total, rest, nullptr);
}

template <typename T>
constexpr T padding = -std::numeric_limits<T>::infinity();  // never of the support

// lambda of each lane of a tile.
template <typename T>
struct LaneRoots {
  T high[RowUnits::lanes], low[RowUnits::lanes];

  CO_HD void set(int64_t lane, Vector<T> anchor, Vector<T> of_high, Vector<T> of_low) {
    Vector<T> rest;
    store(high + lane, two_sum(anchor, of_high, rest));
    store(low + lane, of_low + rest);
  }

  // y of rows that follow each other, each at least a vector long; elsewhere than x.
  void values(int64_t rows, int64_t length, const T* x, T* y) const {
    const auto vector = [=, this](int64_t row, int64_t k) CO_INLINE {
      const Vector<T> of_high = Vector<T>{} + high[row], of_low = Vector<T>{} + low[row];
      store(y + k, value_of_rest(projection_rest<false>(load(x + k), Vector<T>{}, of_high, of_low)));
    };
    if (length == width<T>) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < rows; ++r) vector(r, r * width<T>);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t end = (r + 1) * length;
      int64_t k = r * length;
      for (; k + width<T> <= end; k += width<T>) vector(r, k);
      if (k < end) vector(r, end - width<T>);
    }
  }
};

// How many vectors of rows to take at a time: what one waits for, another has at hand.
template <int n, bool weighted>
constexpr int vectors_at_once = (weighted ? 2 : 1) * n <= vector_registers / 4 ? 2 : 1;

// Rows of up to n numbers, padded where they are shorter. To `roots` instead of the tile if it is asked for.
template <int n, bool to_roots, typename T>
[[gnu::noinline]] void project_sorted(T* tile, T total, LaneRoots<T>& roots) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  constexpr int count = vectors_at_once<n, false>;
  for (T* columns = tile; columns < tile + lanes; columns += count * width<T>) {
    V x[count][n], top[count], high[count], low[count];
    const auto place = [=](int v, int k) CO_INLINE { return columns + v * width<T> + k * lanes; };
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) x[v][k] = load(place(v, k));
    }
    sort_falling(x);
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
      top[v] = x[v][0];
      high[v] = root_of_largest(x[v], top[v], total);
    }
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) x[v][k] = ((to_roots ? x[v][k] : load(place(v, k))) - top[v]) - high[v];
      low[v] = root_correction<false>(total, x[v], nullptr);
      if (to_roots) roots.set(columns - tile + v * width<T>, top[v], high[v], low[v]);
    }
    if (to_roots) continue;
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) store(place(v, k), value_of_rest(x[v][k] - low[v]));
    }
  }
}

// Rows of up to two blocks, padded where they are shorter. Few have a support that is not among the larger half.
template <bool to_roots, typename T>
[[gnu::noinline]] void project_two_blocks(T* tile, T total, LaneRoots<T>& roots) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  constexpr int n = sorted_block;
  for (T* columns = tile; columns < tile + lanes; columns += width<T>) {
    V x[2][n];
#pragma GCC unroll 16
    for (int k = 0; k < 2 * n; ++k) x[k / n][k % n] = load(columns + k * lanes);
    sort_falling(x);
    auto numbers = x[1][0] == x[1][0];
#pragma GCC unroll 8
    for (int k = 1; k < n; ++k) numbers &= x[1][k] == x[1][k];
    take_larger(x[0], x[1]);
    const V top = x[0][0];
    V high = root_of_largest(x[0], top, total), low;
    const auto beyond = x[0][n - 1] - top > high;
    if (any(beyond)) {
      sort_turning(x[1]);
      V all[2 * n];
#pragma GCC unroll 16
      for (int k = 0; k < 2 * n; ++k) all[k] = x[k / n][k % n];
      high = beyond ? root_of_largest(all, top, total) : high;
      low = root_correction(total, all, top, high);
    } else {
      low = root_correction(total, x[0], top, high);
    }
    low = numbers ? low : V{} + std::numeric_limits<T>::quiet_NaN();
    if (to_roots) {
      roots.set(columns - tile, top, high, low);
      continue;
    }
#pragma GCC unroll 16
    for (int k = 0; k < 2 * n; ++k) {
      T* const p = columns + k * lanes;
      store(p, value_of_rest(projection_rest<false>(load(p) - top, V{}, high, low)));
    }
  }
}

// Rows whose numbers are so much larger than total that one correction does not reach lambda, or left no support, go on
// from what is left of them, step by step: y takes its place. The others stay.
template <typename V, int n, typename T, typename Mask>
[[gnu::noinline]] void climb_from(V (&rest)[n], const T* weight, T total, Mask rows) {
  T numbers[n * group<T>], weights[n * group<T>];
  for (int k = 0; k < n; ++k) {
    for (int v = 0; v < group<T>; v += width<T>) {
      store(numbers + k * group<T> + v, rest[k]);
      store(weights + k * group<T> + v, load(weight + k * RowUnits::lanes));
    }
  }
  ProjectionScratch scratch(n);
  project<true, false>(n, group<T>, numbers, weights, numbers, total, scratch.live());
  for (int k = 0; k < n; ++k) rest[k] = rows ? load(numbers + k * group<T>) : rest[k];
}

// An element of a row with weights, ordered by c = z / u.
template <typename V>
struct WeightedElement {
  V z, u, c;
};

template <typename V>
CO_HD void put_larger_first(WeightedElement<V>& a, WeightedElement<V>& b) {
  const auto swap = b.c > a.c;
  const WeightedElement<V> first = {swap ? b.z : a.z, swap ? b.u : a.u, larger_of(a.c, b.c)};
  b = {swap ? a.z : b.z, swap ? a.u : b.u, smaller_of(a.c, b.c)};
  a = first;
}

// The same with weights, which are padded with 1.
template <int n, typename T>
[[gnu::noinline]] void project_sorted(T* tile, const T* weight, T total) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  constexpr int count = vectors_at_once<n, true>;
  const auto each = [](const auto& body) CO_INLINE {
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) body(v);
  };
  for (int64_t lane = 0; lane < lanes; lane += count * width<T>) {
    V z[count][n], u[count][n], roots[count][n], anchor[count], sum[count], slope[count], high[count], low[count];
    WeightedElement<V> x[count][n];
    const auto at = [=](int v, int k) CO_INLINE { return lane + v * width<T> + k * lanes; };
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      each([&](int v) CO_INLINE {
        z[v][k] = load(tile + at(v, k));
        u[v][k] = load(weight + at(v, k));
        const V d = u[v][k];
        roots[v][k] = projection_bound<true>(z[v][k], u[v][k], total);
        x[v][k] = {z[v][k], u[v][k], d};
      });
    }
    each([&](int v) CO_INLINE { anchor[v] = Ascent<V>::template from<true>(largest_of<n>(roots[v]), total).anchor; });
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      each([&](int v) CO_INLINE {
        z[v][k] = projection_anchored<true>(z[v][k], u[v][k], anchor[v]);
        x[v][k] = {z[v][k], u[v][k], z[v][k] * x[v][k].c};
      });
    }
    sort_falling(x);
    each([&](int v) CO_INLINE { sum[v] = V{} - total, slope[v] = V{}; });
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      each([&](int v) CO_INLINE {
        sum[v] += x[v][k].z;
        slope[v] += x[v][k].u;
        roots[v][k] = sum[v] / slope[v];
      });
    }
    each([&](int v) CO_INLINE { high[v] = largest_of<n>(roots[v]); });
    each([&](int v) CO_INLINE {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) z[v][k] -= high[v] * u[v][k];
      low[v] = root_correction<true>(total, z[v], u[v]);
    });
    const auto off = [&](int v) CO_INLINE {
      const V moved = (low[v] < V{} ? -low[v] : low[v]) * slope[v];
      return ~(moved <= 8 * total) & (high[v] == high[v]);
    };
    if (any(off(0) | off(count - 1))) {
      each([&](int v) CO_INLINE {
        const auto rows = off(v);
        climb_from(z[v], weight + at(v, 0), total, rows);
        low[v] = rows ? V{} : low[v];
      });
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k)
      each([&](int v) CO_INLINE { store(tile + at(v, k), value_of_rest(z[v][k] - low[v] * u[v][k])); });
  }
}

// body(p, v) for the elements of two vectors of rows, which lie at p.
template <typename T, typename Body>
CO_HD void in_group(int64_t length, T* columns, const Body& body) {
  for (int64_t k = 0; k < length; ++k)
    for (int v = 0; v < 2; ++v) body(columns + k * RowUnits::lanes + v * width<T>, v);
}

// lambda of the rows of which something is left, from below it; `sum` is that of x less the anchor. The mean is below
// it too, and near it if most of a row is of the support, as where a step has just left the simplex: two plain steps
// from there mostly leave a single one to be taken exactly.
template <typename T>
[[gnu::noinline]] void ascend_from_mean(int64_t length, const T* columns, T total, const Vector<T> (&sum)[2],
                                        ProjectionScratch& scratch, Ascent<Vector<T>> (&at)[2]) {
  using V = Vector<T>;
  V high[2];
  for (int v = 0; v < 2; ++v) high[v] = larger_of(at[v].high, (sum[v] - total) / T(length));
  for (int step = 0; step < 2; ++step) {
    V excess[2] = {V{} - total, V{} - total}, slope[2] = {};
    in_group(length, columns, [&](const T* p, int v) CO_INLINE {
      const V rest = (load(p) - at[v].anchor) - high[v];
      excess[v] += value_of_rest(rest);
      slope[v] += rest > V{} ? V{} + T(1) : V{};
    });
    for (int v = 0; v < 2; ++v) high[v] += excess[v] * reciprocal(slope[v]);
  }
  for (int v = 0; v < 2; ++v) {
    const auto going = at[v].left > V{};
    at[v].high = going ? high[v] : at[v].high;
    at[v].low = going ? V{} : at[v].low;
  }
  ProjectionBlocks<false, T> blocks(length, RowUnits::lanes, {columns, columns}, {nullptr}, {});
  ascend<false, false>(blocks, total, scratch.live(), at);
}

// Longer rows, padded to whole blocks. Few rows have a support that is not among the largest of them; those climb on.
template <typename T>
[[gnu::noinline]] void project_largest(int64_t length, T* tile, T total, ProjectionScratch& scratch, bool to_roots,
                                       LaneRoots<T>& roots) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  for (T* columns = tile; columns < tile + lanes; columns += group<T>) {
    Ascent<V> at[2];
    for (int v = 0; v < 2; ++v) {
      const auto read = [=](int64_t block, V(&x)[1][sorted_block]) CO_INLINE {
#pragma GCC unroll 8
        for (int k = 0; k < sorted_block; ++k) x[0][k] = load(columns + v * width<T> + (block + k) * lanes);
        sort_falling(x);
      };
      V all[1][sorted_block], more[1][sorted_block];
      read(0, all);
      for (int64_t block = sorted_block; block < length; block += sorted_block) {
        read(block, more);
        take_larger(all[0], more[0]);
      }
      const V(&x)[sorted_block] = all[0];
      const V top = x[0], high = root_of_largest(x, top, total);
      const V low = root_correction(total, x, top, high);
      const auto beyond = x[sorted_block - 1] - top > high;
      at[v] = {top, high, low, V{} + std::numeric_limits<T>::infinity(), beyond ? V{} + T(most_readings) : V{}};
    }
    V sum[2] = {};  // of x less the largest. NaN where an x is, which was lost where only larger ones were kept
    in_group(length, columns, [&](const T* p, int v) CO_INLINE { sum[v] += load(p) - at[v].anchor; });
    if (any(at[0].left > V{}) || any(at[1].left > V{})) ascend_from_mean(length, columns, total, sum, scratch, at);
    for (int v = 0; v < 2; ++v) {
      at[v].low = sum[v] == sum[v] ? at[v].low : sum[v];
      if (to_roots) roots.set(columns - tile + v * width<T>, at[v].anchor, at[v].high, at[v].low);
    }
    if (to_roots) continue;
    in_group(length, columns, [&](T* p, int v) CO_INLINE {
      V u = V{} + T(1);
      store(p, value_of_rest(rest_at<false>(at[v], total, load(p), u)));
    });
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
