// Stands in for the CUDA runtime and the device built-ins, so that the host compiler takes csrc/cuda/*.cu as they are.
// A block runs as one operating-system thread per CUDA thread; blocks run one after the other. Barriers and shuffles
// are as strict as the programming guide: a thread of the block, or a lane of the warp, that stays away is an error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Exactly the bytes that the launch asked for, NaN before each block.
#define CO_SHARED_MEMORY(name) unsigned char* const name = emulation::shared_memory()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

unsigned char* shared_memory();

// Waits for all threads of the block.
void sync_block();

// Waits for all threads of the block; whether one of them brought true.
bool any_of_block(bool condition);

// Waits for all lanes of the warp, and hands lane `source` of it what that one brought.
uint64_t exchange(unsigned mask, uint64_t value, int source, int width);

// Runs `kernel`, a call of the function at `address`, for every thread of every block; rethrows what goes wrong in one
// of them.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel, const void* address);

template <typename T>
T shuffle(unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace emulation

inline void __syncthreads() { emulation::sync_block(); }

inline int __syncthreads_or(int condition) { return emulation::any_of_block(condition != 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0, emulation::lane(), 32); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int source = emulation::lane() ^ lane_mask;
  return emulation::shuffle(mask, value, source, width);
}

inline int __any_sync(unsigned mask, int condition) {
  for (int distance = 16; distance > 0; distance /= 2) condition |= __shfl_xor_sync(mask, condition, distance);
  return condition != 0;
}

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) throw std::logic_error("misaligned address");
  return *p;
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }

inline void __threadfence() {}  // blocks run one after the other

// --- The part of the runtime that launch.cuh uses --------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// One processor, so that small inputs already have more work than the grid has blocks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more kernel parameters than a launch can carry");
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool possible = grid.x >= 1 && grid.x < (1u << 31) && block.x >= 1 && block.x <= 1024 && block.x % 32 == 0 &&
                        config->dynamicSmemBytes <= 48 * 1024;
  if (!possible) return cudaErrorInvalidConfiguration;
  emulation::run(
      grid, block, config->dynamicSmemBytes, [&] { kernel(Parameters(arguments)...); },
      reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}
