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
  constrained_ops::implement_elementwise<constrained_ops::BoundedTransform>(m);
}
