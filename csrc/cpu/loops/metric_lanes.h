// A step of Adam on the simplex (metric_climb.h) for rows shorter than a vector.
#pragma once

#include "metric_climb.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Rows shorter than a vector, or as long, of a length that is a power of two. In a batch are as many vectors as a row
// is long, so that what is combined along its rows fills one.
template <typename T, int length>
class MetricLanes {
  using V = Vector<T>;
  using Climb = MetricClimb<T>;
  using Mask = typename Climb::Mask;

 public:
  static constexpr int batch = length * width<T>;
  static_assert(width<T> % length == 0);

  MetricLanes(const Adam<T>& adam, T total) : of_(adam), total_(total) {}

  // For project(), from the v of which it is made.
  CO_HD V metric(V v) const { return of_.metric(v); }

  // Some batches at once, since each operation on one waits for the one before it. d: the metric. y is made of x.
  template <int batches>
  CO_HD void project(const T* d, const T* m, T* x) const {
    V z[batches][length], u[batches][length], excess[batches], inside[batches];
    Climb climb[batches];
#pragma GCC unroll 4
    for (int b = 0; b < batches; ++b) climb[b] = start(d + b * batch, m + b * batch, x + b * batch, z[b], u[b]);
#pragma GCC unroll 4
    for (int b = 0; b < batches; ++b) read(z[b], u[b], climb[b].lambda, excess[b], inside[b]);
    Mask open = {}, signs[length], changes = {};
#pragma GCC unroll 4
    for (int b = 0; b < batches; ++b) {
      climb[b].going = climb[b].try_last(excess[b], inside[b], total_);
      open |= climb[b].going;
      finish(z[b], u[b], climb[b], x + b * batch, signs);
      for (int i = 0; i < length; ++i) changes |= signs[i];
    }
    if (!any(open | (changes < Mask{}))) [[likely]]
      return;
#pragma GCC unroll 4
    for (int b = 0; b < batches; ++b) {
      V from_z[length], from_u[length];
      for (int i = 0; i < length; ++i) from_z[i] = z[b][i], from_u[i] = u[b][i];
      climb_on(from_z, from_u, climb[b], excess[b], inside[b], x + b * batch);
    }
  }

 private:
  // What rows have in a lane each, to all lanes of theirs in the vectors.
  struct Spread {
    V vectors[length];

    CO_HD explicit Spread(V rows) { fill(rows, std::make_integer_sequence<int, length>()); }
    CO_HD const V& operator[](int i) const { return vectors[i]; }

   private:
    template <int... i>
    CO_HD void fill(V rows, std::integer_sequence<int, i...>) {
      ((vectors[i] = of_vector<i>(rows, std::make_integer_sequence<int, width<T>>())), ...);
    }
    template <int i, int... lane>
    CO_HD static V of_vector(V rows, std::integer_sequence<int, lane...>) {
      return __builtin_shufflevector(rows, rows, (lane - lane % length + i)...);
    }
  };

  CO_HD Climb start(const T* d, const T* m, const T* x, V (&z)[length], V (&u)[length]) const {
    V part_z[length], part_u[length];
    for (int i = 0; i < length; ++i) u[i] = load(d + i * width<T>);
    const Spread floor(across_each<length>(u, Larger()) * adam_floor<T>);
    for (int i = 0; i < length; ++i) {
      const V x_i = load(x + i * width<T>);
      u[i] = reciprocal(larger_of(u[i], floor[i]));
      z[i] = of_.target(x_i, load(m + i * width<T>), u[i]);
      part_z[i] = x_i > V{} ? z[i] : V{};
      part_u[i] = x_i > V{} ? u[i] : V{};
    }
    return Climb(across_each<length>(part_z, Plus()), across_each<length>(part_u, Plus()), total_);
  }

  CO_HD void read(const V (&z)[length], const V (&u)[length], V lambda, V& excess, V& inside) const {
    const Spread lambdas(lambda);
    V part_z[length], part_u[length];
    for (int i = 0; i < length; ++i) {
      const V left = projection_anchored<true>(z[i], u[i], lambdas[i]);
      const auto counts = ~(left <= V{});  // a NaN, too
      part_z[i] = counts ? left : V{};
      part_u[i] = counts ? u[i] : V{};
    }
    excess = across_each<length>(part_z, Plus()) - total_;
    inside = across_each<length>(part_u, Plus());
  }

  // Also gives what has its sign set where `rest` takes a number from the support at lambda, or puts it there.
  CO_HD void finish(const V (&z)[length], const V (&u)[length], const Climb& climb, T* y, Mask (&signs)[length]) const {
    const Spread lambda(climb.lambda), rest(climb.rest);
    for (int i = 0; i < length; ++i) {
      const V left = projection_anchored<true>(z[i], u[i], lambda[i]),
              value = projection_rest<true>(z[i], u[i], lambda[i], rest[i]);
      store(y + i * width<T>, value_of_rest(value));
      signs[i] = reinterpret_cast<Mask>(left) ^ reinterpret_cast<Mask>(value);
    }
  }

  // Rows that are not there yet, and no others, whatever lies beside them.
  [[gnu::noinline]] void climb_on(V (&z)[length], V (&u)[length], Climb climb, V excess, V inside, T* y) const {
    Mask signs[length];
    V changed[length];
    finish(z, u, climb, y, signs);
    for (int i = 0; i < length; ++i) changed[i] = signs[i] < Mask{} ? V{} + 1 : V{};
    climb.going |= across_each<length>(changed, Plus()) > V{};
    climb.go_on(excess, inside, total_,
                [&](V lambda, auto, V& excess, V& inside) CO_INLINE { read(z, u, lambda, excess, inside); });
    finish(z, u, climb, y, signs);
    if (!any(climb.off)) return;
    // Rows that are off take their y from the projection of any numbers.
    const Spread off(climb.off ? V{} + 1 : V{});
    T x[width<T>], d[width<T>];
    ProjectionScratch scratch(length);
    for (int i = 0; i < length; ++i) {
      store(x, z[i]);
      store(d, 1 / u[i]);
      for (int l = 0; l < width<T>; l += length) project_row<true>(length, x + l, d + l, x + l, total_, scratch);
      T* const y_i = y + i * width<T>;
      store(y_i, off[i] > V{} ? load(x) : load(y_i));
    }
  }

  const MetricTarget<T> of_;
  const T total_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
