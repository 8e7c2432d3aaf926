// How kernels are launched: grid sizes, the launch and its check. Nothing else starts a kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../math/numeric.h"

namespace constrained_ops {

constexpr int warp_size = 32;

// A type as an argument.
template <typename T>
struct Tag {
  using type = T;
};

// Where a kernel runs and in whose name: errors say which operator failed.
struct Queue {
  const char* op;
  cudaStream_t stream;
};

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  const char* file;
  int line;

  Grid(int64_t blocks, int threads, size_t shared_bytes = 0, const char* file = __builtin_FILE(),
       int line = __builtin_LINE())
      : blocks(blocks), threads(threads), shared_bytes(shared_bytes), file(file), line(line) {}
};

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_cuda(cudaError_t status, const Queue& queue, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(queue.op) + ": " + cudaGetErrorString(status) + " (" + file + ":" +
                           std::to_string(line) + ")");
}

// Enough blocks to fill the device four times over, so that the last ones to finish leave little of it idle; kernels
// loop over what is left.
inline int64_t limit_blocks(int64_t wanted, int threads, const Queue& queue) {
  constexpr int resident_threads = 2048, waves = 4;
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), queue, __FILE__, __LINE__);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), queue, __FILE__, __LINE__);
  return std::min<int64_t>(wanted, int64_t(processors) * (resident_threads / threads) * waves);
}

template <typename... Parameters, typename... Arguments>
void launch(const Queue& queue, const Grid& grid, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = queue.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), queue, grid.file, grid.line);
  check_cuda(cudaGetLastError(), queue, grid.file, grid.line);
}

}  // namespace constrained_ops
