// Loops over chunks of numbers, for the compiler to turn into vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../math/numeric.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t stride = 32;       // numbers: several vectors of independent work for the compiler to interleave
constexpr int64_t loop_chunk = 512;  // numbers that are copied at a time, and how far ahead memory is asked for

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

// Numbers [begin, begin + count), for a stage that goes over them by itself.
struct Span {
  int64_t begin, count;
};

// stage(i, k) for each number i of these, the k-th of its stride; or stage(span).
template <typename Stage>
CO_HD void run_stage(const Stage& stage, Span at) {
  if constexpr (std::is_invocable_v<const Stage&, Span>) {
    stage(at);
  } else {
#pragma GCC ivdep
    for (int64_t k = 0; k < at.count; ++k) stage(at.begin + k, k);
  }
}

// run(stage, begin) for the last stage first, each stage a stride behind the one before it.
template <typename Run, typename Stage, typename... Later>
CO_HD void last_to_first(const Run& run, int64_t begin, const Stage& stage, const Later&... later) {
  if constexpr (sizeof...(later) > 0) last_to_first(run, begin - stride, later...);
  run(stage, begin);
}

// A stage runs over each of n numbers, each stage a stride behind the one before it: so a processor overlaps the
// divisions of one with the multiplications of another, which in the same stride wait for each other. What one stage
// hands to the next is read before the next stride of it is written: a stride of memory is enough for it, which the
// compiler keeps in registers. fetch(i) is called for each stride if there are enough of them.
template <typename Fetch, typename... Stages>
CO_HD void in_strides(int64_t n, const Fetch& fetch, const Stages&... stages) {
  constexpr int64_t behind = (sizeof...(stages) - 1) * stride;
  const int64_t whole = n / stride * stride;
  const auto always = [](const auto& stage, int64_t begin) CO_INLINE { run_stage(stage, {begin, stride}); };
  const auto if_due = [whole](const auto& stage, int64_t begin) CO_INLINE {
    if (begin >= 0 && begin < whole) run_stage(stage, {begin, stride});
  };
  for (int64_t start = 0; start < whole + behind; start += stride) {
    if (n >= loop_chunk) fetch(start);
    if (start >= behind && start < whole)  // all stages are at work: nothing between them keeps them apart
      last_to_first(always, start, stages...);
    else
      last_to_first(if_due, start, stages...);
  }
  (run_stage(stages, {whole, n - whole}), ...);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
