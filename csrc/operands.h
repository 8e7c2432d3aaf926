// The plain structs by which outer layers hand operands to kernels. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace constrained_ops {

constexpr int max_rank = 64;

enum class Dtype { half, bfloat16, float32, float64 };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Common dimensions of all operands, the innermost last; strides in elements.
template <int capacity>
struct ElementwiseLayout {
  int64_t numel;
  int rank;
  int64_t sizes[max_rank];
  int64_t strides[capacity][max_rank];
};

struct RowLayout {
  int64_t outer, length, inner;
};

}  // namespace constrained_ops
