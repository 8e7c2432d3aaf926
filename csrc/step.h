// What an optimizer's step does to one parameter, as plain numbers and pointers: shared by the plans of all devices.
#pragma once

#include <cstdint>

#include "math/adam.h"
#include "operands.h"

namespace constrained_ops {

// What stands around Adam. Python asks for it by name.
enum class StepKind : int32_t {
  plain = 0,                   // nothing
  box = 1,                     // projected: clamped to [lower, upper]
  box_by_element = 2,          // ... to bounds that differ
  interval = 3,                // on raw: Interval of math/bounded.h
  lower_only = 4,              // ... LowerOnly
  upper_only = 5,              // ... UpperOnly
  bounded_by_element = 6,      // ... ByElement
  exponential = 7,             // ... Exponential of math/positive.h
  exponential_by_element = 8,  // ... with bounds that differ
  simplex = 9,   // projected, along rows: in the metric of Adam, or as the group's metric has it euclidean
  softmax = 10,  // on raw, along rows
};
constexpr int step_kinds = 11;

constexpr bool step_on_raw(StepKind kind) {
  return kind == StepKind::softmax || (kind >= StepKind::interval && kind <= StepKind::exponential_by_element);
}
constexpr bool step_by_element(StepKind kind) {
  return kind == StepKind::box_by_element || kind == StepKind::bounded_by_element ||
         kind == StepKind::exponential_by_element;
}
constexpr bool step_along_rows(StepKind kind) { return kind == StepKind::simplex || kind == StepKind::softmax; }

// One parameter. All its tensors lie alike in memory: dense, [numel] or [outer, length, inner]. The gradient, which
// is another in each step, is not among them.
struct StepSlot {
  StepKind kind;
  int32_t group;  // index into the hyperparameters
  int64_t numel;
  RowLayout rows;          // kinds along rows
  void* param;             // Storage [numel]
  void* exp_avg;           // State [numel]: Storage or its compute type
  void* exp_avg_sq;        // State [numel]
  void* max_exp_avg_sq;    // State [numel]; null without amsgrad
  void* raw;               // compute type [numel]; null unless step_on_raw
  float* step;             // [1]: steps taken
  const void* lower_each;  // compute type [numel]; kinds by element: null if `lower` holds for all
  const void* upper_each;  // likewise
  double lower, upper;     // boxes and intervals; infinite where there is none
  double total;            // simplex
};

// The hyperparameters of a parameter group.
struct StepOptions {
  AdamOptions adam;
  bool euclidean;  // metric of the projection onto a simplex
};

}  // namespace constrained_ops
