// The CPU's loops where memory ends: every operand is a heap block of its own, no larger than its numbers, and with
// `shift` it is not aligned. For AddressSanitizer and UBSan; see test_sanitizers.py, which also has fresh memory of the
// loops' own filled with NaN. Besides: every result is written, and only by the share of work that it belongs to.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/loops.h"
#include "../../csrc/cpu/step.h"
#include "../../csrc/math/storage.h"

using namespace constrained_ops;

namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
int failures = 0;

void fail(const char* what, RowLayout rows, int dtype, int64_t at, double found) {
  if (++failures < 20)
    std::printf("%s [%lld, %lld, %lld] of dtype %d, at %lld: %g\n", what, (long long)rows.outer, (long long)rows.length,
                (long long)rows.inner, dtype, (long long)at, found);
}

template <typename Storage>
constexpr Dtype dtype = std::is_same_v<Storage, Half>       ? Dtype::half
                        : std::is_same_v<Storage, BFloat16> ? Dtype::bfloat16
                        : std::is_same_v<Storage, float>    ? Dtype::float32
                                                            : Dtype::float64;
template <typename Storage>
constexpr double eps = sizeof(Storage) == 8                ? 0x1p-52
                       : sizeof(Storage) == 4              ? 0x1p-23
                       : std::is_same_v<Storage, BFloat16> ? 0x1p-7
                                                           : 0x1p-10;

// n numbers, `shift` numbers after where a block starts, at a line of cache, and that ends with them.
template <typename Storage>
class Memory {
 public:
  Memory(int64_t n, int shift)
      : base_(static_cast<Storage*>(operator new((n + shift) * sizeof(Storage), line))), shift_(shift), size_(n) {
    for (int64_t i = 0; i < n + shift; ++i) base_[i] = stored(nan);
  }
  // Between mean - spread and mean + spread.
  static Memory random(int64_t n, int shift, double mean, double spread) {
    static std::minstd_rand generator(7);
    Memory result(n, shift);
    for (int64_t i = 0; i < n; ++i)
      result.data()[i] = stored(mean + spread * (2.0 * generator() / generator.max() - 1));
    return result;
  }

  static Storage stored(double x) { return to_storage<Storage>(static_cast<compute_t<Storage>>(x)); }
  Storage* data() { return base_.get() + shift_; }
  const Storage* data() const { return base_.get() + shift_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return to_compute(data()[i]); }
  // What stands before the numbers is as it was.
  bool sound() const { return shift_ == 0 || std::isnan(static_cast<double>(to_compute(base_[0]))); }

 private:
  static constexpr std::align_val_t line{64};
  struct Delete {
    void operator()(Storage* data) const { operator delete(data, line); }
  };

  std::unique_ptr<Storage[], Delete> base_;
  int shift_;
  int64_t size_;
};

template <typename Storage>
void expect_written(const char* what, RowLayout rows, const Memory<Storage>& result, const Memory<Storage>& in_shares) {
  for (int64_t i = 0; i < result.size(); ++i)
    if (!std::isfinite(result[i])) return fail(what, rows, int(dtype<Storage>), i, result[i]);
  if (!result.sound() || !in_shares.sound()) fail("before the result", rows, int(dtype<Storage>), -1, nan);
  if (std::memcmp(result.data(), in_shares.data(), result.size() * sizeof(Storage)) != 0)
    fail("in shares it differs", rows, int(dtype<Storage>), -1, nan);
}

// No number is negative, and rows sum to 1.
template <typename Storage>
void expect_on_simplex(const char* what, RowLayout rows, const Memory<Storage>& x) {
  const auto [outer, length, inner] = rows;
  for (int64_t row = 0; row < outer * inner; ++row) {
    const int64_t first = row / inner * length * inner + row % inner;
    long double sum = 0;
    for (int64_t k = 0; k < length; ++k) {
      if (!(x[first + k * inner] >= 0)) return fail(what, rows, int(dtype<Storage>), first + k * inner, x[first]);
      sum += x[first + k * inner];
    }
    if (!(std::abs(sum - 1) <= 8 * std::sqrt(length) * eps<Storage>))
      return fail(what, rows, int(dtype<Storage>), first, static_cast<double>(sum - 1));
  }
}

// All work at once, and in two shares, the last one first: what one writes into the other stays.
template <typename Loop, typename Call>
void run(Loop loop, const Call& call, const Call& again, int64_t units) {
  loop(call, 0, units);
  loop(again, units / 2, units);
  if (units / 2 > 0) loop(again, 0, units / 2);
}

template <typename Storage>
struct RowMemory {
  RowLayout rows;
  int64_t n;
  int shift;
  std::vector<Memory<Storage>> inputs;

  RowMemory(RowLayout rows, int shift, double spread)
      : rows(rows), n(rows.outer * rows.length * rows.inner), shift(shift) {
    for (int i = 0; i < 3; ++i) inputs.push_back(Memory<Storage>::random(n, shift, 0, spread));
  }

  // Results that `wanted` has a bit for. Checks them.
  template <typename Call, typename Loop>
  std::vector<Memory<Storage>> results(const char* what, Loop loop, Call call, std::vector<const void*> in, int wanted,
                                       int64_t units) {
    for (size_t i = 0; i < in.size(); ++i) call.inputs[i] = in[i];
    Call again = call;
    std::vector<Memory<Storage>> result, in_shares;
    for (int i = 0; i < 2; ++i) {
      result.emplace_back(n, shift);
      in_shares.emplace_back(n, !shift);
      call.outputs[i] = wanted >> i & 1 ? result[i].data() : nullptr;
      again.outputs[i] = wanted >> i & 1 ? in_shares[i].data() : nullptr;
    }
    run(loop, call, again, units);
    for (int i = 0; i < 2; ++i)
      if (wanted >> i & 1) expect_written(what, rows, result[i], in_shares[i]);
    return result;
  }
};

template <typename Storage>
void softmax(RowLayout rows, int shift) {
  RowMemory<Storage> memory(rows, shift, 3);
  const void *raw = memory.inputs[0].data(), *g = memory.inputs[1].data(), *along = memory.inputs[2].data();
  const int64_t units = softmax_units(rows).count;
  const auto results = [&](const char* what, Kernel kernel, std::vector<const void*> in, int wanted) {
    return memory.results(what, CO_LEVEL::softmax_loop(kernel, dtype<Storage>), RowCall{rows, {}, {}}, in, wanted,
                          units);
  };
  const auto x = results("softmax", Kernel::forward, {raw}, 1);
  expect_on_simplex("softmax", rows, x[0]);
  results("softmax backward", Kernel::backward, {raw, g}, 1);
  for (const int wanted : {1, 2, 3})
    if (wanted == 3 || rows.length == 9)
      results("softmax second order", Kernel::double_backward, {raw, along, g}, wanted);
  if constexpr (sizeof(Storage) >= 4)
    results("softmax backward from x", Kernel::backward_from_result, {x[0].data(), g}, 1);
}

// With a small spread all of a row is of the support, with a large one little.
template <typename Storage>
void projection(RowLayout rows, int shift, double spread) {
  RowMemory<Storage> memory(rows, shift, spread);
  const auto weight = Memory<Storage>::random(memory.n, shift, 1, 0.5);
  const void *x = memory.inputs[0].data(), *g = memory.inputs[1].data(), *d = weight.data();
  const auto results = [&](const char* what, Projection kernel, std::vector<const void*> in, int wanted, bool forward) {
    return memory.results(what, CO_LEVEL::projection_loop(kernel, dtype<Storage>), ProjectionCall{rows, {}, {}, 1.0},
                          in, wanted, projection_units(rows, forward).count);
  };
  const auto y = results("projection", Projection::forward, {x}, 1, true);
  expect_on_simplex("projection", rows, y[0]);
  const auto weighted = results("weighted projection", Projection::forward_weighted, {x, d}, 1, true);
  expect_on_simplex("weighted projection", rows, weighted[0]);
  results("projection backward", Projection::backward, {g, y[0].data()}, 1, false);
  const void* support = weighted[0].data();
  results("weighted projection backward", Projection::backward_weighted, {g, support, d}, 1, false);
  for (const int wanted : {2, 3})
    if (wanted == 3 || rows.length == 9)
      results("projection backward to weight", Projection::backward_to_weight, {g, support, d, x}, wanted, false);
}

// Operands of [rows, columns] that lie side by side, or raw and one bound transposed, the others one per column.
template <typename Storage>
void elementwise(int64_t rows, int64_t columns, int shift, bool linear) {
  using T = compute_t<Storage>;
  const int64_t n = rows * columns;
  std::vector<Memory<Storage>> in;
  for (int i = 0; i < 6; ++i) in.push_back(Memory<Storage>::random(n, shift, 0, 3));
  const auto lower = Memory<T>::random(n, shift, -2, 0.5), upper = Memory<T>::random(columns, shift, 2, 0.5),
             uppers = Memory<T>::random(n, shift, 2, 0.5);
  ElementwiseLayout<max_inputs> layout{n, linear ? 1 : 2, {linear ? n : rows, columns}, {}};
  const auto along = [&](int input, int64_t by_row, int64_t by_column) {
    layout.strides[input][0] = linear ? 1 : by_row;
    layout.strides[input][1] = by_column;
  };
  struct Case {
    Kernel kernel;
    int inputs, outputs, bound_outputs;
  };
  constexpr Case cases[] = {{Kernel::forward, 0, 1, 0},
                            {Kernel::forward_log_det, 0, 2, 0},
                            {Kernel::backward, 1, 1, 2},
                            {Kernel::backward_log_det, 2, 1, 2},
                            {Kernel::double_backward, 3, 3, 2}};
  for (const BoundsKind bounds : {BoundsKind::both, BoundsKind::lower_only, BoundsKind::upper_only, BoundsKind::neither,
                                  BoundsKind::by_element}) {
    const bool each = bounds == BoundsKind::by_element;
    for (const Case& c : cases) {
      for (const bool exponential : {false, true}) {
        if (exponential && !each && bounds != BoundsKind::lower_only) continue;
        constexpr double infinity = std::numeric_limits<double>::infinity();
        ElementwiseCall call{};
        call.lower = bounds == BoundsKind::both || bounds == BoundsKind::lower_only ? -1 : -infinity;
        call.upper = bounds == BoundsKind::both || bounds == BoundsKind::upper_only ? 2 : infinity;
        int inputs = 0;
        const auto add = [&](const void* data, int64_t by_row, int64_t by_column) {
          along(inputs, by_row, by_column);
          call.inputs[inputs++] = data;
        };
        add(in[0].data(), 1, rows);
        if (each) add(lower.data(), 1, rows), add(linear ? uppers.data() : upper.data(), 0, 1);
        const bool second = c.kernel == Kernel::double_backward;
        for (int i = 0; i < c.inputs + (each && second ? 2 : 0); ++i) add(in[i + 1].data(), columns, 1);
        call.layout = layout;
        ElementwiseCall again = call;
        const int bound_outputs = each ? c.bound_outputs : 0;
        std::vector<Memory<Storage>> results, in_shares;
        std::vector<Memory<T>> of_bounds, of_bounds_in_shares;
        for (int i = 0; i < c.outputs; ++i) results.emplace_back(n, shift), in_shares.emplace_back(n, !shift);
        for (int i = 0; i < bound_outputs; ++i)
          of_bounds.emplace_back(n, shift), of_bounds_in_shares.emplace_back(n, !shift);
        for (int i = 0; i < c.outputs + bound_outputs; ++i) {
          const int b = i - c.outputs;
          call.outputs[i] = b < 0 ? (void*)results[i].data() : of_bounds[b].data();
          again.outputs[i] = b < 0 ? (void*)in_shares[i].data() : of_bounds_in_shares[b].data();
        }
        const auto loop = exponential ? CO_LEVEL::exponential_loop : CO_LEVEL::bounded_loop;
        run(loop(c.kernel, dtype<Storage>, bounds), call, again, n);
        for (int i = 0; i < c.outputs; ++i) expect_written("elementwise", {rows, columns, 1}, results[i], in_shares[i]);
        for (int i = 0; i < bound_outputs; ++i)
          expect_written("gradient to bounds", {rows, columns, 1}, of_bounds[i], of_bounds_in_shares[i]);
      }
    }
  }
}

// A parameter and its state, and the same again.
template <typename Storage, typename State>
void step(StepKind kind, RowLayout rows, int shift, bool euclidean, bool amsgrad) {
  using T = compute_t<Storage>;
  const int64_t n = rows.outer * rows.length * rows.inner;
  struct Copy {
    Memory<Storage> param;
    Memory<State> m, v, largest_v;
    Memory<T> raw;
    float step = 3;

    Copy(int64_t n, int shift) : param(n, shift), m(n, shift), v(n, shift), largest_v(n, shift), raw(n, shift) {}
  };
  const double start = kind == StepKind::simplex ? 1.0 / rows.length : 0.5;
  const auto grad = Memory<Storage>::random(n, shift, 0, 1);
  const auto raw = Memory<T>::random(n, 0, 0, 2), moments = Memory<T>::random(n, 0, 0.5, 0.25);
  const auto lower = Memory<T>::random(n, shift, -2, 0.5), upper = Memory<T>::random(n, shift, 2, 0.5);
  Copy whole(n, shift), in_shares(n, !shift);
  const bool each = step_by_element(kind), on_raw = step_on_raw(kind), along_rows = step_along_rows(kind);
  const StepBlocks blocks(rows);
  // Past the caches goes what is at a line: of the two copies one.
  StepNumbers numbers{Adam<double>::at({0.05, 0.9, 0.99, 1e-3, 0.01, false, false, amsgrad}, 4, 1), euclidean, true,
                      false};
  StepSlot slots[2];
  for (Copy* copy : {&whole, &in_shares}) {
    for (int64_t i = 0; i < n; ++i) {
      // Else it is only written. Of a simplex the first row is not, which takes it the longest way.
      const bool first = kind == StepKind::simplex && i < rows.length * rows.inner && i % rows.inner == 0;
      if (!on_raw) copy->param.data()[i] = Memory<Storage>::stored(first ? 0 : start);
      copy->raw.data()[i] = raw.data()[i];
      for (auto* moment : {&copy->m, &copy->v, &copy->largest_v}) moment->data()[i] = Memory<State>::stored(moments[i]);
    }
    slots[copy == &in_shares] = {kind,
                                 0,
                                 n,
                                 rows,
                                 copy->param.data(),
                                 copy->m.data(),
                                 copy->v.data(),
                                 amsgrad ? copy->largest_v.data() : nullptr,
                                 on_raw ? copy->raw.data() : nullptr,
                                 &copy->step,
                                 each ? lower.data() : nullptr,
                                 each ? upper.data() : nullptr,
                                 -1,
                                 2,
                                 1};
  }
  const auto loop = [&, of = CO_LEVEL::step_loop(dtype<Storage>, dtype<State>)](const StepSlot& slot, int64_t begin,
                                                                                int64_t end) {
    numbers.to_first_level = slot.param == whole.param.data();
    of(slot, grad.data(), numbers, begin, end);
  };
  run(loop, slots[0], slots[1], along_rows ? blocks.count : n);
  expect_written("step", rows, whole.param, in_shares.param);
  expect_written("step: exp_avg", rows, whole.m, in_shares.m);
  expect_written("step: exp_avg_sq", rows, whole.v, in_shares.v);
  expect_written("step: max_exp_avg_sq", rows, whole.largest_v, in_shares.largest_v);
  expect_written("step: raw", rows, whole.raw, in_shares.raw);
  if (along_rows) expect_on_simplex("step", rows, whole.param);
}

template <typename Storage>
void all_rows(RowLayout rows) {
  const int shift = (rows.outer + rows.length + rows.inner) % 2;
  softmax<Storage>(rows, shift);
  projection<Storage>(rows, shift, 1.5 / rows.length);
  projection<Storage>(rows, !shift, 2);
}

template <typename Storage, typename State>
void all_steps(RowLayout rows) {
  const int shift = (rows.outer + rows.length + rows.inner) % 2, other = rows.length % 2;
  step<Storage, State>(StepKind::softmax, rows, shift, false, other);
  step<Storage, State>(StepKind::simplex, rows, shift, false, other);
  step<Storage, State>(StepKind::simplex, rows, !shift, true, !other);
}

template <typename Storage, typename State = compute_t<Storage>>
void all() {
  const int64_t counts[] = {1, 3, 32, 33, 70}, edges[] = {1, 2, 4, 5, 7, 9, 17, 33, 64};
  for (int64_t length = 1; length <= 70; ++length)
    for (const int64_t count : counts) all_rows<Storage>({count, length, 1});
  for (int64_t count = 1; count <= 70; ++count)
    for (const int64_t length : edges) all_rows<Storage>({count, length, 1});
  for (const int64_t inner : {2, 3, 31, 32, 33, 40, 77})
    for (const int64_t length : {1, 2, 7, 9, 64, 70})
      for (const int64_t outer : {1, 2}) all_rows<Storage>({outer, length, inner});
  const RowLayout uneven[] = {{1, 127, 1},   {5, 257, 1},   {33, 300, 1},  {3, 1023, 1}, {3, 1025, 1},
                              {1, 70001, 1}, {1, 1030, 33}, {1, 2100, 40}, {2, 1024, 5}, {23, 5, 3},
                              {40, 3, 5},    {9, 70, 2},    {11, 20, 7},   {7, 9, 6},    {5, 9, 20}};
  for (const RowLayout& rows : uneven) all_rows<Storage>(rows);

  for (int64_t length = 1; length <= 70; ++length) all_steps<Storage, State>({length % 9 + 1, length, 1});
  constexpr int64_t too_long = StepBlocks::longest_copied + 1;
  const RowLayout for_steps[] = {{600, 17, 1}, {3000, 6, 1}, {33, 300, 1}, {2, 9001, 1},     {2, 9, 3},
                                 {3, 70, 33},  {1, 300, 40}, {1, 9000, 3}, {2, too_long, 1}, {1, too_long, 17}};
  for (const RowLayout& rows : for_steps) all_steps<Storage, State>(rows);
  for (int64_t n = 1; n <= 35; ++n) elementwise<Storage>(1, n, n % 2, true);
  for (const int64_t n : {511, 512, 513, 1100}) elementwise<Storage>(1, n, n % 2, true);
  for (const int64_t rows : {1, 3, 33}) elementwise<Storage>(rows, 40, 1, false);
  for (const int64_t n : {1, 7, 31, 33, 64, 511, 513, 1100})
    for (int kind = 0; kind < step_kinds; ++kind)
      if (!step_along_rows(StepKind(kind)))
        for (const bool amsgrad : {false, true}) step<Storage, State>(StepKind(kind), {1, n, 1}, n % 2, false, amsgrad);
}

}  // namespace

int main(int, char** arguments) {
  const std::string which = arguments[1];
  if (which == "half") all<Half>();
  if (which == "bfloat16") all<BFloat16, BFloat16>();
  if (which == "float32") all<float>();
  if (which == "float64") all<double>();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0 ? 1 : 0;
}
