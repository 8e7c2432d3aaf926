// From a running number to the offsets of strided operands. All in 64 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../math/numeric.h"
#include "../operands.h"

namespace constrained_ops {

// Division of 0 <= n < 2^63 by a fixed size without a division: with 2^(s-1) < size <= 2^s the quotient is
// n * magic >> (63 + s) for magic = floor(2^(63+s) / size) + 1, exactly, and magic fits in 64 bits.
struct Divider {
  uint64_t magic;
  int64_t size;
  int shift;  // s - 1; negative for size 1

  Divider() = default;
  explicit Divider(int64_t size) : magic(0), size(size), shift(-1) {
    if (size <= 1) return;
    while ((uint64_t(1) << (shift + 1)) < static_cast<uint64_t>(size)) ++shift;
    magic = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (64 + shift)) / size + 1);
  }

  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    return shift < 0 ? n : static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), magic) >> shift);
  }
};

constexpr int max_dims = 8;

// Sizes and strides of several operands over common dimensions, the last of which varies fastest.
template <int operands>
struct Strided {
  int dims;
  Divider sizes[max_dims];
  int64_t strides[max_dims][operands];

  Strided() = default;
  explicit Strided(const ElementwiseLayout<operands>& layout) : dims(layout.numel == 1 ? 0 : layout.rank), strides{} {
    for (int d = 0; d < dims; ++d) {
      sizes[d] = Divider(layout.sizes[d]);
      for (int k = 0; k < operands; ++k) strides[d][k] = layout.strides[k][d];
    }
  }

  __device__ __forceinline__ void offsets(int64_t n, int64_t (&out)[operands]) const {
#pragma unroll
    for (int k = 0; k < operands; ++k) out[k] = 0;
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t rest = sizes[d].quotient(n), index = n - rest * sizes[d].size;
#pragma unroll
      for (int k = 0; k < operands; ++k) out[k] += index * strides[d][k];
      n = rest;
    }
  }

  // One dimension with this stride for an operand: memory in one piece (1) or one number for all (0).
  bool is(int operand, int64_t stride) const { return dims == 0 || (dims == 1 && strides[0][operand] == stride); }
};

}  // namespace constrained_ops
