// Threads that work on one row together, and how they merge what each has found. A state is a struct of `count` numbers
// `values`, with `none()` that adds nothing and `merge(a, b)`; every thread of the group gets the merged state.
// `any(condition)`: whether it holds for some row of the threads that merge() keeps together. Threads of one row agree.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

// Dynamic shared memory. The emulation of tests/emulation brings its own.
#if !defined(CO_SHARED_MEMORY)
#define CO_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace constrained_ops {

constexpr unsigned whole_warp = 0xffffffffu;

template <typename T, int n>
struct Sums {
  static constexpr int count = n;
  T values[n];

  CO_HD static Sums none() { return {}; }
  CO_HD static Sums merge(const Sums& a, const Sums& b) {
    Sums sum;
#pragma unroll
    for (int i = 0; i < n; ++i) sum.values[i] = a.values[i] + b.values[i];
    return sum;
  }
};

// Merges over `width` neighbouring lanes, a power of two, several states side by side. merge() must not care for the
// order of its arguments: lanes merge the same states in different orders.
template <typename State, int n>
__device__ __forceinline__ void merge_lanes(State (&states)[n], int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int s = 0; s < n; ++s) {
      State other;
#pragma unroll
      for (int i = 0; i < State::count; ++i) {
        other.values[i] = __shfl_xor_sync(whole_warp, states[s].values[i], distance);
      }
      states[s] = State::merge(states[s], other);
    }
  }
}

// A row per `width` lanes of a warp, known at compile time unless 0. All lanes of the warp take part, whether they have
// a row or not.
template <int fixed_width>
struct LaneGroup {
  static constexpr bool contiguous = true;
  int given_width;

  CO_HD int width() const { return fixed_width > 0 ? fixed_width : given_width; }
  __device__ __forceinline__ int rows() const { return static_cast<int>(blockDim.x) / width(); }
  __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / width(); }
  __device__ __forceinline__ bool takes_part() const { return true; }
  CO_HD int capacity(int items) const { return width() * items; }

  template <int items, int vector>
  __device__ __forceinline__ int item(int i) const {
    return (i / vector * width() + static_cast<int>(threadIdx.x) % width()) * vector;
  }

  template <typename State, int n>
  __device__ __forceinline__ void merge(State (&states)[n]) {
    merge_lanes(states, width());
  }

  __device__ __forceinline__ bool any(bool condition) const { return __any_sync(whole_warp, condition); }
};

// A row per block. Needs `shared_bytes` of shared memory.
struct BlockGroup {
  static constexpr bool contiguous = true;
  int set_bytes;  // one state per warp
  int turn = 0;

  CO_HD BlockGroup(int threads, int state_bytes) : set_bytes(threads / warp_size * state_bytes) {}
  size_t shared_bytes() const { return 2 * set_bytes; }

  __device__ __forceinline__ int rows() const { return 1; }
  __device__ __forceinline__ int row() const { return 0; }
  __device__ __forceinline__ bool takes_part() const { return true; }
  __device__ __forceinline__ int capacity(int items) const { return static_cast<int>(blockDim.x) * items; }

  // A warp's items lie together: from the first of a thread to its others it is a constant.
  template <int items, int vector>
  __device__ __forceinline__ int item(int i) const {
    const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    return warp * warp_size * items + (i / vector * warp_size + lane) * vector;
  }

  // Two sets of slots in turns, so that one barrier is enough: who writes a set again has passed the barrier of the
  // other set in between, and with it everyone who read this one.
  template <typename State>
  __device__ __forceinline__ void merge(State (&state)[1]) {
    CO_SHARED_MEMORY(memory);
    State* const slots = reinterpret_cast<State*>(memory + turn * set_bytes);
    turn ^= 1;
    const int warps = static_cast<int>(blockDim.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    merge_lanes(state, warp_size);
    if (lane == 0) slots[threadIdx.x / warp_size] = state[0];
    __syncthreads();
    state[0] = lane < warps ? slots[lane] : State::none();
    merge_lanes(state, warp_size);
  }

  __device__ __forceinline__ bool any(bool condition) const { return condition; }
};

// Rows that lie side by side, a column of threads per row: neighbouring threads read neighbouring addresses. Threads
// beyond the last whole line of `columns` have nothing to do. Needs `shared_bytes` of shared memory.
struct ColumnGroup {
  static constexpr bool contiguous = false;
  int columns, lines;  // lines is a power of two
  int state_bytes;

  int threads() const { return static_cast<int>(divide_up(int64_t(columns) * lines, warp_size)) * warp_size; }
  size_t shared_bytes() const { return lines > 1 ? size_t(columns) * lines * state_bytes : 0; }

  __device__ __forceinline__ int rows() const { return columns; }
  __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) % columns; }
  __device__ __forceinline__ int line() const { return static_cast<int>(threadIdx.x) / columns; }
  __device__ __forceinline__ bool takes_part() const { return line() < lines; }
  __device__ __forceinline__ int capacity(int items) const { return lines * items; }

  template <int items, int vector>
  __device__ __forceinline__ int item(int i) const {
    return i * lines + line();
  }

  template <typename State>
  __device__ __forceinline__ void merge(State (&state)[1]) {
    if (lines == 1) return;
    CO_SHARED_MEMORY(memory);
    State* const slots = reinterpret_cast<State*>(memory);
    const int self = static_cast<int>(threadIdx.x);
    __syncthreads();  // all have read what the last merge left here
    if (takes_part()) slots[self] = state[0];
    for (int half = lines / 2; half > 0; half /= 2) {
      __syncthreads();
      if (line() < half) slots[self] = State::merge(slots[self], slots[self + half * columns]);
    }
    __syncthreads();
    state[0] = slots[row()];
  }

  __device__ __forceinline__ bool any(bool condition) const {
    return lines == 1 ? condition : __syncthreads_or(condition) != 0;
  }
};

}  // namespace constrained_ops
