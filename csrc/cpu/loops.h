// The compiled loops: what csrc/cpu/*.cpp asks for, and csrc/cpu/loops/*.cpp provides once per instruction set.
#pragma once

#include "../operands.h"

namespace constrained_ops {

enum class Kernel { forward, forward_log_det, backward, backward_log_det, double_backward };

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
// A loop works on units [begin, end): tiles of short rows, single long rows, or blocks of neighbouring rows.
using RowLoop = void (*)(const RowCall& call, int64_t begin, int64_t end);

constexpr int64_t sum_block = 1024;  // longer sums are added up block by block, to keep their digits

struct RowUnits {
  static constexpr int64_t max_lanes = 64, short_row = 64;
  bool tiles;
  int64_t lanes;      // rows that lie side by side, in a tile or in memory
  int64_t per_outer;  // without tiles: blocks of neighbouring rows
  int64_t count;

  explicit RowUnits(const RowLayout& layout)
      : tiles(layout.length <= short_row && layout.inner < max_lanes),
        lanes(tiles && layout.length > 8 ? (layout.length > 32 ? 16 : 32) : max_lanes),  // so that tiles stay in cache
        per_outer((layout.inner + lanes - 1) / lanes),
        count(tiles ? (layout.outer * layout.inner + lanes - 1) / lanes : layout.outer * per_outer) {}
};

#define CO_DECLARE_LOOPS                                                           \
  ElementwiseLoop bounded_loop(Kernel kernel, Dtype dtype, BoundsKind bounds);     \
  ElementwiseLoop exponential_loop(Kernel kernel, Dtype dtype, BoundsKind bounds); \
  RowLoop softmax_loop(Kernel kernel, Dtype dtype);

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
