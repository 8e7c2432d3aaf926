// bounded_*: the interval, the half-lines and the line (math/bounded.h).
#include "../math/bounded.h"
#include "elementwise_ops.cuh"

namespace constrained_ops {

struct BoundedFamily {
  static constexpr const char *name = "bounded", *forward = "bounded_forward", *backward = "bounded_backward",
                              *double_backward = "bounded_double_backward";
  using TensorMap = ByElement;

  template <typename F>
  static void with_map(double lower, double upper, const F& f) {
    const bool no_lower = lower == -std::numeric_limits<double>::infinity();
    const bool no_upper = upper == std::numeric_limits<double>::infinity();
    if (no_lower && no_upper) return f(Tag<Unbounded>{});
    if (no_lower) return f(Tag<UpperOnly>{});
    if (no_upper) return f(Tag<LowerOnly>{});
    f(Tag<Interval>{});
  }
};

template <>
struct UniformMap<ByElement> {
  template <typename T, typename F>
  __device__ __forceinline__ static void choose(const Bounds<T>& bounds, const F& f) {
    const bool no_lower = bounds.lower == -std::numeric_limits<T>::infinity();
    const bool no_upper = bounds.upper == std::numeric_limits<T>::infinity();
    if (no_lower) {
      no_upper ? f(Tag<Unbounded>{}) : f(Tag<UpperOnly>{});
    } else {
      no_upper ? f(Tag<LowerOnly>{}) : f(Tag<Interval>{});
    }
  }
};

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) {
  constrained_ops::ElementwiseOps<constrained_ops::BoundedFamily>::register_in(m);
}
