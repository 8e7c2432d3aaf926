// What the kernels' outer layer takes from torch's CUDA library: device guard and current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
