// A step element by element. Vector loops go over operands in place, or over chunks of them in the compute type where
// memory has another one or bounds lie beside it. Memory is passed once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../math/bounded.h"
#include "../../math/positive.h"
#include "../../math/step.h"
#include "../step.h"
#include "elementwise.h"
#include "strides.h"
#include "vectors.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t step_chunk = loop_chunk;

// A chunk of all operands; those that a kind has no use for are null.
template <typename T>
struct StepChunk {
  const T* grad;
  T* x;    // the parameter; on raw: written only
  T* raw;  // on raw
  T *m, *v, *largest_v;
  const T *lower, *upper;  // by element
  bool past_caches;        // on raw: x is at a whole vector, and written past the caches
  bool to_first_level;     // as in StepNumbers
};

// Whether x is made of a sigmoid, and that of a table of exponentials and of an estimate in place of a division.
template <typename Map, typename T>
constexpr bool estimates_sigmoid = has_exp_table<T> && std::is_base_of_v<OfSigmoid<Map>, Map>;

// Map's exponentials of n numbers, no more than a stride, whose room they are given.
template <typename Map, typename T>
CO_HD void exponentials(const T* __restrict raw, int64_t n, T* __restrict e) {
  if constexpr (estimates_sigmoid<Map, T>) {
    static_assert(stride % width<T> == 0);
    for (int64_t k = 0; k < n; k += width<T>) store(e + k, lifted_exp_of_magnitude(load_some(raw + k, n - k)));
  } else {
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) e[k] = Map::exponential(raw[k]);
  }
}

template <bool amsgrad, typename T>
CO_HD Moments<T> moments_at(int64_t i, const T* __restrict m, const T* __restrict v, const T* __restrict largest_v) {
  if constexpr (amsgrad)
    return {m[i], v[i], largest_v[i]};
  else
    return {m[i], v[i], T(0)};
}
template <bool amsgrad, typename T>
CO_HD void set_moments(int64_t i, const Moments<T>& moments, T* __restrict m, T* __restrict v,
                       T* __restrict largest_v) {
  m[i] = moments.m;
  v[i] = moments.v;
  if constexpr (amsgrad) largest_v[i] = moments.largest_v;
}

// run(adam), with the Adam that has the least to do.
template <typename T, typename Run>
CO_HD void with_cheapest(const Adam<T>& adam, const Run& run) {
  if (PlainAdam<T>::suits(adam))
    run(PlainAdam<T>{adam});
  else
    run(adam);
}

// On the parameter itself.
template <typename Hook, bool amsgrad, typename T>
[[gnu::noinline]] void adam_loop(const Adam<T> any_adam, const Bounds<T> scalars, int64_t n, const T* __restrict grad,
                                 T* __restrict x, T* __restrict m, T* __restrict v, T* __restrict largest_v,
                                 const T* __restrict lower, const T* __restrict upper, const bool to_first_level) {
  using V = Vector<T>;
  const auto fetch_lines = [to_first_level](int64_t i, const auto*... operands) CO_INLINE {
    if (to_first_level)
      fetch_ahead(i, operands...);
    else
      fetch<Cache::second, 128>(i + loop_chunk, stride, operands...);  // each second line; its neighbour comes along
  };
  const auto fetch_stride = [&](int64_t i) CO_INLINE {
    fetch_lines(i, grad, x, m, v);
    if constexpr (amsgrad) fetch_lines(i, largest_v);
    if constexpr (Hook::by_element) fetch_lines(i, lower, upper);
  };
  with_cheapest(any_adam.with_metric(root_factor<T>), [&](const auto adam) CO_INLINE {
    in_strides(n, fetch_stride, [&](Span at) CO_INLINE {
      for (int64_t i = at.begin, rest = at.count; rest > 0; i += width<T>, rest -= width<T>) {
        const auto read = [=](const T* from) CO_INLINE { return load_some(from + i, rest); };
        Bounds<V> bounds{V{} + scalars.lower, V{} + scalars.upper};
        if constexpr (Hook::by_element) bounds.lower = read(lower), bounds.upper = read(upper);
        Moments<V> moments{read(m), read(v), V{}};
        if constexpr (amsgrad) moments.largest_v = read(largest_v);
        const V from = read(x), of_metric = adam_moments<amsgrad>(adam, adam.scaled(read(grad)), from, moments);
        const V direction = moments.m / adam_metric_of(adam, scaled_root<true>(of_metric));
        store_some(x + i, finish(Hook{}, adam_target(adam, from, direction), bounds), rest);
        store_some(m + i, moments.m, rest);
        store_some(v + i, moments.v, rest);
        if constexpr (amsgrad) store_some(largest_v + i, moments.largest_v, rest);
      }
    });
  });
}

// Derivative, Adam and transform. Storage tells the innermost neighbours of bounds by element. The exponentials come a
// stage before what is made of them, and the root before the division by it: the shorter a chain of operations, the
// more of them a processor has in view. On its way past the caches x is written a stride at a time, so that memory is
// never left waiting.
template <typename Storage, typename Map, bool by_element, typename T>
[[gnu::noinline]] void raw_loop(const Adam<T> any_adam, const Bounds<T> scalars, int64_t n, const T* __restrict grad,
                                T* __restrict raw, T* __restrict m, T* __restrict v, T* __restrict largest_v,
                                const T* __restrict lower, const T* __restrict upper, T* __restrict x,
                                const bool past_caches) {
  alignas(64) T e[stride], grad_raw[stride], metric[stride], new_e[stride], near[stride], waiting_x[stride];
  const auto bounds_at = [&](int64_t i) CO_INLINE {
    if constexpr (by_element)
      return bounds_of_element<Storage>(lower[i], upper[i]);
    else
      return scalars;
  };
  in_strides(
      n,
      [&](int64_t i) CO_INLINE {
        fetch_ahead(i, grad, raw, m, v);
        if (!past_caches) fetch_ahead(i, x);
        if constexpr (by_element) fetch_ahead(i, lower, upper);
        if (largest_v) fetch_ahead(i, largest_v);
      },
      [&](Span at) CO_INLINE { exponentials<Map>(raw + at.begin, at.count, e); },
      [&](int64_t i, int64_t k) CO_INLINE { grad_raw[k] = grad[i] * Map::at(raw[i], e[k], bounds_at(i)).x_raw; },
      [&](Span at) CO_INLINE {
        const auto step_moments = [&](auto amsgrad) CO_INLINE {
          with_cheapest(any_adam, [&](const auto& adam) CO_INLINE {
            run_stage(
                [&](int64_t i, int64_t k) CO_INLINE {
                  Moments<T> moments = moments_at<amsgrad>(i, m, v, largest_v);
                  metric[k] = adam_metric<amsgrad>(adam, adam.scaled(grad_raw[k]), raw[i], moments);
                  set_moments<amsgrad>(i, moments, m, v, largest_v);
                },
                at);
          });
        };
        largest_v ? step_moments(std::true_type()) : step_moments(std::false_type());
      },
      [&](Span at) CO_INLINE {
        with_cheapest(any_adam, [&](const auto& adam) CO_INLINE {
          run_stage([&](int64_t i, int64_t k) CO_INLINE { raw[i] = adam_target(adam, raw[i], m[i] / metric[k]); }, at);
        });
      },
      [&](Span at) CO_INLINE {
        exponentials<Map>(raw + at.begin, at.count, new_e);
        if constexpr (estimates_sigmoid<Map, T>)
          for (int64_t k = 0; k < at.count; k += width<T>) store(near + k, rough_sigmoid(load(new_e + k)));
      },
      [&](Span at) CO_INLINE {
        T* const new_x = past_caches ? waiting_x : x + at.begin;
        const auto x_at = [&](int64_t i, int64_t k) CO_INLINE {
          if constexpr (estimates_sigmoid<Map, T>)
            return Map::x_at(raw[i], new_e[k], near[k], bounds_at(i));
          else
            return Map::at(raw[i], new_e[k], bounds_at(i)).x;
        };
        run_stage([&](int64_t i, int64_t k) CO_INLINE { new_x[k] = x_at(i, k); }, at);
        if (past_caches) copy_past_caches(new_x, at.count, x + at.begin);
      });
}

template <typename T>
using StepChunkLoop = void (*)(const Adam<T>& adam, const Bounds<T>& scalars, int64_t n, const StepChunk<T>& at);

template <typename Hook, bool amsgrad, typename T>
void step_on_param(const Adam<T>& adam, const Bounds<T>& scalars, int64_t n, const StepChunk<T>& at) {
  adam_loop<Hook, amsgrad>(adam, scalars, n, at.grad, at.x, at.m, at.v, at.largest_v, at.lower, at.upper,
                           at.to_first_level);
}

template <typename Storage, typename Map, bool by_element, typename T>
void step_on_raw(const Adam<T>& adam, const Bounds<T>& scalars, int64_t n, const StepChunk<T>& at) {
  raw_loop<Storage, Map, by_element>(adam, scalars, n, at.grad, at.raw, at.m, at.v, at.largest_v, at.lower, at.upper,
                                     at.x, at.past_caches);
}

template <typename Storage, bool amsgrad>
StepChunkLoop<compute_t<Storage>> pick_kind(StepKind kind, bool finite_bounds) {
  using T = compute_t<Storage>;
  switch (kind) {
    case StepKind::box:
      return step_on_param<Projected<false>, amsgrad, T>;
    case StepKind::box_by_element:
      return step_on_param<Projected<true>, amsgrad, T>;
    case StepKind::interval:
      return step_on_raw<T, Interval, false, T>;
    case StepKind::lower_only:
      return step_on_raw<T, LowerOnly, false, T>;
    case StepKind::upper_only:
      return step_on_raw<T, UpperOnly, false, T>;
    case StepKind::bounded_by_element:
      return finite_bounds ? step_on_raw<Storage, Interval, true, T> : step_on_raw<Storage, ByElement, true, T>;
    case StepKind::exponential:
      return step_on_raw<T, Exponential, false, T>;
    case StepKind::exponential_by_element:
      return step_on_raw<Storage, Exponential, true, T>;
    default:
      return step_on_param<NoConstraint, amsgrad, T>;
  }
}

template <typename Storage>
StepChunkLoop<compute_t<Storage>> pick_step(StepKind kind, bool amsgrad, bool finite_bounds = false) {
  return amsgrad ? pick_kind<Storage, true>(kind, finite_bounds) : pick_kind<Storage, false>(kind, finite_bounds);
}

// n numbers in the compute type: where they lie if that is how they lie, else a copy in `buffer`.
template <typename Stored, typename T>
T* opened(Stored* data, int64_t n, T* buffer, bool read = true) {
  if constexpr (std::is_same_v<std::remove_const_t<Stored>, T>) {
    return const_cast<T*>(data);
  } else {
    if (!data) return nullptr;
    if (read) read_numbers(data, 1, n, buffer);
    return buffer;
  }
}
template <typename Stored, typename T>
void closed(Stored* data, int64_t n, const T* buffer) {
  if constexpr (!std::is_same_v<Stored, T>) {
    if (data) write_numbers(buffer, n, data, 1);
  }
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
  const bool at_vector = reinterpret_cast<uintptr_t>(static_cast<Storage*>(slot.param) + begin) % vector_bytes == 0;
  const bool past_caches = numbers.past_caches && on_raw && !converts && at_vector;
  const auto adam = numbers.adam.as<T>();
  const auto scalars = bounds_of_scalars<Storage>(slot.lower, slot.upper);
  alignas(64) T buffers[converts ? 5 : 1][step_chunk];
  alignas(64) T lower[step_chunk], upper[step_chunk];
  if (each) {
    std::fill_n(lower, std::min(step_chunk, end - begin), scalars.lower);
    std::fill_n(upper, std::min(step_chunk, end - begin), scalars.upper);
  }
  const int64_t at_once = converts || each ? step_chunk : end - begin;
  auto loop = pick_step<Storage>(slot.kind, amsgrad);
  for (int64_t start = begin; start < end; start += at_once) {
    const int64_t n = std::min(at_once, end - start);
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
                          slot.upper_each ? static_cast<const T*>(slot.upper_each) + start : upper,
                          past_caches,
                          numbers.to_first_level};
    if (slot.kind == StepKind::bounded_by_element)
      loop = pick_step<Storage>(slot.kind, amsgrad, all_finite(at.lower, at.upper, n));
    loop(adam, scalars, n, at);
    closed(x, n, at.x);
    closed(m, n, at.m);
    closed(v, n, at.v);
    closed(largest_v, n, at.largest_v);
  }
  if (past_caches) written_past_caches();
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
