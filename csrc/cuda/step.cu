// step: the step of the optimizers on everything that their tables list.
#include <optional>

#include "on_device.cuh"
#include "step.cuh"

namespace constrained_ops {
namespace {

// Contiguous, of `words` 8-byte words a row.
template <typename Row>
Row* table(const char* name, const Tensor& t, const Tensor& param, int64_t rows, ScalarType dtype = ScalarType::Long) {
  const int64_t words = static_cast<int64_t>(sizeof(Row)) / (dtype == ScalarType::Long ? 8 : 4);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == rows * words, "step: ", name,
                  " must be contiguous, with ", words, " words for each of ", rows, " entries");
  STD_TORCH_CHECK(t.is_cpu() == param.is_cpu() && t.get_device_index() == param.get_device_index(), "step: ", name,
                  " must be on the device of param");
  return static_cast<Row*>(t.mutable_data_ptr());
}

const float* number(const char* name, const std::optional<Tensor>& t, const Tensor& param) {
  return t ? table<const float>(name, *t, param, 1, ScalarType::Float) : nullptr;
}

template <typename Storage>
void launch_for(const Queue& queue, bool reduced_state, const StepTables& tables, int64_t items) {
  if constexpr (sizeof(Storage) == 2) {
    if (reduced_state) return launch_step<Storage, Storage>(queue, tables, items);
  }
  launch_step<Storage, compute_t<Storage>>(queue, tables, items);
}

}  // namespace

void step(const Tensor param, const Tensor exp_avg, const Tensor slots, const Tensor grads, const Tensor groups,
          const Tensor work, Tensor progress, const std::optional<Tensor> grad_scale,
          const std::optional<Tensor> found_inf, const int64_t cache) {
  const Dtype dtype = storage_dtype("step", param);
  const ScalarType state = exp_avg.scalar_type();
  STD_TORCH_CHECK(state == param.scalar_type() || state == compute_dtype(param.scalar_type()),
                  "step: exp_avg must be of param's dtype or its compute dtype");
  const int64_t limit = dtype == Dtype::float64 ? step_cache_limit<double> : step_cache_limit<float>;
  STD_TORCH_CHECK(cache >= 0 && cache <= limit, "step: cache must be from 0 to ", limit);
  const int64_t count = grads.numel(), items = work.size(0);
  const StepTables tables{table<const StepSlot>("slots", slots, param, count),
                          table<const void* const>("grads", grads, param, count),
                          table<const StepGroup>("groups", groups, param, groups.size(0)),
                          table<const StepWork>("work", work, param, items),
                          table<StepProgress>("progress", progress, param, count, ScalarType::Int),
                          number("grad_scale", grad_scale, param),
                          number("found_inf", found_inf, param),
                          static_cast<int>(cache)};
  if (items == 0) return;
  const OnDevice on("step", param);
  for_storage(dtype, [&](auto tag) {
    launch_for<typename decltype(tag)::type>(on.queue(), state == param.scalar_type(), tables, items);
  });
}

}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(CO_NAMESPACE, CO_DISPATCH_KEY, m) { m.impl("step", TORCH_BOX(&constrained_ops::step)); }
