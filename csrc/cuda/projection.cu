// projection_*: rows onto the simplex (math/projection.h).
#include <tuple>

#include "projection.cuh"
#include "rowwise_op.cuh"

namespace constrained_ops {

template <typename Tag>
using compute_of = compute_t<typename Tag::type>;

Tensor projection_forward(const Tensor x, const int64_t dim, const double total) {
  const char* op = "projection_forward";
  storage_dtype(op, x);
  const OnDevice on(op, x);
  const Results results(op, x);
  Tensor y = results.make();
  launch_on_rows<1, 1>(on, op, results, {&x}, {&y}, dim, [&](auto tag) {
    using T = compute_of<decltype(tag)>;
    return Project<T, false>{static_cast<T>(total)};
  });
  return y;
}

Tensor projection_forward_weighted(const Tensor x, const Tensor weight, const int64_t dim, const double total) {
  const char* op = "projection_forward";
  storage_dtype(op, x);
  check_operand(op, "weight", weight, x, x.scalar_type(), "x");
  const OnDevice on(op, x);
  const Results results(op, x);
  Tensor y = results.make();
  launch_on_rows<2, 1>(on, op, results, {&x, &weight}, {&y}, dim, [&](auto tag) {
    using T = compute_of<decltype(tag)>;
    return Project<T, true>{static_cast<T>(total)};
  });
  return y;
}

Tensor projection_backward(const Tensor grad_y, const Tensor y, const int64_t dim) {
  const char* op = "projection_backward";
  storage_dtype(op, y);
  check_operand(op, "grad_y", grad_y, y, y.scalar_type(), "y");
  const OnDevice on(op, y);
  const Results results(op, y);
  Tensor grad_x = results.make();
  launch_on_rows<2, 1>(on, op, results, {&grad_y, &y}, {&grad_x}, dim,
                       [](auto tag) { return ProjectBackward<compute_of<decltype(tag)>, false, false>{}; });
  return grad_x;
}

std::tuple<Tensor, Tensor> projection_backward_weighted(const Tensor grad_y, const std::optional<Tensor> x,
                                                        const Tensor y, const Tensor weight, const int64_t dim,
                                                        const int64_t needed) {
  const char* op = "projection_backward";
  storage_dtype(op, y);
  check_operand(op, "grad_y", grad_y, y, y.scalar_type(), "y");
  check_operand(op, "weight", weight, y, y.scalar_type(), "y");
  if (x) check_operand(op, "x", *x, y, y.scalar_type(), "y");
  STD_TORCH_CHECK(x || !(needed & 2), op, ": the gradient to the weight needs x");
  const OnDevice on(op, y);
  const Results results(op, y);
  Tensor grad_x = results.make(needed & 1), grad_weight = results.make(needed & 2);
  if (needed & 2) {
    launch_on_rows<4, 2>(on, op, results, {&grad_y, &weight, &y, &*x}, {&grad_x, &grad_weight}, dim,
                         [](auto tag) { return ProjectBackward<compute_of<decltype(tag)>, true, true>{}; });
  } else {
    launch_on_rows<3, 1>(on, op, results, {&grad_y, &weight, &y}, {&grad_x}, dim,
                         [](auto tag) { return ProjectBackward<compute_of<decltype(tag)>, true, false>{}; });
  }
  return {grad_x, grad_weight};
}

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) {
  m.impl("projection_forward", TORCH_BOX(&constrained_ops::projection_forward));
  m.impl("projection_forward.weighted", TORCH_BOX(&constrained_ops::projection_forward_weighted));
  m.impl("projection_backward", TORCH_BOX(&constrained_ops::projection_backward));
  m.impl("projection_backward.weighted", TORCH_BOX(&constrained_ops::projection_backward_weighted));
}
