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

#include "../../csrc/cuda/elementwise.cuh"
#include "../../csrc/cuda/projection.cuh"
#include "../../csrc/cuda/simplex.cuh"
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

// Every way in which threads share memory: a block per row, columns, and both in parts.
template <typename Storage>
void sharing_kernels() {
  for (const auto rows : {softmax<Storage>, project<Storage>}) {
    rows(3, 300, 1, 0);
    rows(2, 1032, 1, 0);
    rows(2, 70, 5, 0);
    rows(1, 16500, 1, 0);
    rows(1, 1100, 9, 0);
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
