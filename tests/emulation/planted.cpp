// A sum over a block, of the parts that the package's kernels are made of. test_emulation.py plants faults in copies of
// those parts, which must not pass unnoticed.
#include <cstdio>
#include <memory>

#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/cuda/storage.cuh"

using namespace constrained_ops;

namespace {

__global__ void sum_kernel(const float* x, int64_t n, float* sums, BlockGroup group) {
  const int64_t first = int64_t(threadIdx.x) * vector_length<float>;
  float values[vector_length<float>];
  load_vector(x + first, n - first).unpack(values);
  Sums<float, 1> sum[1] = {Sums<float, 1>::none()};
  for (const float value : values) sum[0].values[0] += value;
  group.merge(sum);
  sums[threadIdx.x] = sum[0].values[0];
}

}  // namespace

int main() {
  constexpr int threads = 64, n = 250;  // the last vector is cut short
  const std::unique_ptr<float[]> x(new float[n]), sums(new float[threads]);
  for (int i = 0; i < n; ++i) x[i] = 1;
  const BlockGroup group(threads, sizeof(float));
  launch(Queue{"sum", nullptr}, Grid(1, threads, group.shared_bytes()), sum_kernel, const_cast<const float*>(x.get()),
         int64_t(n), sums.get(), group);
  for (int i = 0; i < threads; ++i)
    if (sums[i] != n) std::printf("thread %d has %g\n", i, sums[i]);
  return 0;
}
