#include "elementwise.h"

namespace constrained_ops {

struct BoundedTransform {
  static constexpr const char* name = "bounded";
  static ElementwiseLoop loop(Kernel kernel, Dtype dtype, BoundsKind bounds) {
    return loops().bounded(kernel, dtype, bounds);
  }
};

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(constrained_ops, CPU, m) {
  constrained_ops::ElementwiseOperators<constrained_ops::BoundedTransform>::register_in(m);
}
