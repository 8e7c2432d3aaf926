// The projection onto the simplex of rows of float or double, and its derivatives; for all loops that need it:
//
//   ProjectionScratch scratch(length);  // one for each thread, for rows up to this length
//   project_row<weighted>(length, x, weight, y, total, scratch);
//   project_columns<weighted>(length, stride, x, weight, y, total, scratch);
//
// A row's elements follow each other in memory. Columns are RowUnits::lanes rows side by side, element k of row l at
// k * stride + l. weight is null unless weighted; y may be x. A row's result is the same whatever lies beside it.
//
// Both run the same code on a group of two vectors at a step: independent work for the processor to interleave. Lanes
// are neighbours of one row, or rows; which of the two makes a difference only to what is added up along the row.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>

#include "../../math/projection.h"
#include "vectors.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// y: projection_value in one instruction.
template <typename V>
CO_HD V value_of_rest(V rest) {
  return larger_of(rest, V{});
}

// A block is left out as a whole once none of it is of the support.
template <bool along_row>
constexpr int64_t block_steps = along_row ? 2 : 16;

// So many steps are added up plainly, such sums with what rounding takes from them. Gradients have either sign, and may
// leave next to nothing.
constexpr int64_t steps_per_sum = 64, gradient_steps_per_sum = 16;

// The blocks that are not left out.
class ProjectionScratch {
 public:
  explicit ProjectionScratch(int64_t longest_row) : live_(new int32_t[longest_row / smallest_block + 2]) {}
  int32_t* live() { return live_.get(); }

 private:
  static constexpr int64_t smallest_block = std::min(group<double> * block_steps<true>, block_steps<false>);
  const std::unique_ptr<int32_t[]> live_;
};

// A row, or rows, as blocks of steps. The end of a row that fills no whole step is a block of its own, copied to where
// numbers that change nothing follow it, and back by finish().
template <bool along_row, typename T, int inputs, int outputs>
class Blocks {
 public:
  struct Block {
    const T* in[inputs];
    T* out[outputs];
    int64_t steps;
  };

  // Any pointer may be null. `after`: what follows the end of an input.
  Blocks(int64_t length, int64_t stride, const T* const (&in)[inputs], T* const (&out)[outputs],
         const T (&after)[inputs])
      : stride_(along_row ? group<T> : stride), steps_(along_row ? length / group<T> : length) {
    rest_ = along_row ? length - steps_ * group<T> : 0;
    whole_ = (steps_ + block_steps<along_row> - 1) / block_steps<along_row>;
    std::copy_n(in, inputs, in_);
    std::copy_n(out, outputs, out_);
    if (along_row && rest_ > 0) {
      for (int i = 0; i < inputs; ++i) {
        std::fill_n(end_in_[i], group<T>, after[i]);
        if (in[i]) std::copy_n(in[i] + steps_ * stride_, rest_, end_in_[i]);
      }
    }
  }

  int64_t count() const { return whole_ + (rest_ > 0); }

  CO_HD Block operator[](int64_t b) {
    Block block;
    const int64_t start = b * block_steps<along_row>;
    const bool end = along_row && b == whole_;
    for (int i = 0; i < inputs; ++i) block.in[i] = end ? end_in_[i] : in_[i] + start * stride_;
    for (int i = 0; i < outputs; ++i) block.out[i] = !out_[i] ? nullptr : end ? end_out_[i] : out_[i] + start * stride_;
    block.steps = end ? 1 : std::min(block_steps<along_row>, steps_ - start);
    return block;
  }

  // body(vector, offset) for the two vectors of a step, or of all of a block.
  template <typename Body>
  CO_HD void step(int64_t k, const Body& body) const {
    body(0, k * stride_);
    body(1, k * stride_ + width<T>);
  }
  template <typename Body>
  CO_HD void for_each(const Block& block, const Body& body) const {
    for (int64_t k = 0; k < block.steps; ++k) step(k, body);
  }

  void finish() {
    if (along_row && rest_ > 0)
      for (int i = 0; i < outputs; ++i)
        if (out_[i]) std::copy_n(end_out_[i], rest_, out_[i] + steps_ * stride_);
  }

 private:
  int64_t stride_, steps_, rest_, whole_;
  const T* in_[inputs];
  T* out_[outputs];
  T end_in_[inputs][group<T>], end_out_[outputs][group<T>];
};

// Sums of a group: of lanes, or of the row, which every lane gets.
template <typename T, int n>
struct Sums {
  using V = Vector<T>;
  V high[n][2] = {}, low[n][2] = {}, part[n][2] = {};

  // With what rounding takes from each single addition.
  CO_HD void add_exactly(int i, int v, V term) {
    V rest;
    high[i][v] = two_sum(high[i][v], term, rest);
    low[i][v] += rest;
  }

  // What was added to `part` since the last time.
  CO_HD void settle() {
    for (int i = 0; i < n; ++i) {
      for (int v = 0; v < 2; ++v) {
        add_exactly(i, v, part[i][v]);
        part[i][v] = V{};
      }
    }
  }

  template <bool along_row>
  CO_HD V total(int i, int v) const {
    if (!along_row) return high[i][v] + low[i][v];
    return V{} +
           T(across<double, T>(high[i][0] + high[i][1], Plus()) + across<double, T>(low[i][0] + low[i][1], Plus()));
  }
};

// What is left of x at lambda: y where it is positive. Turns a weight into u.
template <bool weighted, typename T>
CO_HD Vector<T> rest_at(const Ascent<Vector<T>>& lambda, T total, Vector<T> x, Vector<T>& weight) {
  projection_bound<weighted>(x, weight, total);
  return projection_rest<weighted>(projection_anchored<weighted>(x, weight, lambda.anchor), weight, lambda.high,
                                   lambda.low);
}

template <bool along_row>
constexpr int states = along_row ? 1 : 2;  // a row has one lambda, lanes each their own
template <bool along_row, typename T>
using ProjectionBlocks = Blocks<along_row, T, 2, 1>;  // x, weight; y

template <bool weighted, typename Block, typename V>
CO_HD void read_operands(const Block& block, int64_t offset, V& x_k, V& u_k) {
  x_k = load(block.in[0] + offset);
  u_k = weighted ? load(block.in[1] + offset) : V{} + 1;
}

// Where to start from; a NaN is left to the readings.
template <bool weighted, bool along_row, typename T>
[[gnu::noinline]] void start_ascent(ProjectionBlocks<along_row, T>& blocks, T total,
                                    Ascent<Vector<T>> (&at)[states<along_row>]) {
  using V = Vector<T>;
  using Block = typename ProjectionBlocks<along_row, T>::Block;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  V top[4][2];  // the largest of every fourth step
  for (auto& vectors : top) vectors[0] = vectors[1] = V{} - infinity;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const Block block = blocks[b];
    for (int64_t k = 0; k < block.steps; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (k + j == block.steps) break;
        blocks.step(k + j, [&](int v, int64_t offset) CO_INLINE {
          V x_k, u_k;
          read_operands<weighted>(block, offset, x_k, u_k);
          top[j][v] = larger_of(top[j][v], projection_bound<weighted>(x_k, u_k, total));
        });
      }
    }
  }
  for (int s = 0; s < states<along_row>; ++s) {
    V bound = larger_of(larger_of(top[0][s], top[1][s]), larger_of(top[2][s], top[3][s]));
    if (along_row) bound = V{} + across<T, T>(larger_of(bound, larger_of(top[0][1], top[1][1])), Larger());
    at[s] = Ascent<V>::template from<weighted>(bound, total);
    if (weighted || along_row) continue;
    const V four[] = {top[0][s] - bound, top[1][s] - bound, top[2][s] - bound, top[3][s] - bound};
    const V start = projection_of_four(four, total);
    at[s].high = start > at[s].high ? start : at[s].high;
  }
}

// To lambda; where nothing is left of `at`, nothing changes. Returns how many blocks may be of the support, and their
// numbers in `live`.
template <bool weighted, bool along_row, typename T>
[[gnu::noinline]] int64_t ascend(ProjectionBlocks<along_row, T>& blocks, T total, int32_t* live,
                                 Ascent<Vector<T>> (&at)[states<along_row>]) {
  using V = Vector<T>;
  using Block = typename ProjectionBlocks<along_row, T>::Block;
  int64_t count = blocks.count();
  std::iota(live, live + count, 0);
  // Where the sum of what is left starts, once for each row: near the root it then has most digits.
  V start[2] = {V{} - total, V{} - total};
  if (along_row) start[0] = start[1] = V{}, start[0][0] = -total;
  bool going;
  do {
    Sums<T, 2> sums;
    for (int v = 0; v < 2; ++v) sums.high[0][v] = start[v];
    int64_t kept = 0;
    for (int64_t i = 0; i < count;) {
      const int64_t end = std::min(count, i + steps_per_sum / block_steps<along_row>);
      for (; i < end; ++i) {
        const Block block = blocks[live[i]];
        auto seen = V{} != V{};  // the bits of all that is positive
        for (int64_t k = 0; k < block.steps; k += 2) {
          V pair[2] = {};
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            if (k + j == block.steps) break;
            blocks.step(k + j, [&](int v, int64_t offset) CO_INLINE {
              V x_k, u_k;
              read_operands<weighted>(block, offset, x_k, u_k);
              const V rest = rest_at<weighted>(at[along_row ? 0 : v], total, x_k, u_k), y_k = value_of_rest(rest);
              seen |= bit_cast<decltype(seen)>(y_k);
              pair[v] += y_k;
              sums.part[1][v] += rest <= V{} ? V{} : u_k;
            });
          }
          for (int v = 0; v < 2; ++v) {
            if (along_row)
              sums.part[0][v] += pair[v];  // a lane's: there are as many as a group has
            else
              sums.add_exactly(0, v, pair[v]);
          }
        }
        live[kept] = live[i];
        kept += any(seen);
      }
      sums.settle();
    }
    count = kept;
    going = false;
    for (int s = 0; s < states<along_row>; ++s) {
      at[s].step_by(sums.template total<along_row>(0, s), sums.template total<along_row>(1, s), total);
      going |= any(at[s].left > V{});
    }
  } while (going);

  bool numbers = true;
  for (const auto& lambda : at) numbers &= !any(lambda.high != lambda.high);
  if (numbers) return count;
  std::iota(live, live + blocks.count(), 0);  // of a row with a NaN all are
  return blocks.count();
}

template <bool weighted, bool along_row, typename T>
void project(int64_t length, int64_t stride, const T* x, const T* weight, T* y, T total, int32_t* live) {
  using V = Vector<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  ProjectionBlocks<along_row, T> blocks(length, stride, {x, weighted ? weight : x}, {y}, {-infinity, T(1)});
  Ascent<V> at[states<along_row>];
  start_ascent<weighted, along_row>(blocks, total, at);
  const int64_t count = ascend<weighted, along_row>(blocks, total, live, at);
  for (int64_t b = 0, i = 0; b < blocks.count(); ++b) {
    const auto block = blocks[b];
    if (i < count && live[i] == b) {
      ++i;
      blocks.for_each(block, [&](int v, int64_t offset) CO_INLINE {
        V u_k = weighted ? load(block.in[1] + offset) : V{} + T(1);
        const V rest = rest_at<weighted>(at[along_row ? 0 : v], total, load(block.in[0] + offset), u_k);
        store(block.out[0] + offset, value_of_rest(rest));
      });
    } else {
      blocks.for_each(block, [&](int, int64_t offset) CO_INLINE { store(block.out[0] + offset, V{}); });
    }
  }
  blocks.finish();
}

template <bool weighted, typename T>
void project_row(int64_t length, const T* x, const T* weight, T* y, T total, ProjectionScratch& scratch) {
  project<weighted, true>(length, 0, x, weight, y, total, scratch.live());
}

template <bool weighted, typename T>
void project_columns(int64_t length, int64_t stride, const T* x, const T* weight, T* y, T total,
                     ProjectionScratch& scratch) {
  for (int64_t l = 0; l < RowUnits::lanes; l += group<T>)
    project<weighted, false>(length, stride, x + l, weighted ? weight + l : nullptr, y + l, total, scratch.live());
}

// Null are: weight unless weighted; x and grad_weight unless to_weight; grad_x where only grad_weight is wanted.
// Results may take the place of any input.
template <typename T>
struct ProjectionGradient {
  const T *grad_y, *y, *weight, *x;
  T *grad_x, *grad_weight;
};

template <bool weighted, bool to_weight, bool along_row, typename T>
[[gnu::noinline]] void project_backward(int64_t length, int64_t stride, const ProjectionGradient<T>& p) {
  using V = Vector<T>;
  using Operands = Blocks<along_row, T, 4, 2>;
  using Block = typename Operands::Block;
  Operands blocks(length, stride, {p.grad_y, p.y, weighted ? p.weight : p.y, to_weight ? p.x : p.y},
                  {p.grad_x, p.grad_weight}, {T(0), T(0), T(1), T(0)});
  const auto read = [](const Block& block, int64_t offset, V& g_k, V& u_k) CO_INLINE {
    const auto inside = projection_supports(load(block.in[1] + offset));
    g_k = inside ? load(block.in[0] + offset) : V{};
    u_k = inside ? (weighted ? T(1) / load(block.in[2] + offset) : V{} + T(1)) : V{};
    return inside;
  };

  Sums<T, 2 + to_weight> sums;
  constexpr int64_t blocks_per_sum = gradient_steps_per_sum / block_steps<along_row>;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const Block block = blocks[b];
    blocks.for_each(block, [&](int v, int64_t offset) CO_INLINE {
      V g_k, u_k;
      const auto inside = read(block, offset, g_k, u_k);
      sums.part[0][v] += g_k * u_k;
      sums.part[1][v] += u_k;
      if constexpr (to_weight)
        sums.part[2][v] += inside ? load(block.in[3] + offset) - load(block.in[1] + offset) : V{};
    });
    if (b % blocks_per_sum == blocks_per_sum - 1 || b == blocks.count() - 1) sums.settle();
  }
  V mean[2], multiplier[2];
  for (int v = 0; v < 2; ++v) {
    const V slope = sums.template total<along_row>(1, v);
    mean[v] = sums.template total<along_row>(0, v) / slope;
    multiplier[v] = sums.template total<along_row>(1 + to_weight, v) / slope;
  }
  for (int64_t b = 0; b < blocks.count(); ++b) {
    const Block block = blocks[b];
    blocks.for_each(block, [&](int v, int64_t offset) CO_INLINE {
      V g_k, u_k;
      const auto inside = read(block, offset, g_k, u_k);
      const V grad = inside ? projection_grad_x(g_k, mean[v]) : V{};
      if (!to_weight || block.out[0]) store(block.out[0] + offset, grad);
      if (to_weight) store(block.out[1] + offset, projection_grad_weight(grad, u_k, multiplier[v]));
    });
  }
  blocks.finish();
}

template <bool weighted, bool to_weight, typename T>
void project_row_backward(int64_t length, const ProjectionGradient<T>& operands) {
  project_backward<weighted, to_weight, true>(length, 0, operands);
}

template <bool weighted, bool to_weight, typename T>
void project_columns_backward(int64_t length, int64_t stride, const ProjectionGradient<T>& operands) {
  for (int64_t l = 0; l < RowUnits::lanes; l += group<T>) {
    const auto at = [=](auto* p) { return p ? p + l : nullptr; };
    project_backward<weighted, to_weight, false, T>(length, stride,
                                                    {at(operands.grad_y), at(operands.y), at(operands.weight),
                                                     at(operands.x), at(operands.grad_x), at(operands.grad_weight)});
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
