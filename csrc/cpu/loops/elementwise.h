// The elementwise loop: operands are brought into chunks of the compute type that fit the first-level cache, contiguous
// whatever their layout was, so that one vector loop serves every dtype and stride.
#pragma once

#include <algorithm>
#include <utility>

#include "../../math/elementwise.h"
#include "../loops.h"
#include "convert.h"
#include "of_dtype.h"
#include "strides.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t chunk = loop_chunk;

// Fills `buffer` from elements [start, start + n) of a strided operand, in the layout's order.
template <typename Storage, typename T>
[[gnu::noinline]] void gather(const ElementwiseCall& call, int input, int64_t start, int64_t n, T* buffer) {
  const auto& layout = call.layout;
  const int64_t* strides = layout.strides[input];
  const Storage* data = static_cast<const Storage*>(call.inputs[input]);
  const int last = layout.rank - 1;
  int64_t index[max_rank], offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = start % layout.sizes[d];
    start /= layout.sizes[d];
    offset += index[d] * strides[d];
  }
  for (int64_t done = 0; done < n;) {
    const int64_t run = std::min(n - done, layout.sizes[last] - index[last]), stride = strides[last];
    read_numbers(data + offset, stride, run, buffer + done);
    done += run;
    index[last] += run;
    offset += run * stride;
    for (int d = last; d > 0 && index[d] == layout.sizes[d]; --d) {
      index[d] = 0;
      offset += strides[d - 1] - layout.sizes[d] * strides[d];
      ++index[d - 1];
    }
  }
}

// One operand as contiguous chunks of the compute type: in place, converted, gathered, or filled once.
template <typename Storage>
class Input {
  using T = compute_t<Storage>;

 public:
  void open(const ElementwiseCall& call, int input) {
    call_ = &call;
    input_ = input;
    const auto& layout = call.layout;
    linear_ = call.inputs[input] && layout.rank == 1 && layout.strides[input][0] == 1;
    bool constant = true;
    for (int d = 0; d < layout.rank; ++d) constant &= layout.strides[input][d] == 0;
    filled_ = constant;
    if (constant) {
      const T value = call.inputs[input] ? to_compute(*static_cast<const Storage*>(call.inputs[input])) : T(0);
      std::fill_n(buffer_, chunk, value);
    }
  }

  const T* fetch(int64_t start, int64_t n) {
    if (filled_) return buffer_;
    if (linear_) {
      const Storage* from = static_cast<const Storage*>(call_->inputs[input_]) + start;
      if constexpr (std::is_same_v<Storage, T>) return from;
      read_numbers(from, 1, n, buffer_);
      return buffer_;
    }
    gather<Storage>(*call_, input_, start, n, buffer_);
    return buffer_;
  }

 private:
  alignas(64) T buffer_[chunk];
  const ElementwiseCall* call_;
  int input_;
  bool linear_, filled_;
};

// Operands per element: raw[, lower, upper], then the program's.
template <typename Program, bool by_element>
constexpr int operands = 1 + (by_element ? 2 : 0) + Program::inputs;

template <typename Storage, typename Program, typename Map, bool by_element,
          typename = std::make_index_sequence<operands<Program, by_element>>,
          typename = std::make_index_sequence<Program::outputs>>
struct Loop;

// The vector loop over one chunk.
template <typename Storage, typename Program, typename Map, bool by_element, size_t... I, size_t... O>
struct Loop<Storage, Program, Map, by_element, std::index_sequence<I...>, std::index_sequence<O...>> {
  using T = compute_t<Storage>;
  template <typename U, size_t>
  using Value = U;
  template <typename U, size_t>
  using Pointer = U* __restrict__;  // without the promise, stores would hold back the loads of the next vector

  static void run(const T* const* in, T* const* out, const Bounds<T>& scalars, int64_t n) {
    compute(scalars, n, in[I]..., out[O]...);
  }

 private:
  [[gnu::noinline]] static void compute(const Bounds<T> scalars, int64_t n, Pointer<const T, I>... in,
                                        Pointer<T, O>... out) {
    in_strides(
        n, [&](int64_t i) CO_INLINE { fetch_ahead(i, in..., out...); },
        [&](int64_t i, int64_t) CO_INLINE { element(scalars, in[i]..., out[i]...); });
  }

  CO_HD static void element(const Bounds<T>& scalars, Value<T, I>... in, Value<T&, O>... out) {
    const T values[] = {in..., T(0)};
    T results[sizeof...(O)];
    Bounds<T> bounds = scalars;
    if constexpr (by_element) bounds = bounds_of_element<Storage>(values[1], values[2]);
    Program::run(Map::at(values[0], bounds), bounds, values + sizeof...(I) - Program::inputs, results);
    ((out = results[O]), ...);
  }
};

template <typename T>
bool all_finite(const T* a, const T* b, int64_t n) {
  int finite = 1;
#pragma omp simd reduction(& : finite)
  for (int64_t i = 0; i < n; ++i) finite &= static_cast<int>(is_finite(a[i])) & static_cast<int>(is_finite(b[i]));
  return finite;
}

// Map: the transform. FiniteMap: a cheaper one for chunks in which every bound is finite.
template <typename Storage, typename Program, typename Map, typename FiniteMap, bool by_element>
void run(const ElementwiseCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  constexpr int bounds = by_element ? 2 : 0;
  Input<Storage> stored[1 + Program::inputs];
  Input<T> lower, upper;
  stored[0].open(call, 0);
  for (int k = 0; k < Program::inputs; ++k) stored[1 + k].open(call, 1 + bounds + k);
  if constexpr (by_element) lower.open(call, 1), upper.open(call, 2);
  const Bounds<T> scalars = by_element ? Bounds<T>{} : bounds_of_scalars<Storage>(call.lower, call.upper);

  alignas(64) T results[Program::outputs][chunk];
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t n = std::min(chunk, end - start);
    const T* in[operands<Program, by_element>];
    in[0] = stored[0].fetch(start, n);
    for (int k = 0; k < Program::inputs; ++k) in[1 + bounds + k] = stored[1 + k].fetch(start, n);
    T* out[Program::outputs] = {};
    for (int k = 0; k < Program::outputs; ++k) {
      out[k] = results[k];
      if constexpr (std::is_same_v<Storage, T>)
        if (call.outputs[k]) out[k] = static_cast<T*>(call.outputs[k]) + start;
    }
    if constexpr (by_element) {
      in[1] = lower.fetch(start, n);
      in[2] = upper.fetch(start, n);
      if (all_finite(in[1], in[2], n))
        Loop<Storage, Program, FiniteMap, true>::run(in, out, scalars, n);
      else
        Loop<Storage, Program, Map, true>::run(in, out, scalars, n);
    } else {
      Loop<Storage, Program, Map, false>::run(in, out, scalars, n);
    }
    if constexpr (!std::is_same_v<Storage, T>) {
      for (int k = 0; k < Program::outputs; ++k) {
        if (!call.outputs[k]) continue;
        // Gradients to bounds stay in the compute type: they are sums in waiting.
        if (k >= Program::outputs - 2 && Program::outputs > 2 && by_element) {
          std::copy_n(results[k], n, static_cast<T*>(call.outputs[k]) + start);
          continue;
        }
        write_numbers(results[k], n, static_cast<Storage*>(call.outputs[k]) + start, 1);
      }
    }
  }
}

template <typename Storage, typename Map, typename FiniteMap, bool by_element>
ElementwiseLoop pick_program(Kernel kernel) {
  switch (kernel) {
    case Kernel::forward:
      return run<Storage, Forward<false>, Map, FiniteMap, by_element>;
    case Kernel::forward_log_det:
      return run<Storage, Forward<true>, Map, FiniteMap, by_element>;
    case Kernel::backward:
      return run<Storage, Backward<false, by_element>, Map, FiniteMap, by_element>;
    case Kernel::backward_log_det:
      return run<Storage, Backward<true, by_element>, Map, FiniteMap, by_element>;
    default:
      return run<Storage, DoubleBackward<by_element>, Map, FiniteMap, by_element>;
  }
}

template <typename Map, typename FiniteMap, bool by_element>
ElementwiseLoop pick_loop(Kernel kernel, Dtype dtype) {
  return of_dtype(dtype,
                  [kernel]<typename Storage>() { return pick_program<Storage, Map, FiniteMap, by_element>(kernel); });
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
