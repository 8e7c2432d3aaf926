// A tensor's device and stream, and the switch over formats: the outer layer's last step before a launcher.
#pragma once

#include "../math/storage.h"
#include "../tensors.h"
#include "launch.cuh"

// Where the kernels are registered. The emulation of tests/emulation has a place of its own.
#if !defined(CO_NAMESPACE)
#define CO_NAMESPACE constrained_ops
#define CO_DISPATCH_KEY CUDA
#endif

namespace constrained_ops {

// The tensor's device is the current one while this lives; `queue` is that device's current stream.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor) : queue_{op, nullptr} {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(tensor.get_device_index(), &guard_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    queue_.stream = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Queue& queue() const { return queue_; }

 private:
  Queue queue_;
  CUDAGuardHandle guard_ = nullptr;
};

// Calls f with the Tag of the type in which numbers lie in memory.
template <typename F>
void for_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::half:
      return f(Tag<Half>{});
    case Dtype::bfloat16:
      return f(Tag<BFloat16>{});
    case Dtype::float32:
      return f(Tag<float>{});
    case Dtype::float64:
      return f(Tag<double>{});
  }
}

}  // namespace constrained_ops
