#include "../math/numeric.h"

namespace constrained_ops {

extern const float exp_limits_float[2] = {Format<float>::exp_underflow, Format<float>::exp_overflow};
extern const double exp_limits_double[2] = {Format<double>::exp_underflow, Format<double>::exp_overflow};

}  // namespace constrained_ops
