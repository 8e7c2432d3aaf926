// The compiled loops: what csrc/cpu/*.cpp asks for, and csrc/cpu/loops/*.cpp provides once per instruction set.
#pragma once

#include <algorithm>

#include "../operands.h"

#define CO_INLINE __attribute__((always_inline))  // behind the parameters of a lambda

namespace constrained_ops {

// What the instruction set holds in one register: wider vectors are taken apart, comparisons of them number by number.
#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

// backward_from_result: of the softmax of float and double, with x in the place of raw.
enum class Kernel { forward, forward_log_det, backward, backward_log_det, backward_from_result, double_backward };

// How the bounds of an elementwise transform come: as two floats, finite or not, or per element.
enum class BoundsKind { both, lower_only, upper_only, neither, by_element };

constexpr int max_inputs = 8, max_outputs = 5;  // raw, lower, upper and five more; see DoubleBackward

struct ElementwiseCall {
  ElementwiseLayout<max_inputs> layout;
  const void* inputs[max_inputs];  // raw[, lower, upper], the program's; null: zeros
  void* outputs[max_outputs];      // linear in memory; null: not wanted
  double lower, upper;
};
using ElementwiseLoop = void (*)(const ElementwiseCall& call, int64_t begin, int64_t end);

struct RowCall {
  RowLayout layout;
  const void* inputs[3];  // raw, then forward: none, backward: grad_x, double_backward: along_raw, grad_x
  void* outputs[2];       // null: not wanted
};
// A loop works on units [begin, end); see RowUnits.
using RowLoop = void (*)(const RowCall& call, int64_t begin, int64_t end);

constexpr int64_t sum_block = 1024;  // longer sums are added up block by block, to keep their digits

// How rows of [outer, length, inner] are cut into units of work.
struct RowUnits {
  enum Way {
    tiles,    // short rows: `lanes` of them as the columns of a tile, copied there and back
    rows,     // rows that follow each other in memory, a few at a time
    columns,  // rows with neighbours side by side, `lanes` of them at a time
  };
  static constexpr int64_t lanes = 32;
  static constexpr int max_rows = 8;

  Way way;
  int64_t rows_per_unit = 1;  // Way::rows
  int64_t per_outer = 0;      // blocks of neighbouring rows in each outer index; 0: rows are taken as they come
  int64_t count;

  RowUnits(const RowLayout& layout, int64_t longest_in_tile) {
    const int64_t length = layout.length, inner = layout.inner;
    way = length <= longest_in_tile ? tiles : inner == 1 ? rows : columns;
    if (way == rows) {
      rows_per_unit = std::clamp<int64_t>(1024 / length, 1, max_rows);
      count = (layout.outer + rows_per_unit - 1) / rows_per_unit;
    } else if (way == tiles && inner < lanes) {
      count = (layout.outer * inner + lanes - 1) / lanes;
    } else {
      per_outer = (inner + lanes - 1) / lanes;
      count = layout.outer * per_outer;
    }
  }
};

constexpr int64_t fewest_lanes = 8;  // that softmax takes side by side where they lie

inline RowUnits softmax_units(const RowLayout& layout) {
  const auto [outer, length, inner] = layout;
  // Neighbours that are too few make a tile with those of other outer indices, of a length for the second-level cache.
  RowUnits units(layout, inner >= fewest_lanes ? 0 : inner > 1 && outer * inner >= fewest_lanes ? 512 : 64);
  if (units.way == RowUnits::columns && inner >= fewest_lanes) {  // the last unit takes over what is less than that
    units.per_outer = (inner - fewest_lanes) / RowUnits::lanes + 1;
    units.count = outer * units.per_outer;
  }
  return units;
}

inline RowUnits projection_units(const RowLayout& layout, bool forward) {
  // One row alone waits for what is summed up along it, in forward several times. Rows that lie apart have no better
  // way than a tile while that fits the second-level cache.
  return {layout, layout.inner > 1 ? 1024 : forward ? 1024 : 32};
}

// Rows from this length on that are mostly near their largest number are projected one by one.
constexpr int64_t shortest_alone = 256;

enum class Projection { forward, forward_weighted, backward, backward_weighted, backward_to_weight };

struct ProjectionCall {
  RowLayout layout;
  const void* inputs[4];  // forward: x[, weight]; backward: grad_y, y[, weight[, x]]
  void* outputs[2];       // null: not wanted
  double total;
};
using ProjectionLoop = void (*)(const ProjectionCall& call, int64_t begin, int64_t end);  // units as for RowLoop

inline RowUnits bijection_units(const RowLayout& layout) {
  // Sums along a row wait for one another. Rows that fill some lanes go side by side as long as the tiles fit the
  // second-level cache; those that lie apart however long.
  const bool fill = layout.outer * layout.inner >= 8;
  return {layout, !fill ? 64 : layout.inner > 1 ? layout.length : 256};
}

enum class Bijection { ilr, stick_breaking };

// Of double_backward x, log_det and grad_raw are the results for grad_x, grad_log_det and raw.
struct BijectionCall {
  RowLayout layout;  // of x; raw is one shorter, log_det is [outer, inner]
  const void *raw = nullptr, *along_raw = nullptr, *grad_x = nullptr, *grad_log_det = nullptr;  // null: zeros
  void *x = nullptr, *log_det = nullptr, *grad_raw = nullptr;                                   // null: not wanted
};
using BijectionLoop = void (*)(const BijectionCall& call, int64_t begin, int64_t end);  // units as for RowLoop

struct StepSlot;     // csrc/step.h
struct StepNumbers;  // csrc/cpu/step.h
// A step over elements [begin, end) of a parameter, or blocks of it if its constraint goes along rows. The gradient
// lies in memory as the parameter does.
using StepLoop = void (*)(const StepSlot& slot, const void* grad, const StepNumbers& numbers, int64_t begin,
                          int64_t end);

#define CO_DECLARE_LOOPS                                                           \
  ElementwiseLoop bounded_loop(Kernel kernel, Dtype dtype, BoundsKind bounds);     \
  ElementwiseLoop exponential_loop(Kernel kernel, Dtype dtype, BoundsKind bounds); \
  RowLoop softmax_loop(Kernel kernel, Dtype dtype);                                \
  ProjectionLoop projection_loop(Projection kernel, Dtype dtype);                  \
  BijectionLoop bijection_loop(Bijection kind, Kernel kernel, Dtype dtype);        \
  StepLoop step_loop(Dtype dtype, Dtype state);

namespace baseline {
CO_DECLARE_LOOPS
}
namespace x86_64_v3 {  // AVX2, FMA
CO_DECLARE_LOOPS
}
namespace x86_64_v4 {  // AVX-512
CO_DECLARE_LOOPS
}

#undef CO_DECLARE_LOOPS

}  // namespace constrained_ops
