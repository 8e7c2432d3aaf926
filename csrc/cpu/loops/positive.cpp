#include "../../math/positive.h"

#include "elementwise.h"

namespace constrained_ops::CO_LEVEL {

ElementwiseLoop exponential_loop(Kernel kernel, Dtype dtype, BoundsKind bounds) {
  return bounds == BoundsKind::by_element ? pick_loop<Exponential, Exponential, true>(kernel, dtype)
                                          : pick_loop<Exponential, Exponential, false>(kernel, dtype);
}

}  // namespace constrained_ops::CO_LEVEL
