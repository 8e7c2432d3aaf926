// Runs the launchers on memory of exactly the size they may touch, and checks the results against formulas in double
// precision. Built with sanitizers by test_emulation.py: all kernels in half precision, or with RACES those in which
// threads share memory.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/bijection.cuh"
#include "../../csrc/cuda/elementwise.cuh"
#include "../../csrc/cuda/projection.cuh"
#include "../../csrc/cuda/simplex.cuh"
#include "../../csrc/cuda/step.cuh"
#include "../../csrc/math/bounded.h"

using namespace constrained_ops;

namespace {

const Queue queue{"sanitize", nullptr};
int failures = 0;

template <typename Storage>
double to_double(Storage x) {
  return to_compute(x);
}

template <typename Storage>
constexpr double tolerance = sizeof(Storage) == 8   ? 1e-13
                             : sizeof(Storage) == 4 ? 4e-6
                                                    : 4e-2;

template <typename Storage>
void expect(const char* what, int64_t at, Storage found, double expected) {
  if (std::abs(to_double(found) - expected) <= tolerance<Storage> * (1 + std::abs(expected))) return;
  if (++failures < 20) std::printf("%s [%lld]: %g, not %g\n", what, (long long)at, to_double(found), expected);
}

// n numbers, `shift` numbers after a multiple of 16 bytes, with nothing allocated after them.
template <typename Storage>
struct Memory {
  std::unique_ptr<Storage[]> base;
  Storage* data;

  explicit Memory(int64_t n, int shift = 0) : base(new Storage[n + shift]), data(base.get() + shift) {
    static std::mt19937 random(7);
    std::normal_distribution<double> normal(0, 2);
    for (int64_t i = 0; i < n + shift; ++i)
      base[i] = to_storage<Storage>(static_cast<compute_t<Storage>>(normal(random)));
  }
  double operator[](int64_t i) const { return to_double(data[i]); }
};

[[maybe_unused]] double sigmoid(double r) { return 1 / (1 + std::exp(-r)); }

template <typename Storage>
void linear_interval(int64_t n) {
  const Memory<Storage> raw(n), grad(n);
  Memory<Storage> x(n), grad_raw(n);
  const ScalarBounds<Storage> source{bounds_of_scalars<Storage>(-1, 2)};
  launch_linear<Interval>(queue, Operands<Forward<false>, Storage>{raw.data, {}, {x.data}}, source, n);
  launch_linear<Interval>(queue, Operands<Backward<false, false>, Storage>{raw.data, {grad.data}, {grad_raw.data}},
                          source, n);
  for (int64_t i = 0; i < n; ++i) {
    const double s = sigmoid(raw[i]);
    expect("interval", i, x.data[i], -1 + 3 * s);
    expect("interval backward", i, grad_raw.data[i], grad[i] * 3 * s * (1 - s));
  }
}

// raw transposed and unaligned, bounds one per column, gradients to the bounds.
template <typename Storage>
void strided_interval(int64_t rows, int64_t columns) {
  using T = compute_t<Storage>;
  const int64_t n = rows * columns;
  const Memory<Storage> raw(n, 1), grad(n, 1);
  Memory<T> lower(columns, 1), upper(columns, 1), grad_lower(n), grad_upper(n);
  Memory<Storage> grad_raw(n);
  for (int64_t c = 0; c < columns; ++c) {
    lower.data[c] = T(-1 - c % 3);
    upper.data[c] = T(1 + c % 2);
  }
  const ElementwiseLayout<4> layout{n, 2, {rows, columns}, {{1, rows}, {columns, 1}, {0, 1}, {0, 1}}};
  const Strided<4> strided(layout);
  launch_strided<ByElement>(queue,
                            Operands<Backward<false, true>, Storage>{
                                raw.data, {grad.data}, {grad_raw.data, grad_lower.data, grad_upper.data}},
                            ElementBounds<Storage>{lower.data, upper.data}, strided, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = i / columns, column = i % columns;
    const double s = sigmoid(raw[column * rows + row]), width = upper[column] - lower[column];
    expect("strided backward", i, grad_raw.data[i], grad[i] * width * s * (1 - s));
    expect("strided grad_lower", i, grad_lower.data[i], grad[i] * (1 - s));
    expect("strided grad_upper", i, grad_upper.data[i], grad[i] * s);
  }
}

template <typename Storage>
void softmax(int64_t outer, int64_t length, int64_t inner, int shift = 0) {
  using T = compute_t<Storage>;
  const int64_t n = outer * length * inner;
  const Memory<Storage> raw(n, shift), grad(n, shift), along(n, shift);
  Memory<Storage> x(n, shift), grad_raw(n, shift), for_grad(n, shift), for_raw(n, shift);
  const Rows rows(outer, length, inner);
  const T smallest = next_above<Storage>(T(0));
  launch_rows(queue, RowOperands<Softmax<T, 0>, Storage>{{raw.data}, {x.data}}, rows, Softmax<T, 0>{smallest});
  launch_rows(queue, RowOperands<Softmax<T, 1>, Storage>{{raw.data, grad.data}, {grad_raw.data}}, rows,
              Softmax<T, 1>{smallest});
  launch_rows(queue,
              RowOperands<Softmax<T, 2>, Storage>{{raw.data, grad.data, along.data}, {for_grad.data, for_raw.data}},
              rows, Softmax<T, 2>{smallest});
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t first = o * length * inner + i;
      double sum = 0, mean_g = 0, mean_a = 0, mean_c = 0;
      for (int64_t k = 0; k < length; ++k) sum += std::exp(raw[first + k * inner]);
      const auto value = [&](int64_t at) { return std::exp(raw[at]) / sum; };
      for (int64_t k = 0, at = first; k < length; ++k, at += inner) {
        mean_g += value(at) * grad[at];
        mean_a += value(at) * along[at];
      }
      const auto covariance = [&](int64_t at) { return (along[at] - mean_a) * (grad[at] - mean_g); };
      for (int64_t k = 0, at = first; k < length; ++k, at += inner) mean_c += value(at) * covariance(at);
      for (int64_t k = 0, at = first; k < length; ++k, at += inner) {
        expect("softmax", at, x.data[at], value(at));
        expect("softmax backward", at, grad_raw.data[at], value(at) * (grad[at] - mean_g));
        expect("softmax along g", at, for_grad.data[at], value(at) * (along[at] - mean_a));
        expect("softmax along raw", at, for_raw.data[at], value(at) * (covariance(at) - mean_c));
      }
    }
  }
}

// Rows onto the simplex and back; the support, which the results tell, decides what is expected.
template <typename Storage>
void project(int64_t outer, int64_t length, int64_t inner, int shift = 0) {
  using T = compute_t<Storage>;
  const int64_t n = outer * length * inner;
  const Memory<Storage> x(n, shift), grad(n, shift);
  Memory<Storage> weight(n, shift), y(n, shift), weighted(n, shift), grad_x(n, shift), grad_weight(n, shift);
  for (int64_t i = 0; i < n; ++i) weight.data[i] = to_storage<Storage>(static_cast<T>(1 + std::abs(weight[i])));
  const Rows rows(outer, length, inner);
  launch_rows(queue, RowOperands<Project<T, false>, Storage>{{x.data}, {y.data}}, rows, Project<T, false>{T(1)});
  launch_rows(queue, RowOperands<Project<T, true>, Storage>{{x.data, weight.data}, {weighted.data}}, rows,
              Project<T, true>{T(1)});
  const auto check_row = [&](int64_t first, const Memory<Storage>& y, const auto& u) {
    double sum = 0, slope = 0, total = 0;
    for (int64_t k = 0, at = first; k < length; ++k, at += inner) {
      total += y[at];
      if (y[at] == 0) continue;
      sum += x[at];
      slope += u(at);
    }
    const double lambda = (sum - 1) / slope;
    if (!(std::abs(total - 1) <= tolerance<Storage>)) expect("sum", first, Storage(y.data[first]), NAN);
    for (int64_t k = 0, at = first; k < length; ++k, at += inner)
      expect("projection", at, y.data[at], std::max(0.0, x[at] - lambda * u(at)));
  };
  using Backward = ProjectBackward<T, true, true>;
  launch_rows(
      queue,
      RowOperands<Backward, Storage>{{grad.data, weight.data, weighted.data, x.data}, {grad_x.data, grad_weight.data}},
      rows, Backward{});
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t first = row / inner * length * inner + row % inner;
    check_row(first, y, [](int64_t) { return 1.0; });
    check_row(first, weighted, [&](int64_t at) { return 1 / weight[at]; });
    double sum = 0, slope = 0, rest = 0;
    for (int64_t k = 0, at = first; k < length; ++k, at += inner) {
      if (weighted[at] == 0) continue;
      sum += grad[at] / weight[at];
      slope += 1 / weight[at];
      rest += x[at] - weighted[at];
    }
    for (int64_t k = 0, at = first; k < length; ++k, at += inner) {
      const double g = weighted[at] == 0 ? 0 : grad[at] - sum / slope;
      expect("projection backward", at, grad_x.data[at], g);
      expect("projection backward, weight", at, grad_weight.data[at], rest / slope / weight[at] / weight[at] * g);
    }
  }
}

// Forward and backward of the bijections.
template <typename Storage>
void bijections(int64_t outer, int64_t length, int64_t inner, int shift = 0) {
  using T = compute_t<Storage>;
  const int64_t n = outer * length * inner, m = outer * (length - 1) * inner, count = outer * inner;
  const Memory<Storage> raw(m, shift), grad(n, shift), grad_log_det(count, shift);
  const Rows rows(outer, length, inner);
  const auto check_kind = [&](const char* name, auto forward, auto backward, bool ilr) {
    Memory<Storage> x(n, shift), log_det(count, shift), grad_raw(m, shift);
    const BijectionShape shape(rows, bijection_threads<Storage, 1>);
    Memory<T> carries(count * shape.parts * 2);
    const BijectionOperands<Storage> operands{raw.data,          nullptr,      grad.data,
                                              grad_log_det.data, x.data,       log_det.data,
                                              grad_raw.data,     carries.data, next_above<Storage>(T(0))};
    auto of_forward = operands, of_backward = operands;
    of_forward.grad_raw = nullptr;
    of_backward.x = of_backward.log_det = nullptr;
    launch_bijection<decltype(forward), 0>(queue, of_forward, rows, shape);
    launch_bijection<decltype(backward), 1>(queue, of_backward, rows, shape);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t first = row / inner * length * inner + row % inner;
      const int64_t first_raw = row / inner * (length - 1) * inner + row % inner;
      const auto r = [&](int64_t k) { return raw[first_raw + (k - 1) * inner]; };  // k from 1
      std::vector<double> log_x(length), u(length), after(length + 1);
      double total = 0, sum = 0, before = 0;
      if (ilr) {
        for (int64_t k = 1; k < length; ++k) {
          const double w = r(k) / std::sqrt(k * (k + 1.0));
          total += w;
          log_x[k] = -total - k * w;
        }
        for (const double z : log_x) sum += std::exp(z);
        for (double& z : log_x) z -= std::log(sum);
      } else {
        for (int64_t k = 1; k <= length; ++k) {
          const double odds = k < length ? r(k) - std::log(double(length - k)) : 0;
          log_x[k - 1] = total - (k < length ? std::log1p(std::exp(-odds)) : 0);
          total -= k < length ? std::log1p(std::exp(odds)) : 0;
        }
      }
      double expected_log_det = ilr ? 0.5 * std::log(double(length)) : 0;
      for (int64_t k = length - 1; k >= 0; --k) {
        const int64_t at = first + k * inner;
        expect(name, at, x.data[at], std::exp(log_x[k]));
        expected_log_det += log_x[k];
        u[k] = grad[at] * std::exp(log_x[k]) + grad_log_det[row];
        after[k] = after[k + 1] + u[k];
      }
      const auto to_logit = [&](int64_t k) { return u[k] - after[0] * std::exp(log_x[k]); };
      const double rounding = tolerance<Storage> * length * 8;                               // sums along the row
      const double held = to_double(to_storage<Storage>(static_cast<T>(expected_log_det)));  // may overflow
      if (log_det[row] != held && !(std::abs(log_det[row] - held) <= rounding))
        expect(name, row, log_det.data[row], NAN);
      for (int64_t k = 1; k < length; ++k) {
        before += to_logit(k - 1);
        const double taken = sigmoid(r(k) - std::log(double(length - k)));
        const double expected =
            ilr ? (before - k * to_logit(k)) / std::sqrt(k * (k + 1.0)) : (1 - taken) * u[k - 1] - taken * after[k];
        const int64_t at = first_raw + (k - 1) * inner;
        if (!(std::abs(grad_raw[at] - expected) <= rounding)) expect(name, at, grad_raw.data[at], NAN);
      }
    }
  };
  check_kind("ilr", Ilr<T, 0>{}, Ilr<T, 1>{}, true);
  check_kind("stick-breaking", StickBreaking<T, 0>{}, StickBreaking<T, 1>{}, false);
}

// One slot of the optimizers' step, in two work items, and what it should come to: `g` is the gradient to what Adam
// walks on, `before` that number.
template <typename Storage>
struct StepCase {
  using T = compute_t<Storage>;
  static constexpr double lr = 0.05, beta1 = 0.9, beta2 = 0.99, eps = 1e-3, count = 4;
  StepSlot slot{};
  int64_t n;
  float step = count - 1;
  Memory<Storage> param, grad;
  Memory<T> raw, m, v, lower, upper;
  std::vector<double> x0, raw0, m0, v0;

  StepCase(StepKind kind, RowLayout rows, int shift)
      : n(rows.outer * rows.length * rows.inner),
        param(n, shift),
        grad(n, shift),
        raw(n, shift),
        m(n, shift),
        v(n, shift),
        lower(n, shift),
        upper(n, shift) {
    for (int64_t i = 0; i < n; ++i) {
      v.data[i] = T(0.1) + std::abs(v.data[i]);
      lower.data[i] = T(-1 - i % 3);
      upper.data[i] = T(1 + i % 2);
      if (kind == StepKind::simplex) param.data[i] = to_storage<Storage>(T(1.0 / rows.length));
      x0.push_back(param[i]);
      raw0.push_back(raw[i]);
      m0.push_back(m[i]);
      v0.push_back(v[i]);
    }
    const bool each = step_by_element(kind);
    slot = {kind,
            0,
            n,
            rows,
            param.data,
            m.data,
            v.data,
            nullptr,
            raw.data,
            &step,
            each ? lower.data : nullptr,
            each ? upper.data : nullptr,
            -1,
            2,
            1};
  }

  void run(int cache) {
    const bool rows = step_along_rows(slot.kind);
    const int64_t units = rows ? n / slot.rows.length : n, first = rows ? (units + 1) / 2 : units / 1024 * 1024;
    const StepWork work[] = {{0, 0, first, 0}, {0, first, units, 0}};
    const StepGroup group{lr, beta1, beta2, eps, 0, 0, nullptr, 0};
    const void* const grads[] = {grad.data};
    StepProgress progress{0, 2};
    launch_step<Storage, T>(queue, {&slot, grads, &group, work, &progress, nullptr, nullptr, cache}, 2);
    if (progress.started != 0 || step != count) expect("counter", 0, step, -1);
  }

  double metric(int64_t i, double g) const {
    return std::sqrt((beta2 * v0[i] + (1 - beta2) * g * g) / (1 - std::pow(beta2, count))) + eps;
  }
  double target(int64_t i, double g, double before, double d) const {
    return before - lr / (1 - std::pow(beta1, count)) * (beta1 * m0[i] + (1 - beta1) * g) / d;
  }
};

template <typename Storage>
void step_elements_of(StepKind kind, int64_t n, int shift) {
  StepCase<Storage> c(kind, {1, n, 1}, shift);
  c.run(0);
  for (int64_t i = 0; i < n; ++i) {
    if (kind == StepKind::bounded_by_element) {
      const double s = sigmoid(c.raw0[i]), width = c.upper[i] - c.lower[i], g = c.grad[i] * width * s * (1 - s);
      const double y = c.target(i, g, c.raw0[i], c.metric(i, g));
      expect("step on raw", i, c.raw.data[i], y);
      expect("step, transformed", i, c.param.data[i], c.lower[i] + width * sigmoid(y));
    } else {
      const double y = c.target(i, c.grad[i], c.x0[i], c.metric(i, c.grad[i]));
      expect("step in a box", i, c.param.data[i], std::min(2.0, std::max(-1.0, y)));
    }
  }
}

template <typename Storage>
void step_rows_of(StepKind kind, const RowLayout& rows, int cache, int shift = 0) {
  StepCase<Storage> c(kind, rows, shift);
  c.run(cache);
  for (int64_t row = 0; row < rows.outer * rows.inner; ++row) {
    const int64_t first = row / rows.inner * rows.length * rows.inner + row % rows.inner;
    const auto at = [&](int64_t k) { return first + k * rows.inner; };
    double largest = 0, sum = 0, slope = 0, weights = 0, mean = 0;
    for (int64_t k = 0; k < rows.length; ++k) largest = std::max(largest, c.metric(at(k), c.grad[at(k)]));
    for (int64_t k = 0; k < rows.length; ++k) {
      weights += std::exp(c.raw0[at(k)]);
      mean += std::exp(c.raw0[at(k)]) * c.grad[at(k)];
    }
    const auto d = [&](int64_t i) { return std::max(c.metric(i, c.grad[i]), 1e-3 * largest); };
    const auto y = [&](int64_t i) {
      if (kind == StepKind::simplex) return c.target(i, c.grad[i], c.x0[i], d(i));
      const double g = std::exp(c.raw0[i]) / weights * (c.grad[i] - mean / weights);
      return c.target(i, g, c.raw0[i], c.metric(i, g));
    };
    for (int64_t k = 0; k < rows.length; ++k) {
      const int64_t i = at(k);
      if (kind == StepKind::softmax) sum += std::exp(y(i));
      if (kind == StepKind::softmax || c.param[i] == 0) continue;
      sum += y(i);
      slope += 1 / d(i);
    }
    for (int64_t k = 0; k < rows.length; ++k) {
      const int64_t i = at(k);
      if (kind == StepKind::softmax) {
        expect("step through the softmax", i, c.param.data[i], std::exp(y(i)) / sum);
      } else {
        expect("step and projection", i, c.param.data[i], std::max(0.0, y(i) - (sum - 1) / slope / d(i)));
      }
    }
  }
}

// Every way in which threads share memory: a block per row, columns, and both in parts.
template <typename Storage>
void sharing_kernels() {
  bijections<Storage>(3, 300, 1);
  bijections<Storage>(1, 5000, 1);
  bijections<Storage>(2, 70, 5);
  for (const auto rows : {softmax<Storage>, project<Storage>}) {
    rows(3, 300, 1, 0);
    rows(2, 1032, 1, 0);
    rows(2, 70, 5, 0);
    rows(1, 16500, 1, 0);
    rows(1, 1100, 9, 0);
  }
  for (const StepKind kind : {StepKind::simplex, StepKind::softmax}) {
    step_rows_of<Storage>(kind, {2, 300, 1}, 2);
    step_rows_of<Storage>(kind, {2, 1000, 1}, 0);
    step_rows_of<Storage>(kind, {2, 50, 5}, 7);
    step_rows_of<Storage>(kind, {1, 90, 40}, 0);
  }
}

template <typename Storage>
void other_kernels() {
  for (const int64_t n : {1, 7, 255, 4099}) linear_interval<Storage>(n);
  strided_interval<Storage>(3, 5);
  strided_interval<Storage>(33, 40);
  for (const int64_t length : {1, 3, 8, 33, 132, 200, 264}) {
    for (const auto rows : {softmax<Storage>, project<Storage>}) {
      rows(3, length, 1, 0);
      rows(3, length, 1, 1);
    }
  }
  softmax<Storage>(2, 17, 3);
  project<Storage>(2, 17, 3);
  for (const int64_t length : {1, 2, 8, 33, 128}) bijections<Storage>(3, length, 1, 1);
  bijections<Storage>(2, 17, 3);
  for (const int shift : {0, 1}) {
    for (const int64_t n : {1, 7, 2051}) {
      step_elements_of<Storage>(StepKind::box, n, shift);
      step_elements_of<Storage>(StepKind::bounded_by_element, n, shift);
    }
    for (const StepKind kind : {StepKind::simplex, StepKind::softmax}) {
      for (const int cache : {0, 6}) {
        step_rows_of<Storage>(kind, {5, 3, 1}, cache, shift);
        step_rows_of<Storage>(kind, {3, 33, 1}, cache, shift);
      }
    }
  }
}

}  // namespace

int main() {
#if defined(RACES)
  sharing_kernels<float>();
#else
  sharing_kernels<Half>();
  other_kernels<Half>();
#endif
  if (failures > 0) std::printf("%d wrong numbers\n", failures);
  return failures > 0 ? 1 : 0;
}
