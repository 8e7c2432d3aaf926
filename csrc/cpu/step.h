// The plan of an optimizer's steps on the CPU: made once, run in every step. No torch, no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "../step.h"
#include "loops.h"

namespace constrained_ops {

class StepPlan {
 public:
  StepPlan(Dtype dtype, Dtype state);

  void add(const StepSlot& slot);

  // One step of all slots, in the order in which they were added. `grads`: memory laid out as each slot's parameter.
  void run(const std::vector<const void*>& grads, const std::vector<StepOptions>& groups, double grad_scale);

  size_t size() const { return slots_.size(); }
  size_t groups() const { return groups_; }  // how many there must be at the least

 private:
  // A span of a slot, in the units of StepLoop; spans do not depend on the number of threads.
  struct Task {
    uint32_t slot;
    int64_t begin, end;
  };

  void prepare(const std::vector<StepOptions>& groups, double grad_scale);

  StepLoop loop_;
  size_t groups_ = 0;
  std::vector<StepSlot> slots_;
  std::vector<Task> tasks_;
  std::vector<int64_t> costs_{0};     // of all tasks before each
  std::vector<StepNumbers> numbers_;  // of this step, and which of them are each slot's
  std::vector<uint32_t> numbers_of_;
};

}  // namespace constrained_ops
