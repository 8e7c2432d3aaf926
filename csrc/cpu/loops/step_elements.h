// A step element by element: operands come in chunks of the compute type that fit the first-level cache, in place where
// memory has that type, and one vector loop per kind goes over them. Memory is passed once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../math/bounded.h"
#include "../../math/positive.h"
#include "../../math/step.h"
#include "../loops.h"
#include "../step.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t step_chunk = 512;

// A chunk of all operands; those that a kind has no use for are null.
template <typename T>
struct StepChunk {
  const T* grad;
  T* x;    // the parameter; on raw: written only
  T* raw;  // on raw
  T *m, *v, *largest_v;
  const T *lower, *upper;  // by element
};

// Storage tells the innermost neighbours of bounds by element.
template <typename Storage, typename Hook, bool amsgrad, typename T>
[[gnu::noinline]] void step_loop_over(const Adam<T> adam, const Bounds<T> scalars, int64_t n, const T* __restrict grad,
                                      T* __restrict x, T* __restrict raw, T* __restrict m, T* __restrict v,
                                      T* __restrict largest_v, const T* __restrict lower, const T* __restrict upper) {
  const auto element = [&](int64_t i) __attribute__((always_inline)) {
    Bounds<T> bounds = scalars;
    if constexpr (Hook::by_element && Hook::on_raw)
      bounds = bounds_of_element<Storage>(lower[i], upper[i]);
    else if constexpr (Hook::by_element)
      bounds.lower = lower[i], bounds.upper = upper[i];
    Moments<T> moments{m[i], v[i], T(0)};
    if constexpr (amsgrad) moments.largest_v = largest_v[i];
    T y = Hook::on_raw ? raw[i] : x[i];
    x[i] = step_element<Hook, amsgrad>(adam, bounds, grad[i], y, moments);
    if constexpr (Hook::on_raw) raw[i] = y;
    m[i] = moments.m;
    v[i] = moments.v;
    if constexpr (amsgrad) largest_v[i] = moments.largest_v;
  };
  constexpr int stride = 32;  // several vectors of independent work for the compiler to interleave
  int64_t start = 0;
  for (; start + stride <= n; start += stride) {
#pragma GCC ivdep
    for (int64_t i = start; i < start + stride; ++i) element(i);
  }
#pragma GCC ivdep
  for (int64_t i = start; i < n; ++i) element(i);
}

template <typename T>
using StepChunkLoop = void (*)(const Adam<T>& adam, const Bounds<T>& scalars, int64_t n, const StepChunk<T>& at);

template <typename Storage, typename Hook, bool amsgrad, typename T>
void step_chunk_loop(const Adam<T>& adam, const Bounds<T>& scalars, int64_t n, const StepChunk<T>& at) {
  step_loop_over<Storage, Hook, amsgrad>(adam, scalars, n, at.grad, at.x, at.raw, at.m, at.v, at.largest_v, at.lower,
                                         at.upper);
}

template <typename Storage, bool amsgrad>
StepChunkLoop<compute_t<Storage>> pick_hook(StepKind kind, bool finite_bounds) {
  using T = compute_t<Storage>;
  switch (kind) {
    case StepKind::box:
      return step_chunk_loop<T, Projected<false>, amsgrad, T>;
    case StepKind::box_by_element:
      return step_chunk_loop<T, Projected<true>, amsgrad, T>;
    case StepKind::interval:
      return step_chunk_loop<T, OnRaw<Interval, false>, amsgrad, T>;
    case StepKind::lower_only:
      return step_chunk_loop<T, OnRaw<LowerOnly, false>, amsgrad, T>;
    case StepKind::upper_only:
      return step_chunk_loop<T, OnRaw<UpperOnly, false>, amsgrad, T>;
    case StepKind::bounded_by_element:
      return finite_bounds ? step_chunk_loop<Storage, OnRaw<Interval, true>, amsgrad, T>
                           : step_chunk_loop<Storage, OnRaw<ByElement, true>, amsgrad, T>;
    case StepKind::exponential:
      return step_chunk_loop<T, OnRaw<Exponential, false>, amsgrad, T>;
    case StepKind::exponential_by_element:
      return step_chunk_loop<Storage, OnRaw<Exponential, true>, amsgrad, T>;
    default:
      return step_chunk_loop<T, NoConstraint, amsgrad, T>;
  }
}

template <typename Storage>
StepChunkLoop<compute_t<Storage>> pick_step(StepKind kind, bool amsgrad, bool finite_bounds = false) {
  return amsgrad ? pick_hook<Storage, true>(kind, finite_bounds) : pick_hook<Storage, false>(kind, finite_bounds);
}

// n numbers in the compute type: where they lie if that is how they lie, else a copy in `buffer`.
template <typename Stored, typename T>
T* opened(Stored* data, int64_t n, T* buffer, bool read = true) {
  if constexpr (std::is_same_v<std::remove_const_t<Stored>, T>) {
    return const_cast<T*>(data);
  } else {
    if (read && data) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] = to_compute(data[i]);
    }
    return buffer;
  }
}
template <typename Stored, typename T>
void closed(Stored* data, int64_t n, const T* buffer) {
  if constexpr (!std::is_same_v<Stored, T>) {
    if (!data) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) data[i] = to_storage<Stored>(buffer[i]);
  }
}

template <typename T>
bool finite_everywhere(const T* a, const T* b, int64_t n) {
  int finite = 1;
#pragma omp simd reduction(& : finite)
  for (int64_t i = 0; i < n; ++i) finite &= static_cast<int>(is_finite(a[i])) & static_cast<int>(is_finite(b[i]));
  return finite;
}

template <typename Stored>
Stored* advanced(void* data, int64_t by) {
  return data ? static_cast<Stored*>(data) + by : nullptr;
}

template <typename Storage, typename State>
void step_elements(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  constexpr bool converts = !std::is_same_v<Storage, T>;
  const bool each = step_by_element(slot.kind), on_raw = step_on_raw(slot.kind), amsgrad = slot.max_exp_avg_sq;
  const auto adam = numbers.adam.as<T>();
  const auto scalars = bounds_of_scalars<Storage>(slot.lower, slot.upper);
  alignas(64) T buffers[converts ? 5 : 1][step_chunk];
  alignas(64) T lower[step_chunk], upper[step_chunk];
  if (each) {
    std::fill_n(lower, std::min(step_chunk, end - begin), scalars.lower);
    std::fill_n(upper, std::min(step_chunk, end - begin), scalars.upper);
  }
  auto loop = pick_step<Storage>(slot.kind, amsgrad);
  for (int64_t start = begin; start < end; start += step_chunk) {
    const int64_t n = std::min(step_chunk, end - start);
    const Storage* grad = static_cast<const Storage*>(grads) + start;
    Storage* x = static_cast<Storage*>(slot.param) + start;
    State *m = advanced<State>(slot.exp_avg, start), *v = advanced<State>(slot.exp_avg_sq, start),
          *largest_v = advanced<State>(slot.max_exp_avg_sq, start);
    const auto buffer = [&](int i) { return buffers[converts ? i : 0]; };
    const StepChunk<T> at{opened(grad, n, buffer(0)),
                          opened(x, n, buffer(1), !on_raw),
                          advanced<T>(slot.raw, start),
                          opened(m, n, buffer(2)),
                          opened(v, n, buffer(3)),
                          opened(largest_v, n, buffer(4)),
                          slot.lower_each ? static_cast<const T*>(slot.lower_each) + start : lower,
                          slot.upper_each ? static_cast<const T*>(slot.upper_each) + start : upper};
    if (slot.kind == StepKind::bounded_by_element)
      loop = pick_step<Storage>(slot.kind, amsgrad, finite_everywhere(at.lower, at.upper, n));
    loop(adam, scalars, n, at);
    closed(x, n, at.x);
    closed(m, n, at.m);
    closed(v, n, at.v);
    closed(largest_v, n, at.largest_v);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
