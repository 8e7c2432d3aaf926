// Numbers on their way between memory and the compute type. Not inlined: where rows and chunks come and go, each of the
// many loops would have conversions of its own, which take the compiler as long as its formulas.
#pragma once

#include "../../math/storage.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// n numbers, `stride` apart in memory and neighbours in `to`.
template <typename Storage>
[[gnu::noinline]] void read_numbers(const Storage* from, int64_t stride, int64_t n, compute_t<Storage>* to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = to_compute(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = to_compute(from[i * stride]);
  }
}
template <typename Storage>
[[gnu::noinline]] void write_numbers(const compute_t<Storage>* from, int64_t n, Storage* to, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = to_storage<Storage>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * stride] = to_storage<Storage>(from[i]);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
