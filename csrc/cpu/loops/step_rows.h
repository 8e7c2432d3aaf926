// A step along rows, block by block: what it needs of a block several times over stays in cache. A block whose numbers
// lie one after the other in the compute type is worked on where it lies, others on copies.
#pragma once

#include <memory>

#include "simplex_blocks.h"
#include "step_elements.h"

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

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
