// A step of Adam along rows of a simplex, block by block: the moments after the gradient, and the row projected from
// where Adam goes, in Adam's metric.
#pragma once

#include <array>
#include <memory>

#include "projection_steps.h"
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

// What Adam left of some rows; v is the one of which the metric is made. y may be x where rows lie side by side.
template <typename T>
struct MetricOperands {
  const T *x, *m, *v;
  T* y;
};

// A group of rows is two vectors at each of some steps. Their lanes are rows side by side, or neighbours of one row;
// such a row's last step overlaps the one before it. z is where Adam goes, u the inverse of the metric d, with no d
// less than its share of the row's largest.
template <bool along_row, typename T>
class MetricGroup {
  using V = Vector<T>;
  using Mask = decltype(V{} == V{});
  static constexpr int states = along_row ? 1 : 2;
  static constexpr int64_t stride = along_row ? group<T> : RowUnits::lanes;

 public:
  static int64_t steps(int64_t length) { return along_row ? (length + group<T> - 1) / group<T> : length; }

  // z and u: stride * steps. They may lie where x and v do if rows lie side by side.
  MetricGroup(const Adam<T>& adam, T total, T* z, T* u)
      : adam_(adam), total_(total), close_(total * T(1e-3)), z_(z), u_(u) {}

  // n: the length, or 0 where that is not known before.
  template <int n>
  CO_HD void project(int64_t length, const MetricOperands<T>& row) {
    const int64_t whole = along_row ? length / group<T> : length, end = steps(length);
    const int64_t last = length - group<T>, stale = end * group<T> - length;  // along a row

    V largest[2] = {}, lambda[2] = {}, slope[2] = {}, rest[2];
    const T half_scale = adam_.root_scale / 2;
    const auto measure = [&](int v, int64_t at, int64_t from) CO_INLINE {
      const V d = twice_root(load(row.v + from)) * half_scale + adam_.eps;
      store(u_ + at, d);
      largest[v] = larger_of(largest[v], d);
    };
    for_each<n>(0, whole, 0, measure);
    if (along_row) for_each<0>(whole, end, last, measure);
    combine(largest, Larger());
    for (V& of_row : largest) of_row *= adam_floor<T>;

    // The support of x has a lambda that is no larger than that of all, and mostly is that already.
    const auto aim = [&](int v, int64_t at, int64_t from, Mask counts) CO_INLINE {
      const V d = larger_of(load(u_ + at), largest[v]), u = reciprocal(d), x = load(row.x + from);
      V z = adam_target(adam_, x, load(row.m + from) * u);
      if (along_row) z = counts ? z : V{} - std::numeric_limits<T>::infinity();
      store(z_ + at, z);
      store(u_ + at, u);
      const auto inside = (x > V{}) & counts;
      lambda[v] = inside ? lambda[v] + z : lambda[v];
      slope[v] = inside ? slope[v] + u : slope[v];
    };
    const Mask all = V{} == V{};
    for_each<n>(0, whole, 0, [&](int v, int64_t at, int64_t from) CO_INLINE { aim(v, at, from, all); });
    if (along_row) {
      V lane;
      for (int l = 0; l < width<T>; ++l) lane[l] = T(l);
      for_each<0>(whole, end, last, [&](int v, int64_t at, int64_t from) CO_INLINE {
        aim(v, at, from, lane >= V{} + T(stale - v * width<T>));
      });
    }
    combine(lambda, Plus());
    combine(slope, Plus());
    for (int s = 0; s < states; ++s) lambda[s] = (lambda[s] - total_) * reciprocal(slope[s]);

    climb<n>(end, lambda, slope, rest);
    const auto finish = [&](int v, int64_t at, int64_t from) CO_INLINE {
      const V u = load(u_ + at);
      const int s = along_row ? 0 : v;
      store(row.y + from, value_of_rest((load(z_ + at) - lambda[s] * u) - rest[s] * u));
    };
    if (along_row) for_each<0>(whole, end, last, finish);  // the step before overwrites what overlaps
    for_each<n>(0, whole, 0, finish);
  }

 private:
  static constexpr int most_readings = 32, steps_per_sum = 16;

  // body(vector, where its numbers are, where those of operands are) for steps [begin, end), with those of operands
  // from `first` on.
  template <int n, typename Body>
  CO_HD static void for_each(int64_t begin, int64_t end, int64_t first, const Body& body) {
    const auto step = [&](int64_t k) CO_INLINE {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) body(v, k * stride + v * width<T>, (k - begin) * stride + v * width<T> + first);
    };
    if constexpr (n > 0) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) step(k);
    } else {
      for (int64_t k = begin; k < end; ++k) step(k);
    }
  }

  // Of a row: every lane gets what all have together.
  template <typename Combine>
  CO_HD static void combine(V (&values)[2], const Combine& of) {
    if (along_row) values[0] = values[1] = V{} + across<T, T>(of(values[0], values[1]), of);
  }

  // How much more than total is left at lambda, and the sum of u of what is left.
  template <int n>
  CO_HD void read(int64_t steps, const V (&lambda)[2], V (&excess)[2], V (&inside)[2]) const {
    const auto add = [&](int64_t begin, int64_t end, V(&sum)[2]) CO_INLINE {
      for_each<n>(begin, end, 0, [&](int v, int64_t at, int64_t) CO_INLINE {
        const V u = load(u_ + at), left = load(z_ + at) - lambda[along_row ? 0 : v] * u;
        const auto out = left <= V{};
        sum[v] = out ? sum[v] : sum[v] + left;
        inside[v] = out ? inside[v] : inside[v] + u;
      });
    };
    for (int v = 0; v < 2; ++v) excess[v] = V{} - total_, inside[v] = V{};
    if (along_row) excess[0] = excess[1] = V{}, excess[0][0] = -total_;
    if (n > 0) {
      add(0, n, excess);
    } else {
      V lost[2] = {};
      for (int64_t k = 0; k < steps; k += steps_per_sum) {
        V sum[2] = {};
        add(k, std::min<int64_t>(k + steps_per_sum, steps), sum);
        for (int v = 0; v < 2; ++v) {
          V rounding;
          excess[v] = two_sum(excess[v], sum[v], rounding);
          lost[v] += rounding;
        }
      }
      for (int v = 0; v < 2; ++v) excess[v] += lost[v];
    }
    combine(excess, Plus());
    combine(inside, Plus());
  }

  CO_HD static V size_of(V v) { return v < V{} ? -v : v; }

  // Newton's method, up to where the support stays. lambda + rest is what leaves a row total.
  template <int n>
  CO_HD void climb(int64_t steps, V (&lambda)[2], const V (&slope)[2], V (&rest)[2]) {
    V excess[2], inside[2];
    read<n>(steps, lambda, excess, inside);
    bool done = true;
    for (int s = 0; s < states; ++s) {
      rest[s] = excess[s] * reciprocal(inside[s]);
      done &= !any(~((inside[s] == slope[s]) & (size_of(excess[s]) <= close_)));
    }
    if (done) return;
    Climb all{{lambda[0], lambda[1]}, {slope[0], slope[1]}, {}, {excess[0], excess[1]}, {inside[0], inside[1]}};
    climb_on(steps, all);
    for (int s = 0; s < states; ++s) lambda[s] = all.lambda[s], rest[s] = all.rest[s];
  }

  struct Climb {
    V lambda[2], slope[2], rest[2], excess[2], inside[2];
  };

  [[gnu::noinline]] void climb_on(int64_t steps, Climb& at) {
    constexpr T eps = std::numeric_limits<T>::epsilon();
    Mask going[2], off[2];
    for (int s = 0; s < states; ++s) going[s] = off[s] = V{} == V{};
    for (int readings = 1;; ++readings) {
      bool again = false;
      for (int s = 0; s < states; ++s) {
        const V size = size_of(at.excess[s]), rise = at.excess[s] * reciprocal(at.inside[s]);
        const auto unsettled = going[s] & (at.inside[s] != at.slope[s]) & (size > 8 * eps * total_);
        at.rest[s] = going[s] ? rise : at.rest[s];
        off[s] = going[s] ? ~(size <= close_) : off[s];
        at.lambda[s] = unsettled ? at.lambda[s] + rise : at.lambda[s];
        at.slope[s] = at.inside[s];
        going[s] = unsettled;
        again |= any(unsettled);
      }
      if (!again || readings == most_readings) break;
      read<0>(steps, at.lambda, at.excess, at.inside);
    }
    for (int s = 0; s < states; ++s) off[s] |= going[s];
    if (any(off[0]) || any(off[states - 1])) project_anew(steps, off, at.lambda, at.rest);
  }

  // Rows that have no such lambda, or numbers so much larger than total that they need more digits of it.
  [[gnu::noinline]] void project_anew(int64_t steps, const Mask (&off)[2], V (&lambda)[2], V (&rest)[2]) {
    const std::unique_ptr<T[]> memory(new T[2 * steps * group<T>]);
    T *const y = memory.get(), *const d = y + steps * group<T>;
    const auto each = [&](const auto& body) CO_INLINE {
      for (int64_t k = 0; k < steps; ++k)
        for (int v = 0; v < 2; ++v) body(v, k * stride + v * width<T>, k * group<T> + v * width<T>);
    };
    each([&](int, int64_t from, int64_t to) CO_INLINE {
      store(y + to, load(z_ + from));
      store(d + to, 1 / load(u_ + from));
    });
    const int64_t length = along_row ? steps * group<T> : steps;
    ProjectionScratch scratch(length);
    constrained_ops::CO_LEVEL::project<true, along_row>(length, group<T>, y, d, y, total_, scratch.live());
    each([&](int v, int64_t to, int64_t from) CO_INLINE {
      const Mask rows = off[along_row ? 0 : v];
      store(z_ + to, rows ? load(y + from) : load(z_ + to));
    });
    for (int s = 0; s < states; ++s) {
      lambda[s] = off[s] ? V{} : lambda[s];
      rest[s] = off[s] ? V{} : rest[s];
    }
  }

  const Adam<T> adam_;
  const T total_, close_;
  T *const z_, *const u_;
};

// The rows of one block after another, [outer, length, inner]: short ones as columns of a tile, long ones alone.
template <typename T>
class MetricProjection {
 public:
  static constexpr int64_t shortest_row = 96;  // of those that follow each other and go alone

  MetricProjection(const Adam<T>& adam, T total, const RowLayout& rows, const StepBlocks& blocks)
      : adam_(adam),
        total_(total),
        length_(rows.length),
        alone_(length_ > (rows.inner == 1 ? shortest_row - 1 : longest_in_tile)),
        tiles_(!alone_           ? 3
               : rows.inner == 1 ? 2
                                 : 5,
               alone_ ? MetricGroup<true, T>::steps(length_) : length_, alone_ ? group<T> : RowUnits::lanes) {
    constexpr int64_t lanes = RowUnits::lanes;
    const int64_t tile = blocks.outers * blocks.lanes;
    if (!alone_ && (tile % lanes != 0 || rows.outer % blocks.outers != 0 || rows.inner % blocks.lanes != 0))
      for (int i = 0; i < 3; ++i) std::fill_n(tiles_.at(i), length_ * lanes, T(1));  // lanes without a row
  }

  // v is the one of which the metric is made. `ahead`: what is read next, laid out as the rows are; or nulls.
  void operator()(const RowLayout& rows, T* x, const T* m, const T* v, const std::array<const T*, 4>& ahead) {
    if (alone_)
      for (int64_t row = 0; row < rows.outer * rows.inner; ++row) {
        const int64_t first = row / rows.inner * length_ * rows.inner + row % rows.inner;
        fetch_next(ahead, row * length_, length_);
        project_row(rows.inner, x + first, m + first, v + first);
      }
    else
      project_tiles(rows, x, m, v, ahead);
  }

 private:
  static constexpr int64_t longest_in_tile = 1024;

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
      rows.load(x, tiles_.at(0));
      rows.load(v, tiles_.at(1));
      rows.load(m, tiles_.at(2));
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
      rows.store(tiles_.at(0), x);
    }
  }

  template <int n>
  [[gnu::noinline]] void project_columns() {
    for (int64_t lane = 0; lane < RowUnits::lanes; lane += group<T>) {
      T *const z = tiles_.at(0) + lane, *const u = tiles_.at(1) + lane;
      MetricGroup<false, T>(adam_, total_, z, u).template project<n>(length_, {z, tiles_.at(2) + lane, u, z});
    }
  }

  // A row whose elements are `inner` apart.
  [[gnu::noinline]] void project_row(int64_t inner, T* x, const T* m, const T* v) {
    MetricGroup<true, T> row(adam_, total_, tiles_.at(0), tiles_.at(1));
    if (inner == 1) return row.template project<0>(length_, {x, m, v, x});
    const T* const from[] = {x, m, v};
    for (int i = 0; i < 3; ++i) read_numbers(from[i], inner, length_, tiles_.at(2 + i));
    row.template project<0>(length_, {tiles_.at(2), tiles_.at(3), tiles_.at(4), tiles_.at(2)});
    write_numbers(tiles_.at(2), length_, x, inner);
  }

  const Adam<T> adam_;
  const T total_;
  const int64_t length_;
  const bool alone_;
  const Tiles<T> tiles_;
};

template <typename Storage, typename State>
void step_simplex(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const StepBlocks given(slot.rows),
      blocks = numbers.euclidean ? given : StepBlocks(slot.rows, MetricProjection<T>::shortest_row);
  const int64_t ratio = given.outers / blocks.outers;
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
