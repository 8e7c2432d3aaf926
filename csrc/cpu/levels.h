// Which of the compiled instruction sets runs.
#pragma once

#include "loops.h"

namespace constrained_ops {

struct Loops {
  const char* name;
  ElementwiseLoop (*bounded)(Kernel, Dtype, BoundsKind);
  ElementwiseLoop (*exponential)(Kernel, Dtype, BoundsKind);
  RowLoop (*softmax)(Kernel, Dtype);
  ProjectionLoop (*projection)(Projection, Dtype);
  BijectionLoop (*bijection)(Bijection, Kernel, Dtype);
  StepLoop (*step)(Dtype, Dtype);
};

// The widest that this processor has; CONSTRAINED_OPS_SIMD (baseline, x86-64-v3, x86-64-v4) asks for a lesser one.
const Loops& loops();

}  // namespace constrained_ops
