// ilr_* and stick_breaking_*: the bijections onto the simplex (math/bijection.h).
#include <tuple>

#include "../bijection_tensors.h"
#include "direct.h"
#include "levels.h"
#include "pages.h"
#include "parallel.h"

namespace constrained_ops {
namespace {

constexpr int64_t elements_per_task = 4096;
constexpr int64_t tasks_at_once = 64;  // many: a loop begins with a table of numbers for a row

template <Bijection kind>
constexpr const char* op = kind == Bijection::ilr ? "simplex of kind \"ilr\"" : "simplex of kind \"stick_breaking\"";

void run(const BijectionCall& call, Bijection kind, Kernel kernel, Dtype dtype) {
  const auto [outer, length, inner] = call.layout;
  if (outer * inner == 0) return;
  const int64_t units = bijection_units(call.layout).count, elements_per_unit = outer * length * inner / units;
  const BijectionLoop loop = loops().bijection(kind, kernel, dtype);
  parallel(
      units, std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, elements_per_unit)),
      [&](int64_t begin, int64_t end) { loop(call, begin, end); }, tasks_at_once);
}

template <typename Tensor>
const void* data_of(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

template <Bijection kind, typename Tensor>
struct BijectionOperators {
  static std::tuple<Tensor, Tensor> forward(const Tensor& raw, int64_t dim, bool with_log_det) {
    const BasicBijectionTensors<Tensor> tensors(op<kind>, raw, dim);
    const Tensor input = tensors.like_raw("raw", raw);
    Tensor x = tensors.make_x(), log_det = tensors.make_log_det(with_log_det);
    BijectionCall call{tensors.layout(), input.const_data_ptr()};
    call.x = result_data(x);
    call.log_det = result_data(log_det);
    run(call, kind, Kernel::forward, storage_dtype(op<kind>, raw));
    return {x, log_det};
  }

  static Tensor forward_x(const Tensor& raw, int64_t dim) { return std::get<0>(forward(raw, dim, false)); }
  static std::tuple<Tensor, Tensor> forward_log_det(const Tensor& raw, int64_t dim) { return forward(raw, dim, true); }

  static Tensor backward(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_log_det,
                         const Tensor& raw, int64_t dim) {
    const BasicBijectionTensors<Tensor> tensors(op<kind>, raw, dim);
    const Tensor input = tensors.like_raw("raw", raw);
    const auto g = tensors.like_x("grad_x", grad_x), h = tensors.like_log_det("grad_log_det", grad_log_det);
    Tensor grad_raw = tensors.make_raw();
    BijectionCall call{tensors.layout(), input.const_data_ptr(), nullptr, data_of(g), data_of(h)};
    call.grad_raw = result_data(grad_raw);
    if (call.grad_raw) run(call, kind, Kernel::backward, storage_dtype(op<kind>, raw));
    return grad_raw;
  }

  static std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor& along_raw,
                                                            const std::optional<Tensor>& grad_x,
                                                            const std::optional<Tensor>& grad_log_det,
                                                            const Tensor& raw, int64_t dim, int64_t needed) {
    const BasicBijectionTensors<Tensor> tensors(op<kind>, raw, dim);
    const Tensor input = tensors.like_raw("raw", raw), along = tensors.like_raw("along_raw", along_raw);
    const auto g = tensors.like_x("grad_x", grad_x), h = tensors.like_log_det("grad_log_det", grad_log_det);
    Tensor for_grad_x = tensors.make_x(needed & 1), for_grad_log_det = tensors.make_log_det(needed & 2),
           for_raw = tensors.make_raw(needed & 4);
    BijectionCall call{tensors.layout(), input.const_data_ptr(), along.const_data_ptr(), data_of(g), data_of(h)};
    call.x = result_data(for_grad_x);
    call.log_det = result_data(for_grad_log_det);
    call.grad_raw = result_data(for_raw);
    if (needed & 7) run(call, kind, Kernel::double_backward, storage_dtype(op<kind>, raw));
    return {for_grad_x, for_grad_log_det, for_raw};
  }
};

template <Bijection kind>
void implement_bijection(torch::stable::detail::StableLibrary& library, const std::string& name) {
  using Dispatched = BijectionOperators<kind, Tensor>;
  using Direct = BijectionOperators<kind, DirectTensor>;
  implement<&Dispatched::forward_x, &Direct::forward_x>(library, name + "_forward");
  implement<&Dispatched::forward_log_det, &Direct::forward_log_det>(library, name + "_forward_log_det");
  implement<&Dispatched::backward, &Direct::backward>(library, name + "_backward");
  implement<&Dispatched::double_backward, &Direct::double_backward>(library, name + "_double_backward");
}

}  // namespace
}  // namespace constrained_ops

STABLE_TORCH_LIBRARY_IMPL(constrained_ops, CPU, m) {
  using namespace constrained_ops;
  implement_bijection<Bijection::ilr>(m, "ilr");
  implement_bijection<Bijection::stick_breaking>(m, "stick_breaking");
}
