// The projection of short rows that follow each other, from end to end in registers: as many vectors as a row has
// numbers become rows in a lane each.
#pragma once

#include "projection_sorted.h"
#include "rows_in_lanes.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int longest_in_lanes = 2 * sorted_block - 1;

// Batches of rows of n numbers, each of so many vectors that one has work where another waits.
template <int n, typename T>
struct LanesProjection {
  static constexpr int count = 16 / n, batch = count * n * width<T>;

  CO_HD static void project(const T* from, T* to, T total) {
    using V = Vector<T>;
    V x[count][n], z[count][n], top[count], high[count];
    const auto each = [](const auto& body) CO_INLINE {
#pragma GCC unroll 16
      for (int v = 0; v < count; ++v) {
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) body(v, k);
      }
    };
    each([&](int v, int k) CO_INLINE { x[v][k] = load(from + (v * n + k) * width<T>); });
#pragma GCC unroll 16
    for (int v = 0; v < count; ++v) RowsInLanes<n>::from_rows(x[v]);
    each([&](int v, int k) CO_INLINE { z[v][k] = x[v][k]; });
    sort_falling(z);
#pragma GCC unroll 16
    for (int v = 0; v < count; ++v) {
      top[v] = z[v][0];
      high[v] = root_of_largest(z[v], top[v], total);
    }
#pragma GCC unroll 16
    for (int v = 0; v < count; ++v) {
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) x[v][k] = (x[v][k] - top[v]) - high[v];
      const V low = root_correction<false>(total, x[v], nullptr);
#pragma GCC unroll 16
      for (int k = 0; k < n; ++k) x[v][k] = value_of_rest(x[v][k] - low);
      RowsInLanes<n>::to_rows(x[v]);
    }
    each([&](int v, int k) CO_INLINE { store(to + (v * n + k) * width<T>, x[v][k]); });
  }
};

// Rows of n numbers, `size` numbers in all.
template <int n, typename T>
[[gnu::noinline]] void project_lanes(const T* x, int64_t size, T total, T* y) {
  using Batch = LanesProjection<n, T>;
  const int64_t whole = size / Batch::batch * Batch::batch;
  for (int64_t i = 0; i < whole; i += Batch::batch) Batch::project(x + i, y + i, total);
  if (whole == size) return;
  T rest[Batch::batch] = {};
  std::copy_n(x + whole, size - whole, rest);
  Batch::project(rest, rest, total);
  std::copy_n(rest, size - whole, y + whole);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
