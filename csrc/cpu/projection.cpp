#include <initializer_list>
#include <optional>
#include <tuple>

#include "direct.h"
#include "levels.h"
#include "pages.h"
#include "parallel.h"

namespace constrained_ops {
namespace {

constexpr int64_t elements_per_task = 8192;

// Operands as ProjectionCall has them, brought into the layout of `results`; empty results are not wanted.
template <typename Tensor>
void run(const char* op, Projection kernel, const BasicResults<Tensor>& results,
         std::initializer_list<const Tensor*> operands, std::initializer_list<const Tensor*> outputs, int64_t dim,
         double total = 0) {
  const Tensor& like = results.like();
  ProjectionCall call{row_layout(op, like, dim), {}, {}, total};
  if (like.numel() == 0) return;
  std::optional<Tensor> laid_out[std::size(call.inputs)];
  int i = 0;
  for (const Tensor* t : operands) {
    laid_out[i].emplace(in_layout_of(*t, like));
    call.inputs[i] = laid_out[i]->const_data_ptr();
    ++i;
  }
  i = 0;
  for (const Tensor* t : outputs) call.outputs[i++] = result_data(*t);
  const bool forward = kernel == Projection::forward || kernel == Projection::forward_weighted;
  const int64_t units = projection_units(call.layout, forward).count;
  const int64_t elements_per_unit = like.numel() / units;
  const ProjectionLoop loop = loops().projection(kernel, storage_dtype(op, **operands.begin()));
  parallel(units, std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, elements_per_unit)),
           [&](int64_t begin, int64_t end) { loop(call, begin, end); });
}

template <typename Tensor>
struct ProjectionOperators {
  static Tensor forward(const Tensor& x, int64_t dim, double total) {
    const char* op = "project_simplex";
    const BasicResults<Tensor> results(op, x);
    Tensor y = results.make();
    run(op, Projection::forward, results, {&x}, {&y}, dim, total);
    return y;
  }

  static Tensor forward_weighted(const Tensor& x, const Tensor& weight, int64_t dim, double total) {
    const char* op = "project_simplex";
    check_operand(op, "weight", weight, x, x.scalar_type(), "x");
    const BasicResults<Tensor> results(op, x);
    Tensor y = results.make();
    run(op, Projection::forward_weighted, results, {&x, &weight}, {&y}, dim, total);
    return y;
  }

  static Tensor backward(const Tensor& grad_y, const Tensor& y, int64_t dim) {
    const char* op = "project_simplex";
    check_operand(op, "grad_y", grad_y, y, y.scalar_type(), "y");
    const BasicResults<Tensor> results(op, y);
    Tensor grad_x = results.make();
    run(op, Projection::backward, results, {&grad_y, &y}, {&grad_x}, dim);
    return grad_x;
  }

  static std::tuple<Tensor, Tensor> backward_weighted(const Tensor& grad_y, const std::optional<Tensor>& x,
                                                      const Tensor& y, const Tensor& weight, int64_t dim,
                                                      int64_t needed) {
    const char* op = "project_simplex";
    check_operand(op, "grad_y", grad_y, y, y.scalar_type(), "y");
    check_operand(op, "weight", weight, y, y.scalar_type(), "y");
    if (x) check_operand(op, "x", *x, y, y.scalar_type(), "y");
    STD_TORCH_CHECK(x || !(needed & 2), op, ": the gradient to the weight needs x");
    const BasicResults<Tensor> results(op, y);
    Tensor grad_x = results.make(needed & 1), grad_weight = results.make(needed & 2);
    if (needed & 2)
      run(op, Projection::backward_to_weight, results, {&grad_y, &y, &weight, &*x}, {&grad_x, &grad_weight}, dim);
    else if (needed & 1)
      run(op, Projection::backward_weighted, results, {&grad_y, &y, &weight}, {&grad_x}, dim);
    return {grad_x, grad_weight};
  }
};

}  // namespace
}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(constrained_ops, CPU, m) {
  using namespace constrained_ops;
  using Dispatched = ProjectionOperators<Tensor>;
  using Direct = ProjectionOperators<DirectTensor>;
  implement<&Dispatched::forward, &Direct::forward>(m, "projection_forward");
  implement<&Dispatched::forward_weighted, &Direct::forward_weighted>(m, "projection_forward.weighted");
  implement<&Dispatched::backward, &Direct::backward>(m, "projection_backward");
  implement<&Dispatched::backward_weighted, &Direct::backward_weighted>(m, "projection_backward.weighted");
}
