// A step of Adam on the simplex (metric_climb.h) for rows shorter than a vector.
#pragma once

#include "metric_climb.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Rows shorter than a vector, of a length that is a power of two: as many vectors at once as a row is long, so that
// what is combined along rows fills one.
template <typename T, int length>
class MetricLanes {
  using V = Vector<T>;
  using Climb = MetricClimb<T>;
  static constexpr int part = std::max<int>(length, 16 / sizeof(T));  // no shuffle crosses 16 bytes if none need

 public:
  static_assert(width<T> % part == 0);

  MetricLanes(const Adam<T>& adam, T total) : of_(adam), total_(total) {}

  // x, of which y is made.
  CO_HD void project(V (&x)[length], const V (&m)[length], const V (&v)[length]) const {
    V z[length], u[length], part_z[length], part_u[length];
    for (int i = 0; i < length; ++i) u[i] = of_.metric(v[i]);
    const Spread floor(across_each<length, part>(u, Larger()) * adam_floor<T>);
    for (int i = 0; i < length; ++i) {
      u[i] = reciprocal(larger_of(u[i], floor[i]));
      z[i] = of_.target(x[i], m[i], u[i]);
      part_z[i] = x[i] > V{} ? z[i] : V{};
      part_u[i] = x[i] > V{} ? u[i] : V{};
    }
    Climb climb(across_each<length, part>(part_z, Plus()), across_each<length, part>(part_u, Plus()), total_);
    V excess, inside;
    read(z, u, climb.lambda, excess, inside);
    if (climb.ends(excess, inside, total_)) [[likely]] {
      finish(z, u, climb, x);
    } else {
      V from_z[length], from_u[length];
      for (int i = 0; i < length; ++i) from_z[i] = z[i], from_u[i] = u[i];
      climb_on(from_z, from_u, climb, excess, inside, x);
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
      return __builtin_shufflevector(rows, rows, (lane - lane % part + (i * part + lane % part) / length)...);
    }
  };

  CO_HD void read(const V (&z)[length], const V (&u)[length], V lambda, V& excess, V& inside) const {
    const Spread lambdas(lambda);
    V part_z[length], part_u[length];
    for (int i = 0; i < length; ++i) {
      const V left = projection_anchored<true>(z[i], u[i], lambdas[i]);
      const auto counts = ~(left <= V{});  // a NaN, too
      part_z[i] = counts ? left : V{};
      part_u[i] = counts ? u[i] : V{};
    }
    excess = across_each<length, part>(part_z, Plus()) - total_;
    inside = across_each<length, part>(part_u, Plus());
  }

  CO_HD void finish(const V (&z)[length], const V (&u)[length], const Climb& climb, V (&y)[length]) const {
    const Spread lambda(climb.lambda), rest(climb.rest);
    for (int i = 0; i < length; ++i) y[i] = value_of_rest(projection_rest<true>(z[i], u[i], lambda[i], rest[i]));
  }

  [[gnu::noinline]] void climb_on(V (&z)[length], V (&u)[length], Climb climb, V excess, V inside,
                                  V (&y)[length]) const {
    climb.go_on(excess, inside, total_,
                [&](V lambda, auto, V& excess, V& inside) CO_INLINE { read(z, u, lambda, excess, inside); });
    finish(z, u, climb, y);
    if (!any(climb.off)) return;
    // Rows that are off take their y from the projection of any numbers.
    const Spread off(climb.off ? V{} + 1 : V{});
    T x[length * width<T>], d[length * width<T>];
    ProjectionScratch scratch(length);
    for (int i = 0; i < length; ++i) {
      store(x + i * width<T>, z[i]);
      store(d + i * width<T>, 1 / u[i]);
      for (int l = 0; l < width<T>; l += length) {
        const int at = i * width<T> + l;
        project_row<true>(length, x + at, d + at, x + at, total_, scratch);
      }
      y[i] = off[i] > V{} ? load(x + i * width<T>) : y[i];
    }
  }

  const MetricTarget<T> of_;
  const T total_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
