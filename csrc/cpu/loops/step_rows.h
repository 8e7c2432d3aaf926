// A step along rows, block by block: what it needs of a block several times over stays in cache. A block whose numbers
// lie one after the other in the compute type is worked on where it lies, others on copies.
#pragma once

#include <memory>

#include "simplex_blocks.h"
#include "step_elements.h"
#include "vectors.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;

// One block: `runs` runs of `length` numbers, `apart` from each other in memory; local copies have no gaps.
struct StepBlock {
  int64_t offset, runs, length, apart;
  RowLayout local;

  StepBlock(const RowLayout& layout, const StepBlocks& blocks, int64_t index) {
    const int64_t size = layout.length * layout.inner;
    if (blocks.per_outer == 1) {
      const int64_t first = index * blocks.outers, outers = std::min(blocks.outers, layout.outer - first);
      local = {outers, layout.length, layout.inner};
      offset = first * size;
      runs = 1;
      length = outers * size;
    } else {
      const int64_t lane = index % blocks.per_outer * blocks.lanes;
      local = {1, layout.length, std::min(blocks.lanes, layout.inner - lane)};
      offset = index / blocks.per_outer * size + lane;
      runs = layout.length;
      length = local.inner;
    }
    apart = layout.inner;
  }

  int64_t numel() const { return runs * length; }

  template <typename Stored, typename T>
  bool in_place() const {
    return runs == 1 && std::is_same_v<std::remove_const_t<Stored>, T>;
  }
  // `data` of the whole parameter. Reads the block, unless it is only to be written.
  template <typename Stored, typename T>
  T* open(Stored* data, T* copy, bool read = true) const {
    if constexpr (std::is_same_v<std::remove_const_t<Stored>, T>)
      if (runs == 1) return const_cast<T*>(data) + offset;
    if (read)
      for (int64_t r = 0; r < runs; ++r) read_numbers(data + offset + r * apart, 1, length, copy + r * length);
    return copy;
  }
  template <typename Stored, typename T>
  void close(Stored* data, const T* values) const {
    if (in_place<Stored, T>()) return;
    for (int64_t r = 0; r < runs; ++r) write_numbers(values + r * length, length, data + offset + r * apart, 1);
  }
};

// Room for the copies of one thread.
template <typename T>
class StepScratch {
 public:
  StepScratch(const StepSlot& slot, const StepBlocks& blocks, int copies)
      : size_(blocks.outers * blocks.lanes * slot.rows.length), memory_(new T[copies * size_]) {}
  T* at(int copy) const { return memory_.get() + copy * size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> memory_;
};

// Adam without a constraint on y, a block in the compute type, with moments in memory.
template <typename State, typename T>
void step_block(const StepSlot& slot, const Adam<T>& adam, const StepBlock& block, const T* grad, T* y) {
  constexpr bool converts = !std::is_same_v<State, T>;
  alignas(64) T buffers[converts ? 3 : 1][step_chunk];
  const auto buffer = [&](int i) { return buffers[converts ? i : 0]; };
  const auto loop = pick_step<T>(StepKind::plain, slot.max_exp_avg_sq);
  for (int64_t r = 0; r < block.runs; ++r) {
    for (int64_t start = 0; start < block.length; start += step_chunk) {
      const int64_t n = std::min(step_chunk, block.length - start), at = block.offset + r * block.apart + start;
      State *m = advanced<State>(slot.exp_avg, at), *v = advanced<State>(slot.exp_avg_sq, at),
            *largest_v = advanced<State>(slot.max_exp_avg_sq, at);
      const int64_t here = r * block.length + start;
      const StepChunk<T> chunk{grad + here,
                               y + here,
                               nullptr,
                               opened(m, n, buffer(0)),
                               opened(v, n, buffer(1)),
                               opened(largest_v, n, buffer(2)),
                               nullptr,
                               nullptr};
      loop(adam, {}, n, chunk);
      closed(m, n, chunk.m);
      closed(v, n, chunk.v);
      closed(largest_v, n, chunk.largest_v);
    }
  }
}

template <typename Storage, typename State>
void step_softmax(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const StepBlocks blocks(slot.rows);
  const auto adam = numbers.adam.as<T>();
  const StepScratch<T> scratch(slot, blocks, 3);
  const T smallest = next_above<Storage>(T(0));
  const RowLoop backward = softmax_loop(Kernel::backward, dtype_of<T>),
                forward = softmax_loop(Kernel::forward, dtype_of<T>);
  for (int64_t index = begin; index < end; ++index) {
    const StepBlock block(slot.rows, blocks, index);
    const int64_t units = softmax_units(block.local).count;
    Storage* param = static_cast<Storage*>(slot.param);
    const T* grad = block.open(static_cast<const Storage*>(grads), scratch.at(0));
    T* raw = block.open(static_cast<T*>(slot.raw), scratch.at(1));
    T* x = block.open(param, scratch.at(2), false);  // holds the gradient to raw first
    backward(RowCall{block.local, {raw, grad}, {x}}, 0, units);
    step_block<State>(slot, adam, block, x, raw);
    block.close(static_cast<T*>(slot.raw), raw);
    forward(RowCall{block.local, {raw}, {x}}, 0, units);
    if constexpr (!std::is_same_v<Storage, T>)  // what T can hold next to 0 and Storage cannot
      for (int64_t i = 0; i < block.numel(); ++i) x[i] = x[i] > T(0) && x[i] < smallest ? smallest : x[i];
    block.close(param, x);
  }
}

// The moments after a gradient, and Adam's metric. Then, with the metric floored, y.
template <bool amsgrad, typename T>
[[gnu::noinline]] void metric_loop(const Adam<T> adam, int64_t n, const T* __restrict grad, const T* __restrict x,
                                   T* __restrict m, T* __restrict v, T* __restrict largest_v, T* __restrict d) {
  in_strides(
      n, [&](int64_t i) CO_INLINE { fetch_ahead(i, grad, x, m, v); },
      [&](int64_t i) CO_INLINE {
        Moments<T> moments{m[i], v[i], T(0)};
        if constexpr (amsgrad) moments.largest_v = largest_v[i];
        d[i] = adam_metric<amsgrad>(adam, grad[i] * adam.grad_factor, x[i], moments);
        m[i] = moments.m;
        v[i] = moments.v;
        if constexpr (amsgrad) largest_v[i] = moments.largest_v;
      });
}

// d raised to what it must be at least, and turned into its inverse u, in place.
template <typename T>
CO_HD void invert_metric(int64_t n, T floor, T* d) {
  const auto invert = [=](T* numbers)
                          CO_INLINE { store(numbers, reciprocal(larger_of(load(numbers), Vector<T>{} + floor))); };
  const int64_t whole = n / width<T> * width<T>;
  for (int64_t i = 0; i < whole; i += width<T>) invert(d + i);
  if (whole == n) return;
  T rest[width<T>] = {};
  std::copy(d + whole, d + n, rest);
  invert(rest);
  std::copy_n(rest, n - whole, d + whole);
}

// Rows in registers: the metric d becomes u, and y where Adam goes in it. No d is less than its share of the row's
// largest. Where a d is NaN, so is y.
struct TargetRows {
  template <typename T>
  using Common = const Adam<T>&;
  template <typename Block, typename T>
  static void blocks(int64_t count, int64_t length, const Adam<T>& adam, const T* const* in, T* const* out) {
    const T *const x = in[0], *const m = in[1];
    T *const d = out[0], *const y = out[1];
    for (int64_t at = 0; at < count * Block::rows * length; at += Block::rows * length) {
      Block u(d + at, length), target(x + at, length);
      const Block largest = u.along_rows(Larger()), moment(m + at, length);
#pragma omp simd simdlen(Block::lanes)
      for (int i = 0; i < Block::size; ++i) {
        const T floor = adam_floor<T> * largest[i];
        u[i] = floor > u[i] ? floor : u[i];
      }
      u.invert();
#pragma omp simd simdlen(Block::lanes)
      for (int i = 0; i < Block::size; ++i) target[i] = adam_target(adam, target[i], moment[i] * u[i], T(1));
      u.store(d + at, length);
      target.store(y + at, length);
    }
  }
};

// The same for rows [outer, length, inner] of any length; `largest` has room for `inner` numbers.
template <typename T>
[[gnu::noinline]] void target_rows(const Adam<T> adam, const RowLayout& rows, const T* __restrict x,
                                   const T* __restrict m, T* __restrict d, T* __restrict y, T* __restrict largest) {
  const auto [outer, length, inner] = rows;
  const int64_t size = length * inner, n = outer * size;
  int64_t done = 0;
  if (const auto kernel = pick_blocks<TargetRows, T>(length); kernel.run && inner == 1) {
    const T* const in[] = {x, m};
    T* const out[] = {d, y};
    const int64_t count = outer / kernel.rows;
    kernel.run(count, length, adam, in, out);
    done = count * kernel.rows * size;
  }
  for (int64_t at = done; at < n; at += size) {
    T* const row = d + at;
    if (inner == 1) {
      T top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t k = 0; k < length; ++k) top = row[k] > top ? row[k] : top;
      invert_metric(length, adam_floor<T> * top, row);
      continue;
    }
    std::fill_n(largest, inner, T(0));
    for (int64_t k = 0; k < length; ++k) {
#pragma GCC ivdep
      for (int64_t l = 0; l < inner; ++l)
        largest[l] = row[k * inner + l] > largest[l] ? row[k * inner + l] : largest[l];
    }
    for (int64_t k = 0; k < length; ++k) {
#pragma GCC ivdep
      for (int64_t l = 0; l < inner; ++l) {
        const T floor = adam_floor<T> * largest[l];
        row[k * inner + l] = floor > row[k * inner + l] ? floor : row[k * inner + l];
      }
    }
    invert_metric(size, T(0), row);
  }
#pragma GCC ivdep
  for (int64_t i = done; i < n; ++i) y[i] = adam_target(adam, x[i], m[i] * d[i], T(1));
}

template <typename Storage, typename State>
void step_simplex(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const StepBlocks blocks(slot.rows);
  const auto adam = numbers.adam.as<T>();
  const StepScratch<T> scratch(slot, blocks, 8);
  const auto project =
      projection_loop(numbers.euclidean ? Projection::forward : Projection::forward_inverse, dtype_of<T>);
  const auto metric = slot.max_exp_avg_sq ? metric_loop<true, T> : metric_loop<false, T>;
  for (int64_t index = begin; index < end; ++index) {
    const StepBlock block(slot.rows, blocks, index);
    const int64_t units = projection_units(block.local, true).count, n = block.numel();
    Storage* param = static_cast<Storage*>(slot.param);
    State *exp_avg = static_cast<State*>(slot.exp_avg), *exp_avg_sq = static_cast<State*>(slot.exp_avg_sq),
          *max_exp_avg_sq = static_cast<State*>(slot.max_exp_avg_sq);
    const T* grad = block.open(static_cast<const Storage*>(grads), scratch.at(0));
    T *x = block.open(param, scratch.at(1)), *y = scratch.at(7);  // a projection does not work in place
    ProjectionCall call{block.local, {y}, {x}, slot.total};
    if (numbers.euclidean) {
      std::copy_n(x, n, y);
      step_block<State>(slot, adam, block, grad, y);
    } else {
      T *m = block.open(exp_avg, scratch.at(2)), *v = block.open(exp_avg_sq, scratch.at(3)),
        *largest_v = max_exp_avg_sq ? block.open(max_exp_avg_sq, scratch.at(4)) : nullptr, *d = scratch.at(5);
      metric(adam, n, grad, x, m, v, largest_v, d);
      target_rows(adam, block.local, x, m, d, y, scratch.at(6));
      block.close(exp_avg, m);
      block.close(exp_avg_sq, v);
      if (max_exp_avg_sq) block.close(max_exp_avg_sq, largest_v);
      call.inputs[1] = d;
      // The next block meanwhile, unless that is more at a time than a processor has places for.
      if (n <= StepBlocks::elements && block.in_place<Storage, T>() && block.in_place<State, T>())
        call.ahead = {grad + n, x + n, m + n, v + n};
    }
    project(call, 0, units);
    block.close(param, x);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
