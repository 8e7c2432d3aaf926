// Scans along a row by the threads that work on it (reduce.cuh), each with a few items that follow each other: what the
// items of the threads before it, or after it, come to. A state has `count` numbers `values`, `none()` and `merge(a,
// b)` for a before b, which need not commute.
#pragma once

#include "reduce.cuh"

namespace constrained_ops {

// What a thread's neighbours come to, and all of them together.
template <typename State>
struct Scanned {
  State outside, total;
};

// Over `width` neighbouring lanes, a power of two: halves that know their own totals exchange them.
template <bool after, typename State>
__device__ __forceinline__ Scanned<State> scan_lanes(const State& mine, int width) {
  Scanned<State> scanned{State::none(), mine};
  const int lane = static_cast<int>(threadIdx.x);
  for (int distance = 1; distance < width; distance *= 2) {
    State other;
#pragma unroll
    for (int i = 0; i < State::count; ++i) {
      other.values[i] = __shfl_xor_sync(whole_warp, scanned.total.values[i], distance);
    }
    const bool upper = (lane & distance) != 0;
    if (upper != after) {
      scanned.outside = after ? State::merge(scanned.outside, other) : State::merge(other, scanned.outside);
    }
    scanned.total = upper ? State::merge(other, scanned.total) : State::merge(scanned.total, other);
  }
  return scanned;
}

// A row per `width` lanes of a warp.
struct ScanLanes : LaneGroup<0> {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % width(); }

  template <bool after, typename State>
  __device__ __forceinline__ Scanned<State> scan(const State& mine) {
    return scan_lanes<after>(mine, width());
  }

  // What a thread has written to global memory, the others see; rows of more than one part are single threads'.
  __device__ __forceinline__ void sync() const {}
};

// A row per block.
struct ScanBlock : BlockGroup {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }

  template <bool after, typename State>
  __device__ __forceinline__ Scanned<State> scan(const State& mine) {
    CO_SHARED_MEMORY(memory);
    State* const slots = reinterpret_cast<State*>(memory + turn * set_bytes);
    turn ^= 1;
    const int warps = static_cast<int>(blockDim.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size,
              warp = static_cast<int>(threadIdx.x) / warp_size;
    const Scanned<State> within = scan_lanes<after>(mine, warp_size);
    if (lane == 0) slots[warp] = within.total;
    __syncthreads();
    const State of_lane = lane < warps ? slots[lane] : State::none();
    const State outside = (after ? lane > warp : lane < warp) ? of_lane : State::none();
    const State around = scan_lanes<after>(outside, warp_size).total;
    return {after ? State::merge(within.outside, around) : State::merge(around, within.outside),
            scan_lanes<after>(of_lane, warp_size).total};
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// v -> scale v + shift; merge(a, b) is a after b was applied.
template <typename T>
struct Affine {
  static constexpr int count = 2;
  T values[2];

  CO_HD static Affine none() { return {{T(1), T(0)}}; }
  CO_HD static Affine merge(const Affine& a, const Affine& b) {
    return {{a.values[0] * b.values[0], a.values[0] * b.values[1] + a.values[1]}};
  }
  CO_HD T operator()(T v) const { return values[0] * v + values[1]; }
};

}  // namespace constrained_ops
