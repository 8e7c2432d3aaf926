// exponential_*: the half-line by the exponential (math/positive.h).
#include "../math/positive.h"
#include "elementwise_ops.cuh"

namespace constrained_ops {

struct ExponentialFamily {
  static constexpr const char *name = "exponential", *forward = "exponential_forward",
                              *backward = "exponential_backward", *double_backward = "exponential_double_backward";
  using TensorMap = Exponential;

  template <typename F>
  static void with_map(double, double, const F& f) {
    f(Tag<Exponential>{});
  }
};

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) {
  constrained_ops::ElementwiseOps<constrained_ops::ExponentialFamily>::register_in(m);
}
