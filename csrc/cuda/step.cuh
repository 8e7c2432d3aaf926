// The step of the optimizers (step.h) for all parameters of one dtype: one launch, a block per work item. Tables in
// device memory say what there is to do; they stay from step to step, and only what changed is sent again.
//
// Step counters and hyperparameters are read here, so that a launch that a CUDA graph repeats takes the next step.
#pragma once

#include "../math/bounded.h"
#include "../math/positive.h"
#include "../math/step.h"
#include "../step.h"
#include "projection.cuh"
#include "simplex.cuh"

namespace constrained_ops {

// Python fills the tables in as 8-byte words.
static_assert(sizeof(StepSlot) == 128 && offsetof(StepSlot, param) == 40 && offsetof(StepSlot, lower) == 104);

// A parameter group.
struct StepGroup {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t flags;
  const void* lr_at;  // if not null, lr is here
  int64_t unused;

  enum : int64_t { decoupled = 1, maximize = 2, euclidean = 4, lr_is_double = 8 };

  __device__ __forceinline__ AdamOptions options() const {
    double rate = lr;
    if (lr_at != nullptr) {
      rate = flags & lr_is_double ? *static_cast<const double*>(lr_at)
                                  : static_cast<double>(*static_cast<const float*>(lr_at));
    }
    return {rate, beta1, beta2, eps, weight_decay, (flags & decoupled) != 0, (flags & maximize) != 0, false};
  }
};
static_assert(sizeof(StepGroup) == 64);

// Elements [begin, end) of a slot, or for kinds along rows, rows of it.
struct StepWork {
  int64_t slot, begin, end;
  int64_t tile;  // for the Triton kernel
};

// How many of a slot's work items have started; 0 between launches.
struct StepProgress {
  int started, items;
};

struct StepTables {
  const StepSlot* slots;
  const void* const* grads;  // [slots], in memory laid out as each slot's parameter
  const StepGroup* groups;
  const StepWork* work;
  StepProgress* progress;   // [slots]
  const float* grad_scale;  // [1], or null
  const float* found_inf;   // [1], or null
  int cache;                // how many elements of rows each thread has shared memory for
};

constexpr int step_threads = 256;

// Shared memory: room to merge rows, Adam's numbers, and three numbers for each element that is cached.
constexpr int step_numbers_bytes = 96;
template <typename T>
constexpr int step_state_bytes = static_cast<int>(sizeof(typename Softmax<T, 1>::State));
template <typename T>
constexpr int step_cache_at = step_threads * step_state_bytes<T> + step_numbers_bytes;
template <typename T>
constexpr int step_cache_limit = 48 / static_cast<int>(sizeof(T));
template <typename T>
constexpr size_t step_shared_bytes(int cache) {
  return step_cache_at<T> + size_t(cache) * step_threads * 3 * sizeof(T);
}

// --- Memory
// ----------------------------------------------------------------------------------------------------------- What a
// kernel writes it must not read through the read-only cache, as load() does.

template <typename Stored>
__device__ __forceinline__ compute_t<Stored> read(const Stored* p) {
  if constexpr (sizeof(Stored) == 2) {
    float value, unused;
    unpack_pair<Stored>(p->bits, value, unused);
    return value;
  } else {
    return *p;
  }
}

// The first `count` of N numbers; whole vectors where `aligned`. The others stay as they are.
template <int N, typename Stored, typename T>
__device__ __forceinline__ void read(const Stored* p, bool aligned, int64_t count, T (&values)[N]) {
  if (aligned && count >= N) {
#pragma unroll
    for (int i = 0; i < N; i += vector_length<Stored>) {
      Vector<Stored>{*reinterpret_cast<const uint4*>(p + i)}.unpack(values + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) values[i] = read(p + i);
    }
  }
}

template <int N, typename Stored, typename T>
__device__ __forceinline__ void write(Stored* p, bool aligned, int64_t count, const T (&values)[N]) {
  if (aligned && count >= N) {
    store_vectors<N>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) store(p + i, values[i]);
    }
  }
}

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
__device__ __forceinline__ T metric(const Adam<T>& adam, bool amsgrad, T g, T x, Moments<T>& moments) {
  return amsgrad ? adam_metric<true>(adam, g, x, moments) : adam_metric<false>(adam, g, x, moments);
}

// --- Element by element
// -----------------------------------------------------------------------------------------------

template <typename Hook, typename Storage, typename State, typename T>
__device__ __forceinline__ void step_elements(const StepSlot& slot, const Storage* grads, const Adam<T>& adam,
                                              const StepWork& work) {
  constexpr int N = vector_length<Storage>;
  Storage* const param = static_cast<Storage*>(slot.param);
  T* const raw = static_cast<T*>(slot.raw);
  State* const exp_avg = static_cast<State*>(slot.exp_avg);
  State* const exp_avg_sq = static_cast<State*>(slot.exp_avg_sq);
  State* const largest_sq = static_cast<State*>(slot.max_exp_avg_sq);
  const T* const lower_each = Hook::by_element ? static_cast<const T*>(slot.lower_each) : nullptr;
  const T* const upper_each = Hook::by_element ? static_cast<const T*>(slot.upper_each) : nullptr;
  const bool whole = aligned(param) && aligned(raw) && aligned(exp_avg) && aligned(exp_avg_sq) && aligned(largest_sq) &&
                     aligned(lower_each) && aligned(upper_each) && aligned(grads);
  const Bounds<T> scalars = bounds_of_scalars<Storage>(slot.lower, slot.upper);

  for (int64_t at = work.begin + int64_t(threadIdx.x) * N; at < work.end; at += int64_t(step_threads) * N) {
    const int64_t count = work.end - at;
    T g[N] = {}, x[N] = {}, m[N] = {}, v[N] = {}, largest[N] = {}, lower[N] = {}, upper[N] = {};
    read(grads + at, whole, count, g);
    Hook::on_raw ? read(raw + at, whole, count, x) : read(param + at, whole, count, x);
    read(exp_avg + at, whole, count, m);
    read(exp_avg_sq + at, whole, count, v);
    if (largest_sq != nullptr) read(largest_sq + at, whole, count, largest);
    if (lower_each != nullptr) read(lower_each + at, whole, count, lower);
    if (upper_each != nullptr) read(upper_each + at, whole, count, upper);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Bounds<T> bounds = scalars;
      if (lower_each != nullptr || upper_each != nullptr) {
        bounds = bounds_of_element<Storage>(lower_each != nullptr ? lower[i] : scalars.lower,
                                            upper_each != nullptr ? upper[i] : scalars.upper);
      }
      Moments<T> moments{m[i], v[i], largest[i]};
      T grad = g[i] * adam.grad_factor;
      if constexpr (Hook::on_raw) grad *= derivative(Hook{}, x[i], bounds);
      const T d = metric(adam, largest_sq != nullptr, grad, x[i], moments);
      x[i] = adam_target(adam, x[i], moments.m / d);
      g[i] = finish(Hook{}, x[i], bounds);
      m[i] = moments.m;
      v[i] = moments.v;
      largest[i] = moments.largest_v;
    }
    write(exp_avg + at, whole, count, m);
    write(exp_avg_sq + at, whole, count, v);
    if (largest_sq != nullptr) write(largest_sq + at, whole, count, largest);
    if constexpr (Hook::on_raw) write(raw + at, whole, count, x);
    write(param + at, whole, count, g);
  }
}

// --- Along rows
// -------------------------------------------------------------------------------------------------------

// A slot's memory as a row sees it.
template <typename Storage, typename State>
struct StepMemory {
  using T = compute_t<Storage>;
  Storage* param;
  T* raw;
  State *exp_avg, *exp_avg_sq, *largest_sq;
  const Storage* grads;

  StepMemory() = default;
  __device__ __forceinline__ StepMemory(const StepSlot& slot, const Storage* grads)
      : param(static_cast<Storage*>(slot.param)),
        raw(static_cast<T*>(slot.raw)),
        exp_avg(static_cast<State*>(slot.exp_avg)),
        exp_avg_sq(static_cast<State*>(slot.exp_avg_sq)),
        largest_sq(static_cast<State*>(slot.max_exp_avg_sq)),
        grads(grads) {}

  // Moments and metric after gradient g at x.
  __device__ __forceinline__ T metric_at(int64_t at, const Adam<T>& adam, T g, T x, Moments<T>& moments) const {
    const bool amsgrad = largest_sq != nullptr;
    moments = {read(exp_avg + at), read(exp_avg_sq + at), amsgrad ? read(largest_sq + at) : T(0)};
    return metric(adam, amsgrad, g, x, moments);
  }
  __device__ __forceinline__ void write_moments(int64_t at, const Moments<T>& moments) const {
    store(exp_avg + at, moments.m);
    store(exp_avg_sq + at, moments.v);
    if (largest_sq != nullptr) store(largest_sq + at, moments.largest_v);
  }
};

// The row of a thread, and which of its items are the thread's.
struct StepRow {
  int64_t first, apart, length;

  template <typename Group>
  __device__ __forceinline__ StepRow(const RowLayout& rows, const Group& group, int64_t row, int64_t end) {
    const int64_t outer = row / rows.inner;
    first = outer * rows.length * rows.inner + (row - outer * rows.inner);
    apart = rows.inner;
    length = row < end && group.takes_part() ? rows.length : 0;
  }

  // f(address of the item, its place among the thread's own).
  template <typename Group, typename F>
  __device__ __forceinline__ void for_own(const Group& group, const F& f) const {
    const int stride = group.capacity(1);
    int own = 0;
    for (int64_t k = group.template item<1, 1>(0); k < length; k += stride, ++own) f(first + k * apart, own);
  }
};

// Projected: Adam's target, its metric, and the projection in it. A row's numbers are kept in shared memory, each
// thread's in a place of its own; where there is no room they are computed anew in every reading, and nothing is
// written before the last one.
template <typename Storage, typename State, typename T, typename Group>
__device__ __forceinline__ void step_simplex(const StepSlot& slot, const Storage* grads, const Adam<T>& adam,
                                             bool euclidean, const StepWork& work, T* cache, int most, Group group) {
  using Projection = Project<T, true>;
  const StepMemory<Storage, State> memory(slot, grads);
  const Projection projection{static_cast<T>(slot.total)};
  const bool cached = slot.rows.length <= int64_t(group.capacity(1)) * most;
  const auto kept = [&](int own, int number) -> T& {
    return cache[(own * 3 + number) * step_threads + static_cast<int>(threadIdx.x)];
  };
  const auto gradient = [&](int64_t at) { return read(memory.grads + at) * adam.grad_factor; };

  for (int64_t start = work.begin; start < work.end; start += group.rows()) {
    const StepRow row(slot.rows, group, start + group.row(), work.end);
    typename Projection::State largest[1] = {Projection::State::none()}, bound[1] = {Projection::State::none()};
    row.for_own(group, [&](int64_t at, int own) {
      Moments<T> moments;
      const T x = read(memory.param + at), d = memory.metric_at(at, adam, gradient(at), x, moments);
      largest[0].values[0] = larger_or_nan(largest[0].values[0], d);
      if (cached) {
        memory.write_moments(at, moments);
        kept(own, 0) = x;
        kept(own, 1) = d;
        kept(own, 2) = moments.m;
      }
    });
    group.merge(largest);
    const T floor = euclidean ? T(0) : adam_floor<T> * largest[0].values[0];

    // Where Adam goes and the metric of the projection.
    const auto target = [&](T x, T d, T m, T(&values)[2][1]) {
      const T floored = larger_or_nan(d, floor);
      values[0][0] = adam_target(adam, x, m / floored);
      values[1][0] = euclidean ? T(1) : floored;
    };
    row.for_own(group, [&](int64_t at, int own) {
      T values[2][1];
      if (cached) {
        target(kept(own, 0), kept(own, 1), kept(own, 2), values);
      } else {
        Moments<T> moments;
        const T x = read(memory.param + at), d = memory.metric_at(at, adam, gradient(at), x, moments);
        target(x, d, moments.m, values);
      }
      projection.add(bound[0], values);
      if (cached) {
        kept(own, 0) = values[0][0];
        kept(own, 1) = values[1][0];
      }
    });
    group.merge(bound);
    typename Projection::Known known = projection.know(bound[0]);

    // What Projection has made of target().
    const auto prepared = [&](int64_t at, int own, Moments<T>& moments, T(&values)[2][1]) {
      if (cached) {
        values[0][0] = kept(own, 0);
        values[1][0] = kept(own, 1);
        projection.anchor(known, values);
      } else {
        const T x = read(memory.param + at), d = memory.metric_at(at, adam, gradient(at), x, moments);
        target(x, d, moments.m, values);
        projection.prepare(known, values);
      }
    };
    bool going;
    do {
      typename Projection::Extra sums[1] = {Projection::Extra::none()};
      row.for_own(group, [&](int64_t at, int own) {
        Moments<T> unused;
        T values[2][1];
        prepared(at, own, unused, values);
        sums[0] = Projection::Extra::merge(sums[0], projection.exceeding(known, values));
      });
      group.merge(sums);
      going = projection.again(known, sums[0]);
    } while (group.any(going));
    row.for_own(group, [&](int64_t at, int own) {
      Moments<T> moments;
      T values[2][1];
      prepared(at, own, moments, values);
      projection.results_of(known, values);
      if (!cached) memory.write_moments(at, moments);
      store(memory.param + at, values[0][0]);
    });
  }
}

// On raw: the derivative of the softmax, Adam, and the softmax. raw itself keeps Adam's results between readings.
template <typename Storage, typename State, typename T, typename Group>
__device__ __forceinline__ void step_softmax(const StepSlot& slot, const Storage* grads, const Adam<T>& adam,
                                             const StepWork& work, Group group) {
  using Forward = Softmax<T, 0>;
  using Backward = Softmax<T, 1>;
  const StepMemory<Storage, State> memory(slot, grads);
  const T smallest = next_above<Storage>(T(0));
  const Forward forward{smallest};
  const Backward backward{smallest};

  for (int64_t start = work.begin; start < work.end; start += group.rows()) {
    const StepRow row(slot.rows, group, start + group.row(), work.end);
    typename Backward::State before[1] = {Backward::State::none()};
    row.for_own(group, [&](int64_t at, int) {
      T values[2][1] = {{read(memory.raw + at)}, {read(memory.grads + at) * adam.grad_factor}};
      backward.add(before[0], values);
    });
    group.merge(before);

    typename Forward::State after[1] = {Forward::State::none()};
    row.for_own(group, [&](int64_t at, int) {
      const T raw = read(memory.raw + at);
      T values[2][1] = {{raw}, {read(memory.grads + at) * adam.grad_factor}};
      backward.finish(before[0], Backward::Extra::none(), values);
      Moments<T> moments;
      const T d = memory.metric_at(at, adam, values[0][0], raw, moments);
      T y[1][1] = {{adam_target(adam, raw, moments.m / d)}};
      memory.write_moments(at, moments);
      store(memory.raw + at, y[0][0]);
      forward.add(after[0], y);
    });
    group.merge(after);

    row.for_own(group, [&](int64_t at, int) {
      T values[1][1] = {{read(memory.raw + at)}};
      forward.finish(after[0], Forward::Extra::none(), values);
      store(memory.param + at, values[0][0]);
    });
  }
}

// Calls f with the threads that share a row: lanes of a warp, columns where rows lie side by side, or all of a block.
template <typename T, typename F>
__device__ __forceinline__ void with_step_group(const RowLayout& rows, const F& f) {
  constexpr int most = step_cache_limit<T>, least_columns = 8;  // fewer neighbours would waste what is read
  if (rows.inner > 1) {
    int columns = warp_size;
    while (columns / 2 >= rows.inner) columns /= 2;
    while (columns > least_columns && rows.length > int64_t(step_threads / columns) * most) columns /= 2;
    f(ColumnGroup{columns, step_threads / columns, step_state_bytes<T>});
  } else if (rows.length <= 6 * warp_size) {
    int width = warp_size;
    while (width / 2 >= rows.length) width /= 2;
    f(LaneGroup<0>{width});
  } else {
    f(BlockGroup(step_threads, step_state_bytes<T>));
  }
}

// --- The kernel
// -------------------------------------------------------------------------------------------------------

template <typename Storage, typename State>
__global__ void __launch_bounds__(step_threads, 2) step_kernel(const StepTables tables) {
  using T = compute_t<Storage>;
  CO_SHARED_MEMORY(shared);
  if (tables.found_inf != nullptr && *tables.found_inf != 0.0f) return;
  const StepWork work = tables.work[blockIdx.x];
  const StepSlot slot = tables.slots[work.slot];
  const StepGroup& group = tables.groups[slot.group];
  static_assert(sizeof(Adam<T>) <= step_numbers_bytes);
  Adam<T>* const numbers = reinterpret_cast<Adam<T>*>(shared + step_threads * step_state_bytes<T>);
  if (threadIdx.x == 0) {
    const float step = *static_cast<volatile float*>(slot.step) + 1.0f;
    *numbers = Adam<T>::at(group.options(), step, tables.grad_scale != nullptr ? *tables.grad_scale : 1.0);
    // The last item of the slot to come here knows that all have read the counter.
    __threadfence();
    StepProgress& progress = tables.progress[work.slot];
    if (atomicAdd(&progress.started, 1) + 1 == progress.items) {
      progress.started = 0;
      *slot.step = step;
    }
  }
  __syncthreads();
  const Adam<T> adam = *numbers;
  const Storage* const grads = static_cast<const Storage*>(tables.grads[work.slot]);
  const auto elements = [&](auto hook) { step_elements<decltype(hook), Storage, State>(slot, grads, adam, work); };
  switch (slot.kind) {
    case StepKind::plain:
      return elements(NoConstraint{});
    case StepKind::box:
    case StepKind::box_by_element:
      return elements(Projected<true>{});
    case StepKind::interval:
      return elements(OnRaw<Interval, false>{});
    case StepKind::lower_only:
      return elements(OnRaw<LowerOnly, false>{});
    case StepKind::upper_only:
      return elements(OnRaw<UpperOnly, false>{});
    case StepKind::bounded_by_element:
      return elements(OnRaw<ByElement, true>{});
    case StepKind::exponential:
    case StepKind::exponential_by_element:
      return elements(OnRaw<Exponential, true>{});
    case StepKind::simplex:
      return with_step_group<T>(slot.rows, [&](auto threads) {
        T* const cache = reinterpret_cast<T*>(shared + step_cache_at<T>);
        const bool euclidean = (group.flags & StepGroup::euclidean) != 0;
        step_simplex<Storage, State>(slot, grads, adam, euclidean, work, cache, tables.cache, threads);
      });
    case StepKind::softmax:
      return with_step_group<T>(slot.rows,
                                [&](auto threads) { step_softmax<Storage, State>(slot, grads, adam, work, threads); });
  }
}

template <typename Storage, typename State>
void launch_step(const Queue& queue, const StepTables& tables, int64_t items) {
  using T = compute_t<Storage>;
  launch(queue, Grid(items, step_threads, step_shared_bytes<T>(tables.cache)), step_kernel<Storage, State>, tables);
}

}  // namespace constrained_ops
