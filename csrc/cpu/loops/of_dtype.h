// The one switch from a dtype to the type in which its numbers lie in memory.
#pragma once

#include "../../math/storage.h"
#include "../../operands.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// What f<Storage>() gives.
template <typename F>
auto of_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::half:
      return f.template operator()<Half>();
    case Dtype::bfloat16:
      return f.template operator()<BFloat16>();
    case Dtype::float32:
      return f.template operator()<float>();
    default:
      return f.template operator()<double>();
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
