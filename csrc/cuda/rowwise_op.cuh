// From tensors to a launch of the rowwise family.
#pragma once

#include <array>
#include <optional>

#include "on_device.cuh"
#include "rowwise.cuh"

namespace constrained_ops {

// Runs `program_of(Tag<Storage>)` on rows along `dim`: `inputs` in the program's order, of the dtype and shape of the
// first; `outputs` made by `results`, empty where they are not wanted.
template <size_t inputs_count, size_t outputs_count, typename ProgramOf>
void launch_on_rows(const OnDevice& on, const char* op, const Results& results,
                    const std::array<const Tensor*, inputs_count>& inputs,
                    const std::array<Tensor*, outputs_count>& outputs, int64_t dim, const ProgramOf& program_of) {
  const RowLayout layout = row_layout(op, results.like(), dim);
  bool wanted = false;
  for (const Tensor* output : outputs) wanted = wanted || output->numel() > 0;
  if (!wanted) return;

  std::array<std::optional<Tensor>, inputs_count> laid_out;
  for (size_t k = 0; k < inputs_count; ++k) laid_out[k] = in_layout_of(*inputs[k], results.like());
  for_storage(storage_dtype(op, *inputs[0]), [&](auto tag) {
    using Storage = typename decltype(tag)::type;
    const auto program = program_of(tag);
    using Program = std::remove_const_t<decltype(program)>;
    static_assert(Program::inputs == inputs_count && Program::results == outputs_count);
    RowOperands<Program, Storage> operands{};
    for (size_t k = 0; k < inputs_count; ++k)
      operands.in[k] = static_cast<const Storage*>(laid_out[k]->const_data_ptr());
    for (size_t k = 0; k < outputs_count; ++k)
      operands.out[k] = outputs[k]->numel() ? static_cast<Storage*>(outputs[k]->mutable_data_ptr()) : nullptr;
    launch_rows(on.queue(), operands, Rows(layout.outer, layout.length, layout.inner), program);
  });
}

}  // namespace constrained_ops
