// A step of Adam along rows of a simplex, block by block: the moments after the gradient, and the row projected from
// where Adam goes, in Adam's metric. Rows that follow each other in memory are read there, and once, if they are two
// vectors long or more, or an even share of one. Others go through tiles or copies, after a pass for their moments.
#pragma once

#include "metric_columns.h"
#include "metric_lanes.h"
#include "metric_rows.h"
#include "step_rows.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// A block in memory, in the compute type. What follows it is asked for while it is worked on, a short block's moments
// and its projection each for half of that, since in a hurry memory does not keep up, and in between has nothing to do.
template <bool amsgrad, typename T>
struct SimplexBlock {
  using V = Vector<T>;
  using Mask = decltype(V{} == V{});

  int64_t n;
  const T* grad;
  T *x, *m, *v, *largest_v;  // largest_v: with amsgrad
  int64_t ahead;             // of what is asked for: n for a short block, less for a long one, 0 for nothing

  // Moments after the gradient, of the vector at i, of which only what is fresh is written. Returns the v of which the
  // metric is made.
  CO_HD V step_moments(const Adam<T>& adam, int64_t i, Mask fresh, V& new_m) const {
    if (ahead > 0) {
      fetch<Cache::second>(i + ahead, width<T>, grad, v);
      if constexpr (amsgrad) fetch<Cache::second>(i + ahead, width<T>, largest_v);
      if (ahead < n) fetch<Cache::second>(i + ahead, width<T>, x, m);
    }
    Moments<V> moments{load(m + i), load(v + i), V{}};
    if constexpr (amsgrad) moments.largest_v = load(largest_v + i);
    const Moments<V> before = moments;
    const V of_metric = adam_moments<amsgrad>(adam, adam.scaled(load(grad + i)), load(x + i), moments);
    store(m + i, fresh ? moments.m : before.m);
    store(v + i, fresh ? moments.v : before.v);
    if constexpr (amsgrad) store(largest_v + i, fresh ? moments.largest_v : before.largest_v);
    new_m = moments.m;
    return of_metric;
  }

  // For the projection of so many numbers at i.
  CO_HD void fetch_projected(int64_t i, int64_t count) const {
    if (ahead == n) fetch<Cache::second>(i + ahead, count, x, m);
  }

  // run(block) for all whole `batch`es and, on copies with neighbours of no account, for what is left.
  template <int batch, typename Run>
  CO_HD void in_batches(const Run& run) const {
    const int64_t whole = n / batch * batch, rest = n - whole;
    if (whole > 0) run(SimplexBlock{whole, grad, x, m, v, largest_v, ahead == n ? whole : ahead});
    if (rest == 0) return;
    T copies[5][batch];
    const T* const from[] = {grad, x, m, v, largest_v};
    for (int j = 0; j < 4 + amsgrad; ++j) {
      std::fill_n(copies[j] + rest, batch - rest, T(1));
      std::copy_n(from[j] + whole, rest, copies[j]);
    }
    run(SimplexBlock{batch, copies[0], copies[1], copies[2], copies[3], copies[4], 0});
    T* const to[] = {x, m, v, largest_v};
    for (int j = 0; j < 3 + amsgrad; ++j) std::copy_n(copies[1 + j], rest, to[j] + whole);
  }
};

template <bool amsgrad, typename T>
class SimplexStep {
  using V = Vector<T>;
  using Block = SimplexBlock<amsgrad, T>;
  static constexpr int64_t longest_in_tile = 1024;

 public:
  static constexpr int64_t shortest_row = 2 * width<T>;  // of those that stay where they lie, whatever their length

  SimplexStep(const Adam<T>& adam, T total, const RowLayout& rows, const StepBlocks& blocks)
      : adam_(adam),
        total_(total),
        length_(rows.length),
        in_lanes_(rows.inner == 1 ? pick_in_lanes(rows.length) : nullptr),
        in_tiles_(!in_lanes_ && (rows.inner == 1 ? length_ < shortest_row : length_ <= longest_in_tile)),
        at_once_(std::min<int64_t>(blocks.outers, MetricRows<T>::lanes)),
        memory_(in_lanes_         ? 0
                : in_tiles_       ? 3
                : rows.inner == 1 ? 2
                                  : 5,
                in_tiles_ ? length_ : MetricRows<T>::room(length_), in_tiles_ ? RowUnits::lanes : at_once_) {
    const int64_t tile = blocks.outers * blocks.lanes;
    if (in_tiles_ && (tile % RowUnits::lanes != 0 || rows.outer % blocks.outers != 0 || rows.inner % blocks.lanes != 0))
      for (int i = 0; i < 3; ++i) std::fill_n(memory_.at(i), length_ * RowUnits::lanes, T(1));  // lanes without a row
  }

  void operator()(const RowLayout& rows, const Block& block) {
    if (in_lanes_) return in_lanes_(adam_, total_, block);
    if (!in_tiles_ && rows.inner == 1) return in_rows(rows.outer, block);
    step_moments(adam_, block);
    if (in_tiles_)
      project_tiles(rows, block);
    else
      project_apart(rows, block);
  }

 private:
  using InLanes = void (*)(const Adam<T>&, T total, const Block&);
  static constexpr auto everything = V{} == V{};

  template <int length>
  [[gnu::noinline]] static void in_lanes(const Adam<T>& of, T total, const Block& all) {
    constexpr int batches = length <= 4 ? 4 : length <= 8 ? 2 : 1, batch = batches * MetricLanes<T, length>::batch;
    const Adam<T> adam = of;  // a local, which no store can change
    const MetricLanes<T, length> rows(adam, total);
    all.template in_batches<batch>([&](const Block block) {
      static_assert(batch <= StepBlocks::elements && RowUnits::lanes * length <= StepBlocks::elements);
      alignas(64) T d[StepBlocks::elements];  // no block of such rows is larger
      for (int64_t i = 0; i < block.n; i += width<T>) {
        V m;
        store(d + i, rows.metric(block.step_moments(adam, i, everything, m)));
      }
      for (int64_t i = 0; i < block.n; i += batch) {
        block.fetch_projected(i, batch);
        rows.template project<batches>(d + i, block.m + i, block.x + i);
      }
    });
  }

  static InLanes pick_in_lanes(int64_t length) {
    InLanes picked = nullptr;
    const auto consider = [&](auto lanes) {
      if constexpr (lanes <= width<T>)
        if (length == lanes) picked = in_lanes<lanes>;
    };
    consider(std::integral_constant<int, 2>());
    consider(std::integral_constant<int, 4>());
    consider(std::integral_constant<int, 8>());
    consider(std::integral_constant<int, 16>());
    return picked;
  }

  void in_rows(int64_t count, const Block& block) {
    const Adam<T> adam = adam_;
    MetricRows<T> rows(adam, total_, length_, memory_.at(0), memory_.at(1));
    for (int64_t row = 0; row < count; row += at_once_) {
      const int64_t first = row * length_;
      // By value, for no store can change that.
      const auto v_at = [adam, block, first](int64_t i, typename Block::Mask fresh) CO_INLINE {
        V m;
        return block.step_moments(adam, first + i, fresh, m);
      };
      const auto fetch = [block, first](int64_t i) CO_INLINE { block.fetch_projected(first + i, width<T>); };
      const auto project = [&]<int vectors>(std::integral_constant<int, vectors>) {
        rows.template project<vectors>(static_cast<int>(std::min(at_once_, count - row)), v_at, fetch, block.x + first,
                                       block.m + first, block.x + first);
      };
      if (length_ == shortest_row)
        project(std::integral_constant<int, shortest_row / width<T>>());
      else
        project(std::integral_constant<int, 0>());
    }
  }

  [[gnu::noinline]] static void step_moments(const Adam<T>& of, const Block& all) {
    const Adam<T> adam = of;
    all.template in_batches<group<T>>([&](const Block block) {
      for (int64_t i = 0; i < block.n; i += width<T>) {
        V m;
        block.step_moments(adam, i, everything, m);
      }
    });
  }

  static const T* of_metric(const Block& block) { return amsgrad ? block.largest_v : block.v; }

  void project_tiles(const RowLayout& layout, const Block& block) {
    const RowUnits units(layout, longest_in_tile);
    for (int64_t unit = 0; unit < units.count; ++unit) {
      const TileRows rows(layout, units, unit);
      rows.load(block.x, memory_.at(0));
      rows.load(of_metric(block), memory_.at(1));
      rows.load(block.m, memory_.at(2));
      block.fetch_projected(rows.first, rows.count * rows.length);
      length_ == 3 ? project_columns<3>() : project_columns<0>();
      rows.store(memory_.at(0), block.x);
    }
  }

  template <int n>
  [[gnu::noinline]] void project_columns() {
    for (int64_t lane = 0; lane < RowUnits::lanes; lane += group<T>)
      MetricColumns<T>(adam_, total_, length_, memory_.at(0) + lane, memory_.at(2) + lane, memory_.at(1) + lane)
          .template project<n>();
  }

  // Long rows with neighbours side by side, by copies of one at a time.
  void project_apart(const RowLayout& layout, const Block& block) {
    MetricRows<T> rows(adam_, total_, length_, memory_.at(0), memory_.at(1));
    T *const x = memory_.at(2), *const m = memory_.at(3), *const v = memory_.at(4);
    const auto v_at = [v](int64_t i, typename Block::Mask) CO_INLINE { return load(v + i); };
    for (int64_t row = 0; row < layout.outer * layout.inner; ++row) {
      const int64_t first = row / layout.inner * length_ * layout.inner + row % layout.inner;
      read_numbers(block.x + first, layout.inner, length_, x);
      read_numbers(block.m + first, layout.inner, length_, m);
      read_numbers(of_metric(block) + first, layout.inner, length_, v);
      rows.template project<0>(1, v_at, [](int64_t) CO_INLINE {}, x, m, x);
      write_numbers(x, length_, block.x + first, layout.inner);
    }
  }

  const Adam<T> adam_;
  const T total_;
  const int64_t length_;
  const InLanes in_lanes_;  // null unless rows share vectors evenly
  const bool in_tiles_;
  const int64_t at_once_;  // rows that are neither
  const Tiles<T> memory_;
};

template <bool amsgrad, typename Storage, typename State>
void step_in_metric(const StepSlot& slot, const void* grads, const Adam<compute_t<Storage>>& adam, int64_t begin,
                    int64_t end) {
  using T = compute_t<Storage>;
  // The plan counts blocks of whole tiles, which only rows in tiles want.
  const StepBlocks blocks(slot.rows, SimplexStep<amsgrad, T>::shortest_row);
  const int64_t ratio = StepBlocks(slot.rows).outers / blocks.outers;
  const StepScratch<T> scratch(slot, blocks, 5);
  SimplexStep<amsgrad, T> step(adam, T(slot.total), slot.rows, blocks);
  for (int64_t index = begin * ratio; index < std::min(end * ratio, blocks.count); ++index) {
    const StepBlock block(slot.rows, blocks, index);
    const int64_t n = block.numel();
    const bool in_place = block.in_place<Storage, T>() && block.in_place<State, T>();
    Storage* param = static_cast<Storage*>(slot.param);
    State *exp_avg = static_cast<State*>(slot.exp_avg), *exp_avg_sq = static_cast<State*>(slot.exp_avg_sq),
          *max_exp_avg_sq = static_cast<State*>(slot.max_exp_avg_sq);
    // Of more at a time than such a block a processor has no places for.
    const int64_t ahead = !in_place || n < loop_chunk ? 0 : n <= StepBlocks::elements ? n : loop_chunk;
    const SimplexBlock<amsgrad, T> in_compute{n,
                                              block.open(static_cast<const Storage*>(grads), scratch.at(0)),
                                              block.open(param, scratch.at(1)),
                                              block.open(exp_avg, scratch.at(2)),
                                              block.open(exp_avg_sq, scratch.at(3)),
                                              amsgrad ? block.open(max_exp_avg_sq, scratch.at(4)) : nullptr,
                                              ahead};
    step(block.local, in_compute);
    block.close(param, in_compute.x);
    block.close(exp_avg, in_compute.m);
    block.close(exp_avg_sq, in_compute.v);
    if constexpr (amsgrad) block.close(max_exp_avg_sq, in_compute.largest_v);
  }
}

template <typename Storage, typename State>
void step_euclidean(const StepSlot& slot, const void* grads, const Adam<compute_t<Storage>>& adam, int64_t begin,
                    int64_t end) {
  using T = compute_t<Storage>;
  const StepBlocks blocks(slot.rows);
  const StepScratch<T> scratch(slot, blocks, 3);
  const auto project = projection_loop(Projection::forward, dtype_of<T>);
  for (int64_t index = begin; index < end; ++index) {
    const StepBlock block(slot.rows, blocks, index);
    Storage* param = static_cast<Storage*>(slot.param);
    const T* grad = block.open(static_cast<const Storage*>(grads), scratch.at(0));
    T *x = block.open(param, scratch.at(1)), *y = scratch.at(2);  // this projection does not work in place
    std::copy_n(x, block.numel(), y);
    step_block<State>(slot, adam, block, grad, y);
    project({block.local, {y}, {x}, slot.total}, 0, projection_units(block.local, true).count);
    block.close(param, x);
  }
}

template <typename Storage, typename State>
void step_simplex(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  const auto step = numbers.euclidean     ? step_euclidean<Storage, State>
                    : slot.max_exp_avg_sq ? step_in_metric<true, Storage, State>
                                          : step_in_metric<false, Storage, State>;
  step(slot, grads, numbers.adam.as<compute_t<Storage>>(), begin, end);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
