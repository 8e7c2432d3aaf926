// The operands and results of the bijections onto the simplex, which are not of one shape: what the outer layers of CPU
// and CUDA share.
#pragma once

#include <vector>

#include "tensors.h"

namespace constrained_ops {

// Results as empty_bijection() of constrained_ops/_library.py has them. All lie in one order of dimensions in memory.
template <typename Tensor>
class BasicBijectionTensors {
 public:
  BasicBijectionTensors(const char* op, const Tensor& raw, int64_t dim) : op_(op), dim_(dim), results_(op, raw) {
    STD_TORCH_CHECK(dim >= 0 && dim < raw.dim(), op, ": dim is out of range");
    STD_TORCH_CHECK(raw.size(dim) < (int64_t(1) << 31) - 1, op, ": more than 2^31 - 1 elements along dim");
    const Tensor& like = results_.like();
    for (int64_t d = 0; d < raw.dim(); ++d) slowest_first_.push_back(d);
    std::stable_sort(slowest_first_.begin(), slowest_first_.end(),
                     [&](int64_t a, int64_t b) { return like.stride(a) > like.stride(b); });
  }

  Tensor make_raw(bool wanted = true) const { return results_.make(wanted); }
  Tensor make_x(bool wanted = true) const { return wanted ? make(results_.like().size(dim_) + 1) : make_raw(false); }
  Tensor make_log_det(bool wanted = true) const { return wanted ? make(0) : make_raw(false); }

  // An operand in the layout of such a result, copied only if it has another; checked.
  Tensor like_raw(const char* name, const Tensor& t) const {
    check_operand(op_, name, t, results_.like(), results_.like().scalar_type());
    return in_layout_of(t, results_.like());
  }
  std::optional<Tensor> like_x(const char* name, const std::optional<Tensor>& t) const {
    return laid_out(name, t, results_.like().size(dim_) + 1);
  }
  std::optional<Tensor> like_log_det(const char* name, const std::optional<Tensor>& t) const {
    return laid_out(name, t, 0);
  }

  // Of x; raw is one shorter, log_det lies as [outer, inner].
  RowLayout layout() const {
    RowLayout layout{1, results_.like().size(dim_) + 1, 1};
    bool outside = true;
    for (const int64_t d : slowest_first_) {
      if (d == dim_)
        outside = false;
      else
        (outside ? layout.outer : layout.inner) *= results_.like().size(d);
    }
    return layout;
  }

 private:
  // `length` numbers along dim; 0: without it.
  Tensor make(int64_t length) const {
    const Tensor& like = results_.like();
    std::vector<int64_t> sizes, strides(like.dim());
    for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(d == dim_ ? std::max<int64_t>(length, 1) : like.size(d));
    int64_t step = 1;
    for (auto d = slowest_first_.rbegin(); d != slowest_first_.rend(); ++d) {
      strides[*d] = step;
      step *= std::max<int64_t>(sizes[*d], 1);
    }
    if (length == 0) {
      sizes.erase(sizes.begin() + dim_);
      strides.erase(strides.begin() + dim_);
    }
    return empty_strided(sizes.size(), sizes.data(), strides.data(), like, like.scalar_type());
  }

  std::optional<Tensor> laid_out(const char* name, const std::optional<Tensor>& t, int64_t length) const {
    if (!t) return std::nullopt;
    Tensor like = make(length);
    check_operand(op_, name, *t, like, like.scalar_type(), "what it is a gradient of");
    return in_layout_of(*t, like);
  }

  const char* op_;
  int64_t dim_;
  BasicResults<Tensor> results_;
  std::vector<int64_t> slowest_first_;
};
using BijectionTensors = BasicBijectionTensors<Tensor>;

}  // namespace constrained_ops
