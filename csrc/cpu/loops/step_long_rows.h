// A step along rows too long for a copy of one: a pass reads them chunk by chunk, and makes what it wants of them anew.
// Neighbouring rows go side by side, as they share lines of cache.
#pragma once

#include <vector>

#include "simplex_rows.h"
#include "step_elements.h"
#include "step_rows.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Numbers [begin, begin + n) of some rows.
template <typename T>
struct RowsChunk {
  static constexpr int64_t most = std::max(128, 32 * width<T>);  // few enough to add up plainly
  static constexpr int64_t least = 64;                           // no fewer than add_up() wants

  int64_t begin, n, rows;
  int64_t first, apart;  // where the first row's first number is, and how far its next one

  // Those of row r from r * most on: where they lie if that is how they lie, which is of one row, else in `copy`.
  template <typename Stored>
  [[gnu::noinline]] T* open(Stored* data, T* copy, bool read = true) const {
    if (!data) return nullptr;
    if constexpr (std::is_same_v<std::remove_const_t<Stored>, T>)
      if (apart == 1) return const_cast<T*>(data) + first;
    if (read && rows == 1)
      read_numbers(data + first, apart, n, copy);
    else if (read)
      transpose(data + first, apart, copy, most, n, rows);
    return copy;
  }
  template <typename Stored>
  [[gnu::noinline]] void close(Stored* data, const T* values) const {
    if (!data || values == reinterpret_cast<const T*>(data + first)) return;
    if (rows == 1)
      write_numbers(values, n, data + first, apart);
    else
      transpose(values, most, data + first, apart, rows, n);
  }
};

// A parameter's memory, and room for copies of a chunk of each operand.
template <typename Storage, typename State>
class LongRows {
 public:
  using T = compute_t<Storage>;
  const Storage* const grad;
  Storage* const param;
  T* const raw;
  State *const m, *const v, *const largest_v;

  LongRows(const StepSlot& slot, const void* grads)
      : grad(static_cast<const Storage*>(grads)),
        param(static_cast<Storage*>(slot.param)),
        raw(static_cast<T*>(slot.raw)),
        m(static_cast<State*>(slot.exp_avg)),
        v(static_cast<State*>(slot.exp_avg_sq)),
        largest_v(static_cast<State*>(slot.max_exp_avg_sq)),
        layout_(slot.rows),
        blocks_(slot.rows),
        memory_(6, RowsChunk<T>::most, blocks_.lanes) {}

  T* copy(int i) const { return memory_.at(i); }
  int64_t rows(int64_t index) const { return StepBlock(layout_, blocks_, index).local.inner; }

  // body(chunk) for all of a block.
  template <typename Body>
  void pass(int64_t index, const Body& body) const {
    using Chunk = RowsChunk<T>;
    const StepBlock block(layout_, blocks_, index);
    const int64_t inner = layout_.inner;
    for (int64_t begin = 0, n; begin < layout_.length; begin += n) {
      const int64_t rest = layout_.length - begin;
      n = rest > Chunk::most && rest < Chunk::most + Chunk::least ? Chunk::most - Chunk::least
                                                                  : std::min(rest, Chunk::most);
      body(Chunk{begin, n, block.local.inner, block.offset + begin * inner, inner});
    }
  }

 private:
  const RowLayout layout_;
  const StepBlocks blocks_;
  const Tiles<T> memory_;
};

// Softmax as in rows_backward() and rows_forward(), with Adam on raw in between.
template <typename Storage, typename State>
void step_long_softmax(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin,
                       int64_t end) {
  using T = compute_t<Storage>;
  using Chunk = RowsChunk<T>;
  struct Row {
    T largest = -std::numeric_limits<T>::infinity(), new_largest = largest;
    T head, first;  // the row's first gradient, and the first mean, which lacks a little
    double total[2] = {}, lacks[1] = {}, new_total[1] = {};
  };
  const LongRows<Storage, State> memory(slot, grads);
  const auto adam = numbers.adam.as<T>();
  const auto adam_on_raw = pick_step<T>(StepKind::plain, slot.max_exp_avg_sq);
  const T smallest = next_above<Storage>(T(0));
  for (int64_t index = begin; index < end; ++index) {
    std::vector<Row> rows(memory.rows(index));
    const auto raw_of = [&](const Chunk& chunk) { return chunk.open(memory.raw, memory.copy(0)); };
    const auto grad_of = [&](const Chunk& chunk) -> const T* { return chunk.open(memory.grad, memory.copy(1)); };
    memory.pass(index, [&](const Chunk& chunk) {
      const T* raw = raw_of(chunk);
      for (Row& row : rows) {
        row.largest = std::max(row.largest, row_range<T, T>(raw, chunk.n).largest);
        raw += chunk.most;
      }
    });
    memory.pass(index, [&](const Chunk& chunk) {
      const T *raw = raw_of(chunk), *g = grad_of(chunk);
      for (Row& row : rows) {
        if (chunk.begin == 0) row.head = g[0];
        add_up<T>(chunk.n, row.total, [=, largest = row.largest, head = row.head](int64_t i, T* values) CO_INLINE {
          values[0] = softmax_lifted_weight(raw[i], largest);
          values[1] = values[0] * (g[i] - head);
        });
        raw += chunk.most, g += chunk.most;
      }
    });
    for (Row& row : rows) row.first = T(row.head + row.total[1] / row.total[0]);
    memory.pass(index, [&](const Chunk& chunk) {
      const T *raw = raw_of(chunk), *g = grad_of(chunk);
      for (Row& row : rows) {
        add_up<T>(chunk.n, row.lacks, [=, largest = row.largest, first = row.first](int64_t i, T* values) CO_INLINE {
          values[0] = softmax_lifted_weight(raw[i], largest) * (g[i] - first);
        });
        raw += chunk.most, g += chunk.most;
      }
    });
    memory.pass(index, [&](const Chunk& chunk) {
      T* const raw = raw_of(chunk);
      const T* const g = grad_of(chunk);
      T *const m = chunk.open(memory.m, memory.copy(2)), *const v = chunk.open(memory.v, memory.copy(3)),
               *const largest_v = chunk.open(memory.largest_v, memory.copy(4)), *const grad_raw = memory.copy(5);
      for (size_t r = 0; r < rows.size(); ++r) {
        Row& row = rows[r];
        const int64_t at = r * chunk.most;
        const T largest = row.largest, inverse_sum = T(1 / row.total[0]), first = row.first,
                mean = T(row.lacks[0] / row.total[0]);
#pragma GCC ivdep
        for (int64_t i = 0; i < chunk.n; ++i)
          grad_raw[i] =
              softmax_backward(softmax_lifted_weight(raw[at + i], largest) * inverse_sum, g[at + i] - first, mean);
        adam_on_raw(
            adam, {}, chunk.n,
            {grad_raw, raw + at, nullptr, m + at, v + at, largest_v ? largest_v + at : nullptr, nullptr, nullptr});
        row.new_largest = std::max(row.new_largest, row_range<T, T>(raw + at, chunk.n).largest);
      }
      chunk.close(memory.raw, raw);
      chunk.close(memory.m, m);
      chunk.close(memory.v, v);
      chunk.close(memory.largest_v, largest_v);
    });
    memory.pass(index, [&](const Chunk& chunk) {
      const T* raw = raw_of(chunk);
      for (Row& row : rows) {
        add_up<T>(chunk.n, row.new_total, [=, largest = row.new_largest](int64_t i, T* values) CO_INLINE {
          values[0] = softmax_lifted_weight(raw[i], largest);
        });
        raw += chunk.most;
      }
    });
    memory.pass(index, [&](const Chunk& chunk) {
      const T* raw = raw_of(chunk);
      T *const x = chunk.open(memory.param, memory.copy(1), false), *to = x;
      for (const Row& row : rows) {
        const T largest = row.new_largest, inverse_sum = T(1 / row.new_total[0]);
#pragma GCC ivdep
        for (int64_t i = 0; i < chunk.n; ++i)
          to[i] = softmax_value(raw[i], softmax_lifted_weight(raw[i], largest), inverse_sum, smallest);
        raw += chunk.most, to += chunk.most;
      }
      chunk.close(memory.param, x);
    });
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
