// What every operator's outer layer needs of tensors, CPU and CUDA alike: checks, results of the promised layout, and
// the layouts that kernels understand. Kernels themselves see only the plain structs of operands.h. Templates are for
// torch::stable::Tensor and for what cpu/direct.h has in its place.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "operands.h"

namespace constrained_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename Tensor>
Dtype storage_dtype(const char* op, const Tensor& raw) {
  switch (raw.scalar_type()) {
    case ScalarType::Half:
      return Dtype::half;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, op, ": raw must be float16, bfloat16, float32 or float64");
  }
}

template <typename Tensor>
bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  return sizes.size() == others.size() && std::equal(sizes.begin(), sizes.end(), others.begin());
}

// How many dimensions `like` has more than `t`.
template <typename Tensor>
int64_t missing_dims(const Tensor& t, const Tensor& like) {
  return static_cast<int64_t>(like.dim()) - static_cast<int64_t>(t.dim());
}

template <typename Tensor>
bool broadcasts(const Tensor& t, const Tensor& like) {
  const int64_t missing = missing_dims(t, like), rank = static_cast<int64_t>(t.dim());
  bool fits = missing >= 0;
  for (int64_t d = 0; d < rank && fits; ++d) fits = t.size(d) == 1 || t.size(d) == like.size(missing + d);
  return fits;
}

// The stride of `t` along a dimension of `like`, to whose shape it broadcasts.
template <typename Tensor>
int64_t stride_along(const Tensor& t, const Tensor& like, int64_t dim) {
  const int64_t own = dim - missing_dims(t, like);
  return own < 0 || t.size(own) != like.size(dim) ? 0 : t.stride(own);
}

// The contract of constrained_ops/_library.py, for callers of the operators themselves.
template <typename Tensor>
void check_kind(const char* op, const char* name, const Tensor& t, const Tensor& raw, ScalarType dtype,
                const char* raw_name = "raw") {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_cpu() == raw.is_cpu() && t.get_device_index() == raw.get_device_index(), op, ": ", name,
                  " must be on the device of ", raw_name);
}
template <typename Tensor>
void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& raw, ScalarType dtype,
                   const char* raw_name = "raw") {
  STD_TORCH_CHECK(same_sizes(t, raw), op, ": ", name, " must have the shape of ", raw_name);
  check_kind(op, name, t, raw, dtype, raw_name);
}
template <typename Tensor>
void check_bound(const char* op, const char* name, const Tensor& t, const Tensor& raw) {
  STD_TORCH_CHECK(broadcasts(t, raw), op, ": ", name, " must broadcast to the shape of raw");
  check_kind(op, name, t, raw, compute_dtype(raw.scalar_type()));
}

// Dimensions of more than one element, the one with the largest stride first.
struct StrideOrder {
  std::array<int, max_rank> dims;
  int count = 0;

  template <typename Tensor>
  StrideOrder(const char* op, const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    STD_TORCH_CHECK(sizes.size() <= max_rank, op, ": more than ", max_rank, " dimensions");
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] != 1) dims[count++] = static_cast<int>(d);
    std::stable_sort(dims.begin(), dims.begin() + count, [&](int a, int b) { return strides[a] > strides[b]; });
  }
};

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
template <typename Tensor>
bool is_dense(const char* op, const Tensor& t) {
  if (t.is_contiguous()) return true;
  const StrideOrder order(op, t);
  int64_t expected = 1;
  for (int i = order.count; i-- > 0;) {
    if (t.stride(order.dims[i]) != expected) return false;
    expected *= t.size(order.dims[i]);
  }
  return true;
}

template <typename Tensor>
bool same_layout(const Tensor& a, const Tensor& b) {
  if (!same_sizes(a, b)) return false;
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

// Past the dispatcher, through which an empty tensor takes as long as a small kernel.
inline Tensor empty_strided(size_t rank, const int64_t* sizes, const int64_t* strides, const Tensor& device_of,
                            ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device_of.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(rank), sizes, strides,
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               device_of.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_strided(const Tensor& shape_of, const Tensor& device_of, ScalarType dtype) {
  return empty_strided(shape_of.dim(), shape_of.sizes().data(), shape_of.strides().data(), device_of, dtype);
}

inline Tensor not_wanted(const Tensor& device_of, ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  return empty_strided(1, &size, &stride, device_of, dtype);
}

// Results: the layout of torch.empty_like(raw), or empty where they are not wanted.
template <typename Tensor>
class BasicResults {
 public:
  BasicResults(const char* op, const Tensor& raw)
      : raw_(raw), dense_(is_dense(op, raw)), like_(dense_ ? raw : empty_like(raw)) {}

  bool dense() const { return dense_; }
  const Tensor& like() const { return like_; }
  Tensor make(bool wanted = true) const { return make(wanted, raw_.scalar_type()); }
  Tensor make(bool wanted, ScalarType dtype) const {
    return wanted ? empty_strided(like_, raw_, dtype) : not_wanted(raw_, dtype);
  }

 private:
  const Tensor& raw_;
  bool dense_;
  Tensor like_;
};
using Results = BasicResults<Tensor>;

// Strides of all operands, which broadcast to the results, over common dimensions in the order in which results lie in
// memory, neighbours merged wherever every operand walks them in one stride.
template <int capacity, typename Tensor>
ElementwiseLayout<capacity> elementwise_layout(const char* op, const BasicResults<Tensor>& results,
                                               const std::array<const Tensor*, capacity>& operands, int count) {
  ElementwiseLayout<capacity> layout;
  layout.rank = 0;
  const Tensor& like = results.like();
  layout.numel = like.numel();
  bool linear = results.dense();
  for (int i = 0; i < count && linear; ++i) linear = !operands[i] || same_layout(*operands[i], like);
  if (linear) {
    layout.rank = 1;
    layout.sizes[0] = layout.numel;
    for (int i = 0; i < count; ++i) layout.strides[i][0] = operands[i] ? 1 : 0;
    return layout;
  }
  const StrideOrder order(op, like);
  for (int o = 0; o < order.count; ++o) {
    const int dim = order.dims[o];
    const int64_t size = like.size(dim);
    std::array<int64_t, capacity> strides{};
    for (int i = 0; i < count; ++i) strides[i] = operands[i] ? stride_along(*operands[i], like, dim) : 0;
    const int last = layout.rank - 1;
    bool merge = layout.rank > 0;
    for (int i = 0; i < count && merge; ++i) merge = layout.strides[i][last] == strides[i] * size;
    const int at = merge ? last : layout.rank++;
    layout.sizes[at] = (merge ? layout.sizes[at] : 1) * size;
    for (int i = 0; i < count; ++i) layout.strides[i][at] = strides[i];
  }
  if (layout.rank == 0) {  // one element
    layout.rank = 1;
    layout.sizes[0] = 1;
    for (int i = 0; i < count; ++i) layout.strides[i][0] = 0;
  }
  return layout;
}

// A dense tensor of any stride order is [outer, length, inner] in memory.
template <typename Tensor>
RowLayout row_layout(const char* op, const Tensor& dense, int64_t dim) {
  RowLayout layout{1, 1, 1};
  if (dense.dim() == 0) return layout;
  STD_TORCH_CHECK(dim >= 0 && dim < dense.dim(), op, ": dim is out of range");
  layout.length = dense.size(dim);
  const StrideOrder order(op, dense);
  bool outside = layout.length != 1;
  for (int o = 0; o < order.count; ++o) {
    const int d = order.dims[o];
    if (d == dim)
      outside = false;
    else
      (outside ? layout.outer : layout.inner) *= dense.size(d);
  }
  return layout;
}

// t, which broadcasts to `like`, in its layout; copied only if it has another.
template <typename Tensor>
Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = empty_strided(like, t, t.scalar_type());
  copy_(copy, t);
  return copy;
}

}  // namespace constrained_ops
