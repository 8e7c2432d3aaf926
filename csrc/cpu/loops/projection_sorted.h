// The projection of short rows, as the columns of a tile, where every lane is a row of its own: the largest elements
// are sorted, by comparisons that are the same for all lanes, and lambda follows from their sums.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <array>
#include <utility>

#include "projection_steps.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <Weight W>
constexpr int most_sorted = weighted<W> ? 8 : 16;  // elements of a row
constexpr int64_t sorted_block = 8;                // of longer rows

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

// An instruction each, which the compiler does not find in vectors of AVX-512.
template <typename V>
CO_HD V larger_of(V a, V b) {
  return b > a ? b : a;
}
template <typename V>
CO_HD V smaller_of(V a, V b) {
  return b > a ? a : b;
}
#if defined(__AVX512F__)
CO_HD Vector<float> larger_of(Vector<float> a, Vector<float> b) { return Vector<float>(_mm512_max_ps(b, a)); }
CO_HD Vector<float> smaller_of(Vector<float> a, Vector<float> b) { return Vector<float>(_mm512_min_ps(a, b)); }
#endif

// A NaN changes places, or stays.
template <typename V>
CO_HD void put_larger_first(V& a, V& b) {
  const V larger = larger_of(a, b), smaller = smaller_of(a, b);
  a = larger;
  b = smaller;
}

template <typename V, int n, size_t... pair>
CO_HD void sort_falling(V (&z)[n], std::index_sequence<pair...>) {
  (put_larger_first(z[SortingNetwork<n>::pairs[pair].first], z[SortingNetwork<n>::pairs[pair].second]), ...);
}
template <typename V, int n>
CO_HD void sort_falling(V (&z)[n]) {
  sort_falling(z, std::make_index_sequence<SortingNetwork<n>::size>());
}

// z becomes the larger half of it and `other`, both falling.
template <typename V, int n>
CO_HD void merge_larger(V (&z)[n], const V (&other)[n]) {
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) z[k] = larger_of(z[k], other[n - 1 - k]);
#pragma GCC unroll 8
  for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k)
      if (!(k & half)) put_larger_first(z[k], z[k + half]);
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

// A step of Newton's, which takes what the rounding of sums left between a root and lambda: rest(k) is x_k less what is
// near lambda, u(k) what it falls by with lambda.
template <int n, typename V, typename T, typename Rest, typename U>
CO_HD V root_correction(T total, const Rest& rest, const U& u) {
  V excess = V{} - total, lost = {}, slope = {};
#pragma GCC unroll 8
  for (int k = 0; k < n; k += 2) {
    const V a = rest(k), b = rest(k + 1);
    slope += (a > V{} ? u(k) : V{}) + (b > V{} ? u(k + 1) : V{});
    V rounding;
    excess = two_sum(excess, projection_value(a) + projection_value(b), rounding);
    lost += rounding;
  }
  return (excess + lost) / slope;
}

template <typename T>
constexpr T padding = -std::numeric_limits<T>::infinity();  // never of the support

// Rows of `length` <= n, padded to n; stay so.
template <int n, typename T>
[[gnu::noinline]] void project_sorted(int64_t length, T* tile, T total) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  for (T* column = tile; column < tile + lanes; column += width<T>) {
    V x[n];
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) x[k] = load(column + k * lanes);
    sort_falling(x);
    const V top = x[0], high = root_of_largest(x, top, total);
    const auto rest = [=](int k) CO_INLINE {
      const V rest_k = (load(column + k * lanes) - top) - high;
      store(column + k * lanes, rest_k);
      return rest_k;
    };
    const V low = root_correction<n, V>(total, rest, [](int) CO_INLINE { return V{} + T(1); });
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k)
      store(column + k * lanes, k < length ? projection_value(load(column + k * lanes) - low) : V{} + padding<T>);
  }
}

// Rows whose numbers are so much larger than total that one correction does not reach lambda, or left no support, go on
// from what is left of them, step by step: y takes its place. The others stay.
template <int n, Weight W, typename T, typename Mask>
[[gnu::noinline]] void climb_from(T* rest, const T* weight, T total, Mask rows) {
  constexpr int64_t lanes = RowUnits::lanes;
  T numbers[n * group<T>], weights[n * group<T>];
  for (int k = 0; k < n; ++k) {
    for (int v = 0; v < group<T>; v += width<T>) {
      store(numbers + k * group<T> + v, load(rest + k * lanes));
      store(weights + k * group<T> + v, load(weight + k * lanes));
    }
  }
  ProjectionScratch scratch(n);
  project<W, false>(n, group<T>, numbers, weights, numbers, total, scratch.live());
  for (int k = 0; k < n; ++k) store(rest + k * lanes, rows ? load(numbers + k * group<T>) : load(rest + k * lanes));
}

// An element of a row with weights, ordered by c = z / u.
template <typename V>
struct WeightedElement {
  V z, u, c;
};

template <typename V>
CO_HD void put_larger_first(WeightedElement<V>& a, WeightedElement<V>& b) {
  const auto swap = b.c > a.c;
  const WeightedElement<V> first = {swap ? b.z : a.z, swap ? b.u : a.u, swap ? b.c : a.c};
  b = {swap ? a.z : b.z, swap ? a.u : b.u, swap ? a.c : b.c};
  a = first;
}

// The same with weights, which are padded with 1.
template <int n, Weight W, typename T>
[[gnu::noinline]] void project_sorted(int64_t length, T* tile, const T* weight, T total) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  for (int64_t lane = 0; lane < lanes; lane += width<T>) {
    T* const column = tile + lane;
    WeightedElement<V> x[n];
    V u[n], bound = V{} + padding<T>;
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      x[k].z = load(column + k * lanes);
      u[k] = load(weight + lane + k * lanes);
      x[k].c = W == Weight::inverse ? T(1) / u[k] : u[k];
      bound = larger(bound, lower_bound<W>(x[k].z, u[k], total));
    }
    const V anchor = Ascent<V>::template from<true>(bound, total).anchor;
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      x[k].z = projection_anchored<true>(x[k].z, u[k], anchor);
      x[k].u = u[k];
      x[k].c *= x[k].z;
      store(column + k * lanes, x[k].z);
    }
    sort_falling(x);
    V sum = x[0].z - total, slope = x[0].u, high = sum / slope;
#pragma GCC unroll 8
    for (int k = 1; k < n; ++k) {
      sum += x[k].z;
      slope += x[k].u;
      const V of_k = sum / slope;
      high = larger_of(high, of_k);
    }
    const auto rest = [=](int k) CO_INLINE {
      const V rest_k = load(column + k * lanes) - high * u[k];
      store(column + k * lanes, rest_k);
      return rest_k;
    };
    V low = root_correction<n, V>(total, rest, [=](int k) CO_INLINE { return u[k]; });
    const V moved = (low < V{} ? -low : low) * slope;
    if (const auto off = ~(moved <= 8 * total) & (high == high); any(off)) {
      climb_from<n, W>(column, weight + lane, total, off);
      low = off ? V{} : low;
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k)
      store(column + k * lanes,
            k < length ? projection_value(load(column + k * lanes) - low * u[k]) : V{} + padding<T>);
  }
}

// Longer rows, padded to whole blocks. Few rows have a support that is not among the largest of them; those climb on.
template <typename T>
[[gnu::noinline]] void project_largest(int64_t length, T* tile, T total, ProjectionScratch& scratch) {
  using V = Vector<T>;
  constexpr int64_t lanes = RowUnits::lanes;
  for (T* columns = tile; columns < tile + lanes; columns += group<T>) {
    Ascent<V> at[2];
    for (int v = 0; v < 2; ++v) {
      const auto read = [=](int64_t block, V(&x)[sorted_block]) CO_INLINE {
#pragma GCC unroll 8
        for (int k = 0; k < sorted_block; ++k) x[k] = load(columns + v * width<T> + (block + k) * lanes);
        sort_falling(x);
      };
      V x[sorted_block], more[sorted_block];
      read(0, x);
      for (int64_t block = sorted_block; block < length; block += sorted_block) {
        read(block, more);
        merge_larger(x, more);
      }
      const V top = x[0], high = root_of_largest(x, top, total);
      const V low = root_correction<sorted_block, V>(
          total, [=](int k) CO_INLINE { return (x[k] - top) - high; }, [](int) CO_INLINE { return V{} + T(1); });
      const auto beyond = x[sorted_block - 1] - top > high;
      at[v] = {top, high, low, V{} + std::numeric_limits<T>::infinity(), beyond ? V{} + T(most_readings) : V{}};
    }
    if (any(at[0].left > V{}) || any(at[1].left > V{})) {
      const T* const x = columns;
      ProjectionBlocks<false, T> blocks(length, lanes, {x, x}, {nullptr}, {});
      ascend<Weight::none, false>(blocks, total, scratch.live(), at);
    }
    V sum[2] = {};
    const auto each = [=](const auto& change) CO_INLINE {
      for (int64_t k = 0; k < length; ++k)
        for (int v = 0; v < 2; ++v) change(columns + k * lanes + v * width<T>, v);
    };
    each([&](T* p, int v) CO_INLINE {
      V u = V{} + T(1);
      const V y = projection_value(rest_at<Weight::none>(at[v], total, load(p), u));
      store(p, y);
      sum[v] += y;
    });
    if (any(sum[0] != sum[0]) || any(sum[1] != sum[1]))  // a NaN, lost where only larger ones were kept
      each([&](T* p, int v) CO_INLINE { store(p, sum[v] == sum[v] ? load(p) : sum[v]); });
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
