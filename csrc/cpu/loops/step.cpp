// The step of an optimizer on one parameter.
#include "of_dtype.h"
#include "step_elements.h"
#include "step_long_rows.h"
#include "step_long_simplex.h"
#include "step_rows.h"
#include "step_simplex.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename Storage, typename State>
void step(const StepSlot& slot, const void* grads, const StepNumbers& numbers, int64_t begin, int64_t end) {
  const bool long_rows = slot.rows.length > StepBlocks::longest_copied;
  if (slot.kind == StepKind::simplex)
    (long_rows ? step_long_simplex<Storage, State> : step_simplex<Storage, State>)(slot, grads, numbers, begin, end);
  else if (slot.kind == StepKind::softmax)
    (long_rows ? step_long_softmax<Storage, State> : step_softmax<Storage, State>)(slot, grads, numbers, begin, end);
  else
    step_elements<Storage, State>(slot, grads, numbers, begin, end);
}

}  // namespace

StepLoop step_loop(Dtype dtype, Dtype state) {
  return of_dtype(dtype, [=]<typename Storage>() -> StepLoop {
    return state == dtype ? step<Storage, Storage> : step<Storage, compute_t<Storage>>;
  });
}

}  // namespace constrained_ops::CO_LEVEL
