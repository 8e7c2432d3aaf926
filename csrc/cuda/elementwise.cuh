// Elementwise kernels: a map (math/bounded.h, math/positive.h) and a program (math/elementwise.h) over memory. Results
// are written in the order of memory; operands are read in that order too where they can be, else by their strides.
#pragma once

#include <cuda_runtime.h>

#include "../math/elementwise.h"
#include "indexing.cuh"
#include "launch.cuh"
#include "storage.cuh"

namespace constrained_ops {

// Launch bounds name the blocks per multiprocessor too: left to itself, the compiler spills to reach one block more.
constexpr int elementwise_threads = 256;

// How many results of a program, counted from the last, are gradients to tensor bounds: in the compute dtype.
template <typename Program>
constexpr int bound_results = 0;
template <bool with_log_det>
constexpr int bound_results<Backward<with_log_det, true>> = 2;
template <>
inline constexpr int bound_results<DoubleBackward<true>> = 2;

// A null operand stands for zeros, a null result is not wanted.
template <typename Program, typename Storage>
struct Operands {
  static constexpr int inputs = Program::inputs, outputs = Program::outputs;

  const Storage* raw;
  const Storage* in[inputs > 0 ? inputs : 1];
  void* out[outputs];
};

// --- Where the bounds of an element come from -----------------------------------------------------------------------

template <typename Storage>
struct ScalarBounds {
  using T = compute_t<Storage>;
  static constexpr int operands = 0;
  Bounds<T> bounds;

  __device__ __forceinline__ Bounds<T> once() const { return bounds; }
  __device__ __forceinline__ void load(const int64_t*, T&, T&) const {}
  __device__ __forceinline__ static Bounds<T> of(const Bounds<T>& bounds, T, T) { return bounds; }
};

// Tensors that hold one number for all elements: every thread reads it once.
template <typename Storage>
struct UniformBounds {
  using T = compute_t<Storage>;
  static constexpr int operands = 0;
  const T *lower, *upper;

  __device__ __forceinline__ Bounds<T> once() const { return bounds_of_element<Storage>(__ldg(lower), __ldg(upper)); }
};

template <typename Storage>
struct ElementBounds {
  using T = compute_t<Storage>;
  static constexpr int operands = 2;
  const T *lower, *upper;

  __device__ __forceinline__ Bounds<T> once() const { return {}; }
  __device__ __forceinline__ void load(const int64_t* offsets, T& at_lower, T& at_upper) const {
    at_lower = __ldg(lower + offsets[0]);
    at_upper = __ldg(upper + offsets[1]);
  }
  __device__ __forceinline__ static Bounds<T> of(const Bounds<T>&, T at_lower, T at_upper) {
    return bounds_of_element<Storage>(at_lower, at_upper);
  }
};

// Which map one pair of bounds takes, where all elements have the same: a branch that costs nothing, where elements
// that differ compute all maps and choose. Calls f with the map's Tag.
template <typename Map>
struct UniformMap {
  template <typename T, typename F>
  __device__ __forceinline__ static void choose(const Bounds<T>&, const F& f) {
    f(Tag<Map>{});
  }
};

// --- Kernels --------------------------------------------------------------------------------------------------------

// Writes result k of the first `count` of N consecutive elements, `first` on.
template <int N, typename Program, typename Storage>
__device__ __forceinline__ void store_results(const Operands<Program, Storage>& operands, int k, int64_t first,
                                              const compute_t<Storage>* values, int64_t count) {
  using T = compute_t<Storage>;
  if (operands.out[k] == nullptr) return;
  const bool of_bound = k >= Program::outputs - bound_results<Program>;
  if constexpr (N == 1) {
    if (count < 1) return;
    of_bound ? store(static_cast<T*>(operands.out[k]) + first, *values)
             : store(static_cast<Storage*>(operands.out[k]) + first, *values);
  } else {
    of_bound ? store_vectors<N>(static_cast<T*>(operands.out[k]) + first, values, count)
             : store_vectors<N>(static_cast<Storage*>(operands.out[k]) + first, values, count);
  }
}

// All operands in the order of memory, at addresses that are multiples of 16. A thread has several vectors of every
// operand under way before it computes.
template <typename Map, typename Program, typename Storage, typename Source>
__global__ void __launch_bounds__(elementwise_threads, 2)
    linear_kernel(const Operands<Program, Storage> operands, const Source source, const int64_t n) {
  using T = compute_t<Storage>;
  constexpr int inputs = Program::inputs, outputs = Program::outputs;
  constexpr int length = vector_length<Storage>, vectors = inputs > 2 ? 1 : 2;
  constexpr int64_t tile = int64_t(elementwise_threads) * length * vectors;
  const Bounds<T> bounds = source.once();

  for (int64_t start = blockIdx.x * tile; start < n; start += gridDim.x * tile) {
    const int64_t first = start + threadIdx.x * length;
    const bool full = start + tile <= n;
    Vector<Storage> raw[vectors], in[vectors][inputs > 0 ? inputs : 1];
    if (full) {
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = first + v * elementwise_threads * length;
        raw[v] = load_vector(operands.raw + at);
#pragma unroll
        for (int k = 0; k < inputs; ++k) {
          in[v][k] = {};
          if (operands.in[k] != nullptr) in[v][k] = load_vector(operands.in[k] + at);
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = first + v * elementwise_threads * length;
        raw[v] = load_vector(operands.raw + at, n - at);
#pragma unroll
        for (int k = 0; k < inputs; ++k) {
          in[v][k] = {};
          if (operands.in[k] != nullptr) in[v][k] = load_vector(operands.in[k] + at, n - at);
        }
      }
    }
    UniformMap<Map>::choose(bounds, [&](auto map) {
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        T x[length], given[inputs > 0 ? inputs : 1][length], results[outputs][length];
        raw[v].unpack(x);
#pragma unroll
        for (int k = 0; k < inputs; ++k) in[v][k].unpack(given[k]);
#pragma unroll
        for (int i = 0; i < length; ++i) {
          T arguments[inputs > 0 ? inputs : 1], values[outputs];
#pragma unroll
          for (int k = 0; k < inputs; ++k) arguments[k] = given[k][i];
          Program::run(decltype(map)::type::at(x[i], bounds), bounds, arguments, values);
#pragma unroll
          for (int k = 0; k < outputs; ++k) results[k][i] = values[k];
        }
        const int64_t at = first + v * elementwise_threads * length;
#pragma unroll
        for (int k = 0; k < outputs; ++k) {
          store_results<length>(operands, k, at, results[k], full ? length : n - at);
        }
      }
    });
  }
}

// Operands wherever they lie: raw, the inputs, then the bounds, in the order of `strided`.
template <typename Map, typename Program, typename Storage, typename Source>
__global__ void __launch_bounds__(elementwise_threads, 2)
    strided_kernel(const Operands<Program, Storage> operands, const Source source,
                   const Strided<1 + Program::inputs + Source::operands> strided, const int64_t n) {
  using T = compute_t<Storage>;
  constexpr int inputs = Program::inputs, outputs = Program::outputs;
  constexpr int items = inputs > 2 ? 2 : 4;
  constexpr int64_t tile = int64_t(elementwise_threads) * items;
  const Bounds<T> shared_bounds = source.once();

  for (int64_t start = blockIdx.x * tile + threadIdx.x; start < n; start += gridDim.x * tile) {
    T raw[items] = {}, in[items][inputs > 0 ? inputs : 1] = {}, lower[items] = {}, upper[items] = {};
#pragma unroll
    for (int j = 0; j < items; ++j) {
      const int64_t at = start + j * elementwise_threads;
      if (at < n) {
        int64_t offsets[1 + inputs + Source::operands];
        strided.offsets(at, offsets);
        raw[j] = load(operands.raw + offsets[0]);
#pragma unroll
        for (int k = 0; k < inputs; ++k) {
          if (operands.in[k] != nullptr) in[j][k] = load(operands.in[k] + offsets[1 + k]);
        }
        source.load(offsets + 1 + inputs, lower[j], upper[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < items; ++j) {
      const int64_t at = start + j * elementwise_threads;
      T values[outputs];
      const Bounds<T> bounds = Source::of(shared_bounds, lower[j], upper[j]);
      Program::run(Map::at(raw[j], bounds), bounds, in[j], values);
#pragma unroll
      for (int k = 0; k < outputs; ++k) store_results<1>(operands, k, at, values + k, n - at);
    }
  }
}

// --- Launchers ------------------------------------------------------------------------------------------------------

template <typename Map, typename Program, typename Storage, typename Source>
void launch_linear(const Queue& queue, const Operands<Program, Storage>& operands, const Source& source, int64_t n) {
  constexpr int vectors = Program::inputs > 2 ? 1 : 2;
  const int64_t blocks = divide_up(n, int64_t(elementwise_threads) * vector_length<Storage> * vectors);
  launch(queue, Grid(limit_blocks(blocks, elementwise_threads, queue), elementwise_threads),
         linear_kernel<Map, Program, Storage, Source>, operands, source, n);
}

template <typename Map, typename Program, typename Storage, typename Source>
void launch_strided(const Queue& queue, const Operands<Program, Storage>& operands, const Source& source,
                    const Strided<1 + Program::inputs + Source::operands>& strided, int64_t n) {
  constexpr int items = Program::inputs > 2 ? 2 : 4;
  const int64_t blocks = divide_up(n, int64_t(elementwise_threads) * items);
  launch(queue, Grid(limit_blocks(blocks, elementwise_threads, queue), elementwise_threads),
         strided_kernel<Map, Program, Storage, Source>, operands, source, strided, n);
}

}  // namespace constrained_ops
