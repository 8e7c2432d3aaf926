// A step of Adam along rows of a simplex, block by block: the moments after the gradient, and the row projected from
// where Adam goes, in Adam's metric.
#pragma once

#include <array>

#include "projection_in_metric.h"
#include "step_rows.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <bool amsgrad, typename T>
[[gnu::noinline]] void moments_loop(const Adam<T> adam, int64_t n, const T* __restrict grad, const T* __restrict x,
                                    T* __restrict m, T* __restrict v, T* __restrict largest_v) {
  in_strides(
      n, [&](int64_t i) CO_INLINE { fetch_ahead(i, grad, x, m, v); },
      [&](int64_t i) CO_INLINE {
        Moments<T> moments{m[i], v[i], T(0)};
        if constexpr (amsgrad) moments.largest_v = largest_v[i];
        adam_moments<amsgrad>(adam, grad[i] * adam.grad_factor, x[i], moments);
        m[i] = moments.m;
        v[i] = moments.v;
        if constexpr (amsgrad) largest_v[i] = moments.largest_v;
      });
}

// The rows of one block after another, [outer, length, inner], in place of x.
template <typename T>
class MetricProjection {
  static constexpr int64_t longest_in_tile = 1024;

 public:
  static constexpr int64_t shortest_row = 2 * width<T>;  // of those that are not brought into tiles

  MetricProjection(const Adam<T>& adam, T total, const RowLayout& rows, const StepBlocks& blocks)
      : adam_(adam),
        total_(total),
        length_(rows.length),
        in_tiles_(length_ < shortest_row || (rows.inner > 1 && length_ <= longest_in_tile)),
        at_once_(std::min<int64_t>(blocks.outers, MetricRows<T>::lanes)),
        memory_(in_tiles_         ? 3
                : rows.inner == 1 ? 2
                                  : 5,
                in_tiles_ ? length_ : MetricRows<T>::room(length_), in_tiles_ ? RowUnits::lanes : at_once_) {
    const int64_t tile = blocks.outers * blocks.lanes;
    if (in_tiles_ && (tile % RowUnits::lanes != 0 || rows.outer % blocks.outers != 0 || rows.inner % blocks.lanes != 0))
      for (int i = 0; i < 3; ++i) std::fill_n(memory_.at(i), length_ * RowUnits::lanes, T(1));  // lanes without a row
  }

  // v is the one of which the metric is made. `ahead`: what is read next, laid out as the rows are; or nulls.
  void operator()(const RowLayout& rows, T* x, const T* m, const T* v, const std::array<const T*, 4>& ahead) {
    if (in_tiles_)
      project_tiles(rows, x, m, v, ahead);
    else if (rows.inner == 1)
      project_rows(rows.outer, x, m, v);
    else
      project_apart(rows, x, m, v);
  }

 private:
  // As much of what is read next as is projected now, so that it is on its way to the second-level cache meanwhile:
  // each second line, since a processor fetches that one's neighbour, too.
  CO_HD static void fetch_next(const std::array<const T*, 4>& ahead, int64_t first, int64_t n) {
    if (!ahead[0]) return;
    for (const T* operand : ahead) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(operand + first);
      for (uintptr_t at = begin; at < begin + n * sizeof(T); at += 128)
        __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    }
  }

  void project_tiles(const RowLayout& layout, T* x, const T* m, const T* v, const std::array<const T*, 4>& ahead) {
    const RowUnits units(layout, longest_in_tile);
    for (int64_t unit = 0; unit < units.count; ++unit) {
      const TileRows rows(layout, units, unit);
      rows.load(x, memory_.at(0));
      rows.load(v, memory_.at(1));
      rows.load(m, memory_.at(2));
      fetch_next(ahead, rows.first, rows.count * rows.length);
      switch (length_) {
        case 2:
          project_columns<2>();
          break;
        case 3:
          project_columns<3>();
          break;
        case 4:
          project_columns<4>();
          break;
        case 8:
          project_columns<8>();
          break;
        default:
          project_columns<0>();
      }
      rows.store(memory_.at(0), x);
    }
  }

  template <int n>
  [[gnu::noinline]] void project_columns() {
    for (int64_t lane = 0; lane < RowUnits::lanes; lane += group<T>)
      MetricColumns<T>(adam_, total_, length_, memory_.at(0) + lane, memory_.at(2) + lane, memory_.at(1) + lane)
          .template project<n>();
  }

  void project_rows(int64_t count, T* x, const T* m, const T* v) {
    MetricRows<T> rows(adam_, total_, length_, memory_.at(0), memory_.at(1));
    for (int64_t row = 0; row < count; row += at_once_) {
      const int64_t n = std::min(at_once_, count - row), at = row * length_;

      rows.project(static_cast<int>(n), x + at, m + at, v + at, x + at);
    }
  }

  // Long rows with neighbours side by side, by copies of one at a time.
  void project_apart(const RowLayout& layout, T* x, const T* m, const T* v) {
    MetricRows<T> rows(adam_, total_, length_, memory_.at(0), memory_.at(1));
    T* const copies[] = {memory_.at(2), memory_.at(3), memory_.at(4)};
    for (int64_t row = 0; row < layout.outer * layout.inner; ++row) {
      const int64_t first = row / layout.inner * length_ * layout.inner + row % layout.inner;
      const T* const from[] = {x + first, m + first, v + first};
      for (int i = 0; i < 3; ++i) read_numbers(from[i], layout.inner, length_, copies[i]);
      rows.project(1, copies[0], copies[1], copies[2], copies[0]);
      write_numbers(copies[0], length_, x + first, layout.inner);
    }
  }

  const Adam<T> adam_;
  const T total_;
  const int64_t length_;
  const bool in_tiles_;
  const int64_t at_once_;  // rows that are not in tiles
  const Tiles<T> memory_;
};

template <typename Storage, typename State>
void step_simplex(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  // The plan counts blocks of whole tiles, which only rows in tiles want.
  const StepBlocks planned(slot.rows), of_metric(slot.rows, MetricProjection<T>::shortest_row);
  const StepBlocks& blocks = numbers.euclidean ? planned : of_metric;
  const int64_t ratio = planned.outers / blocks.outers;
  const auto adam = numbers.adam.as<T>();
  const StepScratch<T> scratch(slot, blocks, 5);
  const auto moments = slot.max_exp_avg_sq ? moments_loop<true, T> : moments_loop<false, T>;
  const auto project_euclidean = projection_loop(Projection::forward, dtype_of<T>);
  MetricProjection<T> project(adam, T(slot.total), slot.rows, blocks);
  for (int64_t index = begin * ratio; index < std::min(end * ratio, blocks.count); ++index) {
    const StepBlock block(slot.rows, blocks, index);
    const int64_t n = block.numel();
    Storage* param = static_cast<Storage*>(slot.param);
    State *exp_avg = static_cast<State*>(slot.exp_avg), *exp_avg_sq = static_cast<State*>(slot.exp_avg_sq),
          *max_exp_avg_sq = static_cast<State*>(slot.max_exp_avg_sq);
    const T* grad = block.open(static_cast<const Storage*>(grads), scratch.at(0));
    T* x = block.open(param, scratch.at(1));
    if (numbers.euclidean) {
      T* y = scratch.at(2);  // this projection does not work in place
      std::copy_n(x, n, y);
      step_block<State>(slot, adam, block, grad, y);
      project_euclidean({block.local, {y}, {x}, slot.total}, 0, projection_units(block.local, true).count);
    } else {
      T *m = block.open(exp_avg, scratch.at(2)), *v = block.open(exp_avg_sq, scratch.at(3)),
        *largest_v = max_exp_avg_sq ? block.open(max_exp_avg_sq, scratch.at(4)) : nullptr;
      moments(adam, n, grad, x, m, v, largest_v);
      block.close(exp_avg, m);
      block.close(exp_avg_sq, v);
      if (max_exp_avg_sq) block.close(max_exp_avg_sq, largest_v);
      // The next block meanwhile, unless that is more at a time than a processor has places for.
      std::array<const T*, 4> ahead = {};
      if (n <= StepBlocks::elements && block.in_place<Storage, T>() && block.in_place<State, T>())
        ahead = {grad + n, x + n, m + n, v + n};
      project(block.local, x, m, largest_v ? largest_v : v, ahead);
    }
    block.close(param, x);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
