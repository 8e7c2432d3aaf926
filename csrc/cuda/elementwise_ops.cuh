// The operators of an elementwise family (constrained_ops/_library.py): what torch calls, down to the launchers. A
// family has a `name`, `with_map(lower, upper, f)` for bounds that are numbers, and a `TensorMap` for bounds that are
// tensors.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "elementwise.cuh"
#include "on_device.cuh"

namespace constrained_ops {

// An operand besides raw; None is null.
struct Input {
  const char* name;
  const Tensor* tensor;

  Input(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Input(const char* name, const std::optional<Tensor>& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}
};

// One call of an operator with `bounds` tensors for its bounds, none or two.
template <typename Program, int bounds>
class ElementwiseCall {
 public:
  static constexpr int operands = 1 + Program::inputs + bounds;
  using Inputs = std::array<Input, Program::inputs>;
  using Outputs = std::array<Tensor, Program::outputs>;

  ElementwiseCall(const char* op, const Tensor& raw, const Inputs& inputs, const std::array<Input, bounds>& of_bounds,
                  int64_t needed)
      : op_(op), dtype_(storage_dtype(op, raw)), needed_(needed) {
    int k = 0;
    tensors_[k++] = &raw;
    for (const Input& input : inputs) {
      if (input.tensor != nullptr) check_operand(op, input.name, *input.tensor, raw, raw.scalar_type());
      tensors_[k++] = input.tensor;
    }
    for (const Input& bound : of_bounds) {
      check_bound(op, bound.name, *bound.tensor, raw);
      tensors_[k++] = bound.tensor;
    }
  }

  // launch(queue, storage tag, operands) for anything that there is to do.
  template <typename F>
  Outputs run(const F& launch) {
    const Tensor& raw = *tensors_[0];
    const OnDevice on(op_, raw);
    const Results results(op_, raw);
    const Outputs outputs = allocate(results, std::make_index_sequence<Program::outputs>{});
    constexpr int64_t all = (int64_t(1) << Program::outputs) - 1;
    if (raw.numel() == 0 || (needed_ & all) == 0) return outputs;

    arrange(results);
    for_storage(dtype_, [&](auto tag) {
      using Storage = typename decltype(tag)::type;
      Operands<Program, Storage> given{};
      given.raw = data<Storage>(0);
      for (int k = 0; k < Program::inputs; ++k) given.in[k] = data<Storage>(1 + k);
      for (int k = 0; k < Program::outputs; ++k) given.out[k] = wanted(k) ? outputs[k].mutable_data_ptr() : nullptr;
      launch(on.queue(), tag, given);
    });
    return outputs;
  }

  const Strided<operands>& strided() const { return strided_; }
  int64_t numel() const { return numel_; }

  template <typename T>
  const T* data(int operand) const {
    return tensors_[operand] != nullptr ? static_cast<const T*>(tensors_[operand]->const_data_ptr()) : nullptr;
  }

  // raw and the inputs in the order of memory and aligned for vectors, each bound one number for all.
  bool is_linear() const {
    for (int k = 0; k < operands; ++k) {
      const bool of_bound = k >= operands - bounds;
      if (tensors_[k] == nullptr) continue;
      if (!strided_.is(k, of_bound ? 0 : 1) || (!of_bound && !is_aligned(data<void>(k)))) return false;
    }
    return true;
  }

 private:
  bool wanted(int k) const { return needed_ >> k & 1; }

  template <size_t... k>
  Outputs allocate(const Results& results, std::index_sequence<k...>) const {
    const ScalarType dtype = tensors_[0]->scalar_type();
    constexpr int first_of_bound = Program::outputs - bound_results<Program>;
    return {results.make(wanted(k), int(k) < first_of_bound ? dtype : compute_dtype(dtype))...};
  }

  // Common dimensions in the order in which results lie in memory; where those are too many for a kernel, of copies in
  // the results' layout, which are linear.
  void arrange(const Results& results) {
    auto layout = elementwise_layout<operands>(op_, results, tensors_, operands);
    if (layout.rank > max_dims) {
      for (int k = 0; k < operands; ++k) {
        if (tensors_[k] == nullptr) continue;
        copies_[k] = in_layout_of(*tensors_[k], results.like());
        tensors_[k] = &*copies_[k];
      }
      layout = elementwise_layout<operands>(op_, results, tensors_, operands);
    }
    numel_ = layout.numel;
    strided_ = Strided<operands>(layout);
  }

  const char* op_;
  Dtype dtype_;
  int64_t needed_, numel_ = 0;
  std::array<const Tensor*, operands> tensors_;
  std::array<std::optional<Tensor>, operands> copies_;
  Strided<operands> strided_;
};

template <typename Family>
struct ElementwiseOps {
  using MaybeTensor = std::optional<Tensor>;

  // Bounds that are numbers: the map is chosen here, and the bounds keep their double precision up to here.
  template <typename Program>
  static auto run(const char* op, const Tensor& raw, const typename ElementwiseCall<Program, 0>::Inputs& inputs,
                  double lower, double upper, int64_t needed = -1) {
    ElementwiseCall<Program, 0> call(op, raw, inputs, {}, needed);
    return std::tuple_cat(call.run([&](const Queue& queue, auto tag, const auto& operands) {
      using Storage = typename decltype(tag)::type;
      const ScalarBounds<Storage> source{bounds_of_scalars<Storage>(lower, upper)};
      if (!call.is_linear()) {  // waits for memory, whichever maps it computes
        launch_strided<typename Family::TensorMap>(queue, operands, source, call.strided(), call.numel());
        return;
      }
      Family::with_map(lower, upper, [&](auto map) {
        launch_linear<typename decltype(map)::type>(queue, operands, source, call.numel());
      });
    }));
  }

  template <typename Program>
  static auto run(const char* op, const Tensor& raw, const typename ElementwiseCall<Program, 2>::Inputs& inputs,
                  const Tensor& lower, const Tensor& upper, int64_t needed = -1) {
    ElementwiseCall<Program, 2> call(op, raw, inputs, {Input("lower", lower), Input("upper", upper)}, needed);
    return std::tuple_cat(call.run([&](const Queue& queue, auto tag, const auto& operands) {
      using Storage = typename decltype(tag)::type;
      using T = compute_t<Storage>;
      using Map = typename Family::TensorMap;
      const T *at_lower = call.template data<T>(call.operands - 2),
              *at_upper = call.template data<T>(call.operands - 1);
      if (call.is_linear()) {
        launch_linear<Map>(queue, operands, UniformBounds<Storage>{at_lower, at_upper}, call.numel());
      } else {
        launch_strided<Map>(queue, operands, ElementBounds<Storage>{at_lower, at_upper}, call.strided(), call.numel());
      }
    }));
  }

  template <typename Bound>
  static Tensor forward(const Tensor raw, const Bound lower, const Bound upper) {
    return std::get<0>(run<Forward<false>>(Family::forward, raw, {}, lower, upper));
  }

  template <typename Bound>
  static std::tuple<Tensor, Tensor> forward_log_det(const Tensor raw, const Bound lower, const Bound upper) {
    return run<Forward<true>>(Family::forward, raw, {}, lower, upper);
  }

  static Tensor backward(const MaybeTensor grad_x, const MaybeTensor grad_log_det, const Tensor raw, const double lower,
                         const double upper) {
    const Input g("grad_x", grad_x), h("grad_log_det", grad_log_det);
    return std::get<0>(grad_log_det ? run<Backward<true, false>>(Family::backward, raw, {g, h}, lower, upper)
                                    : run<Backward<false, false>>(Family::backward, raw, {g}, lower, upper));
  }

  static std::tuple<Tensor, Tensor, Tensor> backward_tensor(const MaybeTensor grad_x, const MaybeTensor grad_log_det,
                                                            const Tensor raw, const Tensor lower, const Tensor upper,
                                                            const int64_t needed) {
    const Input g("grad_x", grad_x), h("grad_log_det", grad_log_det);
    return grad_log_det ? run<Backward<true, true>>(Family::backward, raw, {g, h}, lower, upper, needed)
                        : run<Backward<false, true>>(Family::backward, raw, {g}, lower, upper, needed);
  }

  static std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensor along_raw, const MaybeTensor grad_x,
                                                            const MaybeTensor grad_log_det, const Tensor raw,
                                                            const double lower, const double upper,
                                                            const int64_t needed) {
    return run<DoubleBackward<false>>(
        Family::double_backward, raw,
        {Input("along_raw", along_raw), Input("grad_x", grad_x), Input("grad_log_det", grad_log_det)}, lower, upper,
        needed);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward_tensor(
      const MaybeTensor along_raw, const MaybeTensor along_lower, const MaybeTensor along_upper,
      const MaybeTensor grad_x, const MaybeTensor grad_log_det, const Tensor raw, const Tensor lower,
      const Tensor upper, const int64_t needed) {
    return run<DoubleBackward<true>>(
        Family::double_backward, raw,
        {Input("along_raw", along_raw), Input("grad_x", grad_x), Input("grad_log_det", grad_log_det),
         Input("along_lower", along_lower), Input("along_upper", along_upper)},
        lower, upper, needed);
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    const auto impl = [&](const char* kernel, auto* function) {
      m.impl((std::string(Family::name) + "_" + kernel).c_str(), function);
    };
    impl("forward", TORCH_BOX(&ElementwiseOps::forward<double>));
    impl("forward.tensor", TORCH_BOX(&ElementwiseOps::forward<Tensor>));
    impl("forward_log_det", TORCH_BOX(&ElementwiseOps::forward_log_det<double>));
    impl("forward_log_det.tensor", TORCH_BOX(&ElementwiseOps::forward_log_det<Tensor>));
    impl("backward", TORCH_BOX(&ElementwiseOps::backward));
    impl("backward.tensor", TORCH_BOX(&ElementwiseOps::backward_tensor));
    impl("double_backward", TORCH_BOX(&ElementwiseOps::double_backward));
    impl("double_backward.tensor", TORCH_BOX(&ElementwiseOps::double_backward_tensor));
  }
};

}  // namespace constrained_ops
