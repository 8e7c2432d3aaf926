// simplex_*: softmax rows (math/simplex.h).
#include <tuple>

#include "on_device.cuh"
#include "simplex.cuh"

namespace constrained_ops {

// raw, then the other inputs; everything in one dense layout, raw's own where that is dense.
template <int order>
auto softmax(const char* op, const std::array<Tensor, 1 + order>& inputs, int64_t dim, int64_t needed) {
  constexpr int outputs_count = order == 2 ? 2 : 1;
  constexpr const char* names[] = {"raw", "grad_x", "along_raw"};
  const Tensor& raw = inputs[0];
  const Dtype dtype = storage_dtype(op, raw);
  for (int k = 1; k < 1 + order; ++k) check_operand(op, names[k], inputs[k], raw, raw.scalar_type());

  const OnDevice on(op, raw);
  const Results results(op, raw);
  const RowLayout layout = row_layout(op, results.like(), dim);
  std::array<Tensor, outputs_count> outputs = [&] {
    if constexpr (order == 2)
      return std::array<Tensor, 2>{results.make(needed & 1), results.make(needed & 2)};
    else
      return std::array<Tensor, 1>{results.make()};
  }();
  if (raw.numel() == 0 || (needed & 3) == 0) return std::tuple_cat(outputs);

  std::array<std::optional<Tensor>, 1 + order> laid_out;
  for (int k = 0; k < 1 + order; ++k) laid_out[k] = in_layout_of(inputs[k], results.like());
  for_storage(dtype, [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    using T = compute_t<Storage>;
    using Program = Softmax<T, order>;
    RowOperands<Program, Storage> operands{};
    for (int k = 0; k < 1 + order; ++k) operands.in[k] = static_cast<const Storage*>(laid_out[k]->const_data_ptr());
    for (int k = 0; k < outputs_count; ++k) {
      operands.out[k] = needed >> k & 1 ? static_cast<Storage*>(outputs[k].mutable_data_ptr()) : nullptr;
    }
    const Rows rows(layout.outer, layout.length, layout.inner);
    launch_rows(on.queue(), operands, rows, Program{next_above<Storage>(T(0))});
  });
  return std::tuple_cat(outputs);
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
