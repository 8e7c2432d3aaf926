// The outer layer of the elementwise family on the CPU: from registered operators to loops. A transform is a struct
// with `name` and `loop`; one line registers all its operators.
#pragma once

#include <limits>
#include <string>
#include <tuple>

#include "direct.h"
#include "levels.h"
#include "pages.h"
#include "parallel.h"

namespace constrained_ops {

// One operator call being put together: operands in the order of the loops, then results, then run.
template <typename Tensor>
class ElementwiseOp {
 public:
  ElementwiseOp(const char* name, const Tensor& raw)
      : name_(name), raw_(raw), dtype_(storage_dtype(name, raw)), results_(name, raw) {
    add(&raw);
  }

  void bounds(double lower, double upper) {
    call_.lower = lower;
    call_.upper = upper;
    const bool low = lower != -std::numeric_limits<double>::infinity(),
               high = upper != std::numeric_limits<double>::infinity();
    kind_ = low ? (high ? BoundsKind::both : BoundsKind::lower_only)
                : (high ? BoundsKind::upper_only : BoundsKind::neither);
  }
  // One number for all elements is read here, unless gradients to the bounds are wanted.
  void bounds(const Tensor& lower, const Tensor& upper, bool with_gradients = false) {
    check_bound(name_, "lower", lower, raw_);
    check_bound(name_, "upper", upper, raw_);
    if (!with_gradients && lower.numel() == 1 && upper.numel() == 1) {
      bounds(number(lower), number(upper));
      return;
    }
    add(&lower);
    add(&upper);
    kind_ = BoundsKind::by_element;
  }

  void input(const char* name, const Tensor& t) {
    check_operand(name_, name, t, raw_, raw_.scalar_type());
    add(&t);
  }
  void input(const char* name, const std::optional<Tensor>& t) { t ? input(name, *t) : add(nullptr); }

  Kernel gradients(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_log_det) {
    input("grad_x", grad_x);
    if (!grad_log_det) return Kernel::backward;
    input("grad_log_det", grad_log_det);
    return Kernel::backward_log_det;
  }

  Tensor output(bool wanted = true) { return output(wanted, raw_.scalar_type()); }
  Tensor bound_output(bool wanted) { return output(wanted, compute_dtype(raw_.scalar_type())); }

  template <typename Transform>
  void run(Kernel kernel) {
    call_.layout = elementwise_layout<max_inputs>(name_, results_, operands_, count_);
    if (call_.layout.numel == 0) return;
    parallel(
        call_.layout.numel, elements_per_task,
        [this, loop = Transform::loop(kernel, dtype_, kind_)](int64_t begin, int64_t end) { loop(call_, begin, end); });
  }

 private:
  static constexpr int64_t elements_per_task = 16384;

  static double number(const Tensor& t) {
    const void* const at = t.const_data_ptr();
    return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
  void add(const Tensor* t) {
    operands_[count_] = t;
    call_.inputs[count_++] = t ? t->const_data_ptr() : nullptr;
  }
  Tensor output(bool wanted, ScalarType dtype) {
    Tensor result = results_.make(wanted, dtype);
    call_.outputs[outputs_++] = result_data(result);
    return result;
  }

  const char* name_;
  const Tensor& raw_;
  Dtype dtype_;
  BasicResults<Tensor> results_;
  BoundsKind kind_;
  ElementwiseCall call_;
  std::array<const Tensor*, max_inputs> operands_;
  int count_ = 0, outputs_ = 0;
};

template <typename Transform, typename Tensor>
struct ElementwiseOperators {
  using MaybeTensor = std::optional<Tensor>;

  static Tensor forward(const Tensor& raw, double lower, double upper) { return forward_between(raw, lower, upper); }
  static Tensor forward_tensor(const Tensor& raw, const Tensor& lower, const Tensor& upper) {
    return forward_between(raw, lower, upper);
  }

  using Pair = std::tuple<Tensor, Tensor>;
  static Pair forward_log_det(const Tensor& raw, double lower, double upper) {
    return forward_log_det_between(raw, lower, upper);
  }
  static Pair forward_log_det_tensor(const Tensor& raw, const Tensor& lower, const Tensor& upper) {
    return forward_log_det_between(raw, lower, upper);
  }

  static Tensor backward(const MaybeTensor& grad_x, const MaybeTensor& grad_log_det, const Tensor& raw, double lower,
                         double upper) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper);
    const Kernel kernel = op.gradients(grad_x, grad_log_det);
    Tensor grad_raw = op.output();
    op.template run<Transform>(kernel);
    return grad_raw;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward_tensor(const MaybeTensor& grad_x, const MaybeTensor& grad_log_det,
                                                            const Tensor& raw, const Tensor& lower, const Tensor& upper,
                                                            int64_t needed) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper, needed & (2 | 4));
    const Kernel kernel = op.gradients(grad_x, grad_log_det);
    Tensor grad_raw = op.output(needed & 1), grad_lower = op.bound_output(needed & 2),
           grad_upper = op.bound_output(needed & 4);
    op.template run<Transform>(kernel);
    return {grad_raw, grad_lower, grad_upper};
  }

  static std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& along_raw, const MaybeTensor& grad_x,
                                                            const MaybeTensor& grad_log_det, const Tensor& raw,
                                                            double lower, double upper, int64_t needed) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper);
    op.input("along_raw", along_raw);
    op.input("grad_x", grad_x);
    op.input("grad_log_det", grad_log_det);
    Tensor for_grad_x = op.output(needed & 1), for_grad_log_det = op.output(needed & 2),
           for_raw = op.output(needed & 4);
    op.template run<Transform>(Kernel::double_backward);
    return {for_grad_x, for_grad_log_det, for_raw};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward_tensor(
      const MaybeTensor& along_raw, const MaybeTensor& along_lower, const MaybeTensor& along_upper,
      const MaybeTensor& grad_x, const MaybeTensor& grad_log_det, const Tensor& raw, const Tensor& lower,
      const Tensor& upper, int64_t needed) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper, true);
    op.input("along_raw", along_raw);
    op.input("grad_x", grad_x);
    op.input("grad_log_det", grad_log_det);
    op.input("along_lower", along_lower);
    op.input("along_upper", along_upper);
    Tensor for_grad_x = op.output(needed & 1), for_grad_log_det = op.output(needed & 2),
           for_raw = op.output(needed & 4);
    Tensor for_lower = op.bound_output(needed & 8), for_upper = op.bound_output(needed & 16);
    op.template run<Transform>(Kernel::double_backward);
    return {for_grad_x, for_grad_log_det, for_raw, for_lower, for_upper};
  }

 private:
  template <typename Bound>
  static Tensor forward_between(const Tensor& raw, const Bound& lower, const Bound& upper) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper);
    Tensor x = op.output();
    op.template run<Transform>(Kernel::forward);
    return x;
  }

  template <typename Bound>
  static Pair forward_log_det_between(const Tensor& raw, const Bound& lower, const Bound& upper) {
    ElementwiseOp<Tensor> op(Transform::name, raw);
    op.bounds(lower, upper);
    Tensor x = op.output(), log_det = op.output();
    op.template run<Transform>(Kernel::forward_log_det);
    return {x, log_det};
  }
};

template <typename Transform>
void implement_elementwise(torch::stable::detail::StableLibrary& library) {
  using Dispatched = ElementwiseOperators<Transform, Tensor>;
  using Direct = ElementwiseOperators<Transform, DirectTensor>;
  const std::string prefix = std::string(Transform::name) + "_";
  implement<&Dispatched::forward, &Direct::forward>(library, prefix + "forward");
  implement<&Dispatched::forward_tensor, &Direct::forward_tensor>(library, prefix + "forward.tensor");
  implement<&Dispatched::forward_log_det, &Direct::forward_log_det>(library, prefix + "forward_log_det");
  implement<&Dispatched::forward_log_det_tensor, &Direct::forward_log_det_tensor>(library,
                                                                                  prefix + "forward_log_det.tensor");
  implement<&Dispatched::backward, &Direct::backward>(library, prefix + "backward");
  implement<&Dispatched::backward_tensor, &Direct::backward_tensor>(library, prefix + "backward.tensor");
  implement<&Dispatched::double_backward, &Direct::double_backward>(library, prefix + "double_backward");
  implement<&Dispatched::double_backward_tensor, &Direct::double_backward_tensor>(library,
                                                                                  prefix + "double_backward.tensor");
}

}  // namespace constrained_ops
