// ilr_* and stick_breaking_*: the bijections onto the simplex (math/bijection.h).
#include <tuple>

#include "../bijection_tensors.h"
#include "bijection.cuh"
#include "on_device.cuh"

namespace constrained_ops {

template <typename Scalar, int order>
using IlrOf = Ilr<Scalar, order>;
template <typename Scalar, int order>
using StickBreakingOf = StickBreaking<Scalar, order>;

// Operands and results on the way to a launch; `raw`, and what is present, in one layout.
struct BijectionCall {
  Tensor raw;
  std::optional<Tensor> along, g, h, x, log_det, grad_raw;
};

template <template <typename, int> typename Kind, int order>
void run(const char* op, const BijectionTensors& tensors, const BijectionCall& call) {
  const RowLayout layout = tensors.layout();
  if (layout.outer * layout.inner == 0) return;
  const OnDevice on(op, call.raw);
  for_storage(storage_dtype(op, call.raw), [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    using T = compute_t<Storage>;
    const auto input = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const Storage*>(t->const_data_ptr()) : nullptr;
    };
    const auto output = [](const std::optional<Tensor>& t) {
      return t && t->numel() > 0 ? static_cast<Storage*>(t->mutable_data_ptr()) : nullptr;
    };
    const Rows rows(layout.outer, layout.length, layout.inner);
    const BijectionShape shape(rows, bijection_threads<Storage, order>);
    std::optional<Tensor> carries;
    if (shape.parts > 1 && order > 0) {
      carries =
          torch::stable::new_empty(call.raw, {rows.count * shape.parts * 2}, compute_dtype(call.raw.scalar_type()));
    }
    const BijectionOperands<Storage> operands{static_cast<const Storage*>(call.raw.const_data_ptr()),
                                              input(call.along),
                                              input(call.g),
                                              input(call.h),
                                              output(call.x),
                                              output(call.log_det),
                                              output(call.grad_raw),
                                              carries ? static_cast<T*>(carries->mutable_data_ptr()) : nullptr,
                                              next_above<Storage>(T(0))};
    launch_bijection<Kind<T, order>, order>(on.queue(), operands, rows, shape);
  });
}

template <template <typename, int> typename Kind>
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& raw, int64_t dim, bool with_log_det) {
  const BijectionTensors tensors(op, raw, dim);
  const Tensor x = tensors.make_x(), log_det = tensors.make_log_det(with_log_det);
  run<Kind, 0>(op, tensors, {tensors.like_raw("raw", raw), {}, {}, {}, x, log_det, {}});
  return {x, log_det};
}

template <template <typename, int> typename Kind>
Tensor backward(const char* op, const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_log_det,
                const Tensor& raw, int64_t dim) {
  const BijectionTensors tensors(op, raw, dim);
  const Tensor grad_raw = tensors.make_raw();
  if (grad_raw.numel() == 0) return grad_raw;
  run<Kind, 1>(op, tensors,
               {tensors.like_raw("raw", raw),
                {},
                tensors.like_x("grad_x", grad_x),
                tensors.like_log_det("grad_log_det", grad_log_det),
                {},
                {},
                grad_raw});
  return grad_raw;
}

template <template <typename, int> typename Kind>
std::tuple<Tensor, Tensor, Tensor> double_backward(const char* op, const Tensor& along_raw,
                                                   const std::optional<Tensor>& grad_x,
                                                   const std::optional<Tensor>& grad_log_det, const Tensor& raw,
                                                   int64_t dim, int64_t needed) {
  const BijectionTensors tensors(op, raw, dim);
  const Tensor for_grad_x = tensors.make_x(needed & 1), for_grad_log_det = tensors.make_log_det(needed & 2),
               for_raw = tensors.make_raw(needed & 4);
  if (needed & 7) {
    run<Kind, 2>(
        op, tensors,
        {tensors.like_raw("raw", raw), tensors.like_raw("along_raw", along_raw), tensors.like_x("grad_x", grad_x),
         tensors.like_log_det("grad_log_det", grad_log_det), for_grad_x, for_grad_log_det, for_raw});
  }
  return {for_grad_x, for_grad_log_det, for_raw};
}

// The operators of a kind. Arguments by value: nvcc's host compiler boxes no others.
#define CO_BIJECTION(kind, Kind)                                                                               \
  Tensor kind##_forward(const Tensor raw, const int64_t dim) {                                                 \
    return std::get<0>(forward<Kind>(#kind "_forward", raw, dim, false));                                      \
  }                                                                                                            \
  std::tuple<Tensor, Tensor> kind##_forward_log_det(const Tensor raw, const int64_t dim) {                     \
    return forward<Kind>(#kind "_forward", raw, dim, true);                                                    \
  }                                                                                                            \
  Tensor kind##_backward(const std::optional<Tensor> grad_x, const std::optional<Tensor> grad_log_det,         \
                         const Tensor raw, const int64_t dim) {                                                \
    return backward<Kind>(#kind "_backward", grad_x, grad_log_det, raw, dim);                                  \
  }                                                                                                            \
  std::tuple<Tensor, Tensor, Tensor> kind##_double_backward(                                                   \
      const Tensor along_raw, const std::optional<Tensor> grad_x, const std::optional<Tensor> grad_log_det,    \
      const Tensor raw, const int64_t dim, const int64_t needed) {                                             \
    return double_backward<Kind>(#kind "_double_backward", along_raw, grad_x, grad_log_det, raw, dim, needed); \
  }

CO_BIJECTION(ilr, IlrOf)
CO_BIJECTION(stick_breaking, StickBreakingOf)

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) {
  m.impl("ilr_forward", TORCH_BOX(&constrained_ops::ilr_forward));
  m.impl("ilr_forward_log_det", TORCH_BOX(&constrained_ops::ilr_forward_log_det));
  m.impl("ilr_backward", TORCH_BOX(&constrained_ops::ilr_backward));
  m.impl("ilr_double_backward", TORCH_BOX(&constrained_ops::ilr_double_backward));
  m.impl("stick_breaking_forward", TORCH_BOX(&constrained_ops::stick_breaking_forward));
  m.impl("stick_breaking_forward_log_det", TORCH_BOX(&constrained_ops::stick_breaking_forward_log_det));
  m.impl("stick_breaking_backward", TORCH_BOX(&constrained_ops::stick_breaking_backward));
  m.impl("stick_breaking_double_backward", TORCH_BOX(&constrained_ops::stick_breaking_double_backward));
}
