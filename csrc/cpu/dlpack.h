// DLPack's binary interface, as far as direct calls need it: the layout of tensors and of the table of functions by
// which C++ looks at tensors of Python. PyTorch's own header is not for libraries that keep to its stable ABI.
// Source: the DLPack standard, version 1.3, dlpack.h and "Python Specification" (https://dmlc.github.io/dlpack).
#pragma once

#include <cstdint>

namespace constrained_ops::dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu = 1;                   // DLDeviceType
constexpr uint8_t floating = 2, bfloat = 4;  // DLDataTypeCode
constexpr const char* capsule = "dlpack_exchange_api";

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object)();
  void (*managed_tensor_to_py_object)();
  int (*tensor_from_py_object)(void* object, Tensor* borrowed);  // not 0: a Python exception is set
  void (*current_work_stream)();
};

}  // namespace constrained_ops::dlpack
