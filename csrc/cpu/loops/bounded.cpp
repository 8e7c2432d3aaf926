#include "../../math/bounded.h"

#include "elementwise.h"

namespace constrained_ops::CO_LEVEL {

ElementwiseLoop bounded_loop(Kernel kernel, Dtype dtype, BoundsKind bounds) {
  switch (bounds) {
    case BoundsKind::both:
      return pick_loop<Interval, Interval, false>(kernel, dtype);
    case BoundsKind::lower_only:
      return pick_loop<LowerOnly, LowerOnly, false>(kernel, dtype);
    case BoundsKind::upper_only:
      return pick_loop<UpperOnly, UpperOnly, false>(kernel, dtype);
    case BoundsKind::neither:
      return pick_loop<Unbounded, Unbounded, false>(kernel, dtype);
    default:
      return pick_loop<ByElement, Interval, true>(kernel, dtype);
  }
}

}  // namespace constrained_ops::CO_LEVEL
