#include <initializer_list>
#include <tuple>

#include "direct.h"
#include "levels.h"
#include "pages.h"
#include "parallel.h"

namespace constrained_ops {
namespace {

constexpr int64_t elements_per_task = 8192;

// `operands`: raw first, dense, all in one layout.
template <typename Tensor>
void run(const char* op, Kernel kernel, std::initializer_list<const Tensor*> operands,
         std::initializer_list<const Tensor*> results, int64_t dim) {
  const Tensor& raw = **operands.begin();
  if (raw.numel() == 0) return;
  RowCall call{};
  call.layout = row_layout(op, raw, dim);
  int i = 0;
  for (const Tensor* t : operands) call.inputs[i++] = t->const_data_ptr();
  i = 0;
  for (const Tensor* t : results) call.outputs[i++] = result_data(*t);
  const int64_t units = softmax_units(call.layout).count;
  const int64_t elements_per_unit = raw.numel() / units;
  const RowLoop loop = loops().softmax(kernel, storage_dtype(op, raw));
  parallel(units, std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, elements_per_unit)),
           [&](int64_t begin, int64_t end) { loop(call, begin, end); });
}

template <typename Tensor>
struct SimplexOperators {
  static Tensor forward(const Tensor& raw, int64_t dim) {
    const char* op = "simplex";
    const BasicResults<Tensor> results(op, raw);
    const Tensor input = in_layout_of(raw, results.like());
    Tensor x = results.make();
    run(op, Kernel::forward, {&input}, {&x}, dim);
    return x;
  }

  static Tensor backward(const Tensor& grad_x, const Tensor& raw, int64_t dim, const std::optional<Tensor>& x) {
    const char* op = "simplex";
    check_operand(op, "grad_x", grad_x, raw, raw.scalar_type());
    if (x) check_operand(op, "x", *x, raw, raw.scalar_type());
    const bool given = x && compute_dtype(raw.scalar_type()) == raw.scalar_type();  // rounded to 16 bits x would not do
    const BasicResults<Tensor> results(op, raw);
    const Tensor input = in_layout_of(given ? *x : raw, results.like()), g = in_layout_of(grad_x, results.like());
    Tensor grad_raw = results.make();
    run(op, given ? Kernel::backward_from_result : Kernel::backward, {&input, &g}, {&grad_raw}, dim);
    return grad_raw;
  }

  static std::tuple<Tensor, Tensor> double_backward(const Tensor& along_raw, const Tensor& grad_x, const Tensor& raw,
                                                    int64_t dim, int64_t needed) {
    const char* op = "simplex";
    check_operand(op, "along_raw", along_raw, raw, raw.scalar_type());
    check_operand(op, "grad_x", grad_x, raw, raw.scalar_type());
    const BasicResults<Tensor> results(op, raw);
    const Tensor input = in_layout_of(raw, results.like()), along = in_layout_of(along_raw, results.like()),
                 g = in_layout_of(grad_x, results.like());
    Tensor for_grad_x = results.make(needed & 1), for_raw = results.make(needed & 2);
    if (needed & 3) run(op, Kernel::double_backward, {&input, &along, &g}, {&for_grad_x, &for_raw}, dim);
    return {for_grad_x, for_raw};
  }
};

}  // namespace
}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(constrained_ops, CPU, m) {
  using namespace constrained_ops;
  using Dispatched = SimplexOperators<Tensor>;
  using Direct = SimplexOperators<DirectTensor>;
  implement<&Dispatched::forward, &Direct::forward>(m, "simplex_forward");
  implement<&Dispatched::backward, &Direct::backward>(m, "simplex_backward");
  implement<&Dispatched::double_backward, &Direct::double_backward>(m, "simplex_double_backward");
}
