#include "elementwise.h"

namespace constrained_ops {

struct ExponentialTransform {
  static constexpr const char* name = "exponential";
  static ElementwiseLoop loop(Kernel kernel, Dtype dtype, BoundsKind bounds) {
    return loops().exponential(kernel, dtype, bounds);
  }
};

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(constrained_ops, CPU, m) {
  constrained_ops::implement_elementwise<constrained_ops::ExponentialTransform>(m);
}
