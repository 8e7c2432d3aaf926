// What test_emulation.py asks for by ctypes: the kernels' index arithmetic, and kernels with mistakes that the
// emulation must report. Each returns null, or what went wrong.
#include <string>

#include "../../csrc/cuda/indexing.cuh"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/cuda/step.cuh"

using namespace constrained_ops;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t quotient(int64_t n, int64_t size) { return Divider(size).quotient(n); }

// The offset of element n of an operand with these sizes and strides.
EXPORT int64_t offset(int64_t n, int rank, const int64_t* sizes, const int64_t* strides) {
  ElementwiseLayout<1> layout{};
  layout.numel = 1;
  layout.rank = rank;
  for (int d = 0; d < rank; ++d) {
    layout.numel *= sizes[d];
    layout.sizes[d] = sizes[d];
    layout.strides[0][d] = strides[d];
  }
  int64_t offsets[1];
  Strided<1>(layout).offsets(n, offsets);
  return offsets[0];
}

// Where a row of [outer, length, inner] begins: for rows in one piece, for rows side by side, and in a step.
EXPORT int64_t row_in_one_piece(int64_t outer, int64_t length, int64_t, int64_t row) {
  return Row::at(Rows(outer, length, 1), BlockGroup(32, 4), row).first;
}
EXPORT int64_t row_side_by_side(int64_t outer, int64_t length, int64_t inner, int64_t row) {
  return Row::at(Rows(outer, length, inner), ColumnGroup{1, 1, 4}, row).first;
}
EXPORT int64_t row_of_a_step(int64_t outer, int64_t length, int64_t inner, int64_t row) {
  return StepRow({outer, length, inner}, ColumnGroup{1, 1, 4}, row, outer * inner).first;
}

namespace {

__global__ void half_a_block_at_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void half_a_warp_at_a_shuffle() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void mask_without_everyone() { __shfl_xor_sync(0x0000ffffu, 1, 1); }

// Right as it stands: every thread gets the number of the last one.
__global__ void sound(int* result) {
  CO_SHARED_MEMORY(memory);
  int* const last = reinterpret_cast<int*>(memory);
  if (threadIdx.x == blockDim.x - 1) *last = static_cast<int>(threadIdx.x);
  __syncthreads();
  result[threadIdx.x] = *last;
}

template <typename... Arguments>
const char* message_of(int64_t blocks, int threads, size_t shared_bytes, void (*kernel)(Arguments...),
                       Arguments... arguments) {
  static std::string message;
  try {
    launch(Queue{"op", nullptr}, Grid(blocks, threads, shared_bytes), kernel, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

EXPORT const char* run_half_a_block() { return message_of(1, 64, 0, half_a_block_at_a_barrier); }
EXPORT const char* run_half_a_warp() { return message_of(1, 64, 0, half_a_warp_at_a_shuffle); }
EXPORT const char* run_mask() { return message_of(1, 64, 0, mask_without_everyone); }
EXPORT const char* run_empty_grid() { return message_of(0, 64, 0, mask_without_everyone); }
EXPORT const char* run_sound(int* result) { return message_of(1, 64, sizeof(int), sound, result); }
