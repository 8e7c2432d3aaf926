// simplex_*: softmax rows (math/simplex.h).
#include <tuple>

#include "rowwise_op.cuh"
#include "simplex.cuh"

namespace constrained_ops {

// raw, then the other inputs; everything in one dense layout, raw's own where that is dense.
template <int order>
auto softmax(const char* op, const std::array<Tensor, 1 + order>& inputs, int64_t dim, int64_t needed) {
  constexpr const char* names[] = {"raw", "grad_x", "along_raw"};
  const Tensor& raw = inputs[0];
  storage_dtype(op, raw);
  for (int k = 1; k < 1 + order; ++k) check_operand(op, names[k], inputs[k], raw, raw.scalar_type());

  const OnDevice on(op, raw);
  const Results results(op, raw);
  const auto program = [](auto tag) {
    using Storage = typename decltype(tag)::type;
    using T = compute_t<Storage>;
    return Softmax<T, order>{next_above<Storage>(T(0))};
  };
  std::array<const Tensor*, 1 + order> operands;
  for (int k = 0; k < 1 + order; ++k) operands[k] = &inputs[k];
  if constexpr (order == 2) {
    Tensor for_grad_x = results.make(needed & 1), for_raw = results.make(needed & 2);
    launch_on_rows<3, 2>(on, op, results, operands, {&for_grad_x, &for_raw}, dim, program);
    return std::tuple(for_grad_x, for_raw);
  } else {
    Tensor result = results.make();
    launch_on_rows<1 + order, 1>(on, op, results, operands, {&result}, dim, program);
    return std::tuple(result);
  }
}

Tensor simplex_forward(const Tensor raw, const int64_t dim) {
  return std::get<0>(softmax<0>("simplex_forward", {raw}, dim, -1));
}

// A kernel that waits for memory computes x from raw as fast as it would read it.
Tensor simplex_backward(const Tensor grad_x, const Tensor raw, const int64_t dim, const std::optional<Tensor>) {
  return std::get<0>(softmax<1>("simplex_backward", {raw, grad_x}, dim, -1));
}

std::tuple<Tensor, Tensor> simplex_double_backward(const Tensor along_raw, const Tensor grad_x, const Tensor raw,
                                                   const int64_t dim, const int64_t needed) {
  return softmax<2>("simplex_double_backward", {raw, grad_x, along_raw}, dim, needed);
}

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) {
  m.impl("simplex_forward", TORCH_BOX(&constrained_ops::simplex_forward));
  m.impl("simplex_backward", TORCH_BOX(&constrained_ops::simplex_backward));
  m.impl("simplex_double_backward", TORCH_BOX(&constrained_ops::simplex_double_backward));
}
