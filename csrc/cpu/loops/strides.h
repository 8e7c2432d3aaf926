// Loops over chunks of numbers, for the compiler to turn into vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../math/numeric.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t stride = 32;       // numbers: several vectors of independent work for the compiler to interleave
constexpr int64_t loop_chunk = 512;  // numbers that a loop is given at a time

// Asks for numbers [begin, begin + n) of operands, a line of cache in each `apart` bytes: a processor foresees what is
// read next only within a page, and it has many operands to follow here. On its way to the first-level cache what comes
// from memory holds up the reading of what is there; loops that compute much in between, as the transforms do, gain all
// the same.
enum class Cache { first = 3, second = 2 };  // as __builtin_prefetch counts them
template <Cache cache, uintptr_t apart = 64, typename... T>
CO_HD void fetch(int64_t begin, int64_t n, const T*... operands) {
  const auto each = [begin, n](const auto* operand) CO_INLINE {
    const uintptr_t first = reinterpret_cast<uintptr_t>(operand) + begin * sizeof(*operand),
                    bytes = n * sizeof(*operand);
#pragma GCC unroll 8
    for (uintptr_t line = 0; line < bytes; line += apart)
      __builtin_prefetch(reinterpret_cast<const void*>(first + line), 0, static_cast<int>(cache));
  };
  (each(operands), ...);
}

// The stride that comes a chunk after i.
template <typename... T>
CO_HD void fetch_ahead(int64_t i, const T*... operands) {
  fetch<Cache::first>(i + loop_chunk, stride, operands...);
}

// stage(i) for each of these numbers, or stage(begin, end) for all of them.
template <typename Stage>
CO_HD void run_stage(const Stage& stage, int64_t begin, int64_t end) {
  if constexpr (std::is_invocable_v<const Stage&, int64_t, int64_t>) {
    stage(begin, end);
  } else {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) stage(i);
  }
}

// A stage runs over each of n numbers, each stage a stride behind the one before it: so a processor overlaps the
// divisions of one with the multiplications of another, which in the same stride wait for each other. A chunk that is
// whole has another one after it, mostly: fetch(i) is called for each of its strides.
template <typename Fetch, typename... Stages>
CO_HD void in_strides(int64_t n, const Fetch& fetch, const Stages&... stages) {
  constexpr int64_t behind = sizeof...(stages) - 1;
  const int64_t whole = n / stride * stride;
  for (int64_t start = 0; start < whole + behind * stride; start += stride) {
    if (n >= loop_chunk) fetch(start);
    int64_t at = start;
    if (start >= behind * stride && start < whole) {  // all stages are at work: nothing between them keeps them apart
      ((run_stage(stages, at, at + stride), at -= stride), ...);
      continue;
    }
    const auto run = [&](const auto& stage) CO_INLINE {
      if (at >= 0 && at < whole) run_stage(stage, at, at + stride);
      at -= stride;
    };
    (run(stages), ...);
  }
  (run_stage(stages, whole, n), ...);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
