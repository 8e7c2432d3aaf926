// The projection of a step of Adam onto the simplex, for rows of float or double. From x and the moments m and v, with
//
//   d = sqrt(v) root_scale + eps, none less than its share of the row's largest,   u = 1 / d,   z = x - step_size m u,
//
// it is y = max(0, z - lambda u) as in csrc/math/projection.h. Newton's method starts from the support that x has: that
// has a lambda no larger than the wanted one, and mostly is the support of y already. MetricLanes takes rows that share
// vectors, MetricRows longer ones as they lie in memory, MetricColumns rows as the columns of a tile. A row's result is
// the same whatever lies beside it.
#pragma once

#include <memory>

#include "../../math/adam.h"
#include "projection_steps.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// lambda on its way up, of rows in the lanes of a vector.
template <typename T>
struct MetricClimb {
  using V = Vector<T>;
  using Mask = decltype(V{} == V{});
  static constexpr int most_readings = 32;

  V lambda, rest = {};      // what leaves a row total is their sum
  V slope;                  // sum of u over the support at the last reading, or at the start
  Mask going = V{} == V{};  // rows that are not there yet
  Mask off = V{} != V{};    // rows that do not get there: no numbers, or ones that want more digits of lambda

  CO_HD MetricClimb() {}
  // From sums of z and u over a support.
  CO_HD MetricClimb(V sum_z, V sum_u, T total) : lambda((sum_z - total) * reciprocal(sum_u)), slope(sum_u) {}

  // After a reading at lambda, which found so much more than total, and so much u, in its support.
  CO_HD void step(V excess, V inside, T total) {
    const V rise = excess * reciprocal(inside);
    const auto unsettled =
        going & (inside != slope) & (size_of(excess) > 8 * std::numeric_limits<T>::epsilon() * total);
    rest = going ? rise : rest;
    off = going ? ~near(excess, total) : off;
    lambda = unsettled ? lambda + rise : lambda;
    slope = inside;
    going = unsettled;
  }
  // All that is left to do after a first reading; read(lambda, going, excess, inside) is another one.
  template <typename Read>
  CO_HD void go_on(V excess, V inside, T total, const Read& read) {
    for (int readings = 1;; ++readings) {
      step(excess, inside, total);
      if (readings == most_readings || !any(going)) break;
      read(lambda, going, excess, inside);
    }
    off |= going;
  }
  // Whether that was the last reading for all rows; sets no more than `rest`.
  CO_HD bool ends(V excess, V inside, T total) {
    rest = excess * reciprocal(inside);
    return !any(~((inside == slope) & near(excess, total)));
  }

 private:
  CO_HD static V size_of(V v) { return v < V{} ? -v : v; }
  // Whether one number is digits enough for `rest`.
  CO_HD static Mask near(V excess, T total) { return size_of(excess) <= total * T(1e-3); }
};

// Where Adam goes on a simplex, number by number.
template <typename T>
struct MetricTarget {
  using V = Vector<T>;
  Adam<T> adam;

  explicit MetricTarget(const Adam<T>& of) : adam(of) { adam.root_scale /= 2; }
  CO_HD V metric(V v) const { return adam_metric_of(adam, twice_root(v)); }
  CO_HD V target(V x, V m, V u) const { return adam_target(adam, x, m * u); }
};

template <typename V>
CO_HD V add_where(decltype(V{} == V{}) mask, V sum, V term) {
  return mask ? sum + term : sum;
}

// Two vectors to one: neighbours combined, in each part of it those of a first.
template <int part, typename V, typename Combine, int... lane>
CO_HD V neighbours(V a, V b, Combine combine, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  constexpr auto first = [](int l) {
    const int in_part = l % part, of_b = in_part >= part / 2;
    return l - in_part + 2 * (in_part - of_b * part / 2) + of_b * lanes;
  };
  return combine(__builtin_shufflevector(a, b, first(lane)...), __builtin_shufflevector(a, b, (first(lane) + 1)...));
}

// As many vectors to one as are combined in a lane, which are neighbours in a part.
template <int count, int part, typename V, typename Combine>
CO_HD V across_each(const V* vectors, Combine combine) {
  constexpr int lanes = sizeof(V) / sizeof(vectors[0][0]);
  V halves[count / 2];
#pragma GCC unroll 8
  for (int i = 0; i < count / 2; ++i)
    halves[i] = neighbours<part>(vectors[2 * i], vectors[2 * i + 1], combine, std::make_integer_sequence<int, lanes>());
  if constexpr (count == 2)
    return halves[0];
  else
    return across_each<count / 2, part>(halves, combine);
}

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

// Rows side by side: the lanes of a group, two vectors at each of `length` steps, in tiles.
template <typename T>
class MetricColumns {
  using V = Vector<T>;
  using Climb = MetricClimb<T>;
  static constexpr int64_t stride = RowUnits::lanes;

 public:
  // z: x, and then y. u: v.
  MetricColumns(const Adam<T>& adam, T total, int64_t length, T* z, const T* m, T* u)
      : of_(adam), total_(total), length_(length), z_(z), m_(m), u_(u) {}

  // n: the length, or 0 where that is not known before.
  template <int n>
  CO_HD void project() {
    const MetricTarget<T> of = of_;  // a local, which no store can change
    V largest[2] = {}, sum_z[2] = {}, sum_u[2] = {};
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V d = of.metric(load(u_ + at));
      store(u_ + at, d);
      largest[v] = larger_of(largest[v], d);
    });
    for (V& of_row : largest) of_row *= adam_floor<T>;
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V u = reciprocal(larger_of(load(u_ + at), largest[v])), x = load(z_ + at);
      const V z = of.target(x, load(m_ + at), u);
      store(z_ + at, z);
      store(u_ + at, u);
      sum_z[v] = add_where(x > V{}, sum_z[v], z);
      sum_u[v] = add_where(x > V{}, sum_u[v], u);
    });
    Climb climb[2];
    V excess[2], inside[2];
    for (int v = 0; v < 2; ++v) climb[v] = Climb(sum_z[v], sum_u[v], total_);
    read<n>(climb[0].lambda, climb[1].lambda, excess, inside);
    bool ends = true;
    for (int v = 0; v < 2; ++v) ends &= climb[v].ends(excess[v], inside[v], total_);
    if (!ends) {
      Climb on[2] = {climb[0], climb[1]};
      V last_excess[] = {excess[0], excess[1]}, last_inside[] = {inside[0], inside[1]};
      climb_on(on, last_excess, last_inside);
      for (int v = 0; v < 2; ++v) climb[v].lambda = on[v].lambda, climb[v].rest = on[v].rest;
    }
    for_each<n>([&](int v, int64_t at) CO_INLINE {
      const V u = load(u_ + at);
      store(z_ + at, value_of_rest(projection_rest<true>(load(z_ + at), u, climb[v].lambda, climb[v].rest)));
    });
  }

 private:
  static constexpr int64_t steps_per_sum = 16;

  // body(vector, where its numbers are) for steps [begin, end), or all n.
  template <int n, typename Body>
  CO_HD void for_each(const Body& body, int64_t begin = 0, int64_t end = -1) const {
    const auto step = [&](int64_t k) CO_INLINE {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) body(v, k * stride + v * width<T>);
    };
    if constexpr (n > 0) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) step(k);
    } else {
      if (end < 0) end = length_;
      for (int64_t k = begin; k < end; ++k) step(k);
    }
  }

  template <int n>
  CO_HD void read(V lambda_0, V lambda_1, V (&excess)[2], V (&inside)[2]) const {
    const auto add = [&](V(&sum)[2], int64_t begin, int64_t end) CO_INLINE {
      for_each<n>(
          [&](int v, int64_t at) CO_INLINE {
            const V u = load(u_ + at);
            const V left = projection_anchored<true>(load(z_ + at), u, v == 0 ? lambda_0 : lambda_1);
            const auto counts = ~(left <= V{});  // a NaN, too
            sum[v] = add_where(counts, sum[v], left);
            inside[v] = add_where(counts, inside[v], u);
          },
          begin, end);
    };
    for (int v = 0; v < 2; ++v) excess[v] = V{} - total_, inside[v] = V{};
    if (n > 0) return add(excess, 0, n);
    V lost[2] = {};
    for (int64_t k = 0; k < length_; k += steps_per_sum) {
      V sum[2] = {};
      add(sum, k, std::min(k + steps_per_sum, length_));
      for (int v = 0; v < 2; ++v) {
        V rounding;
        excess[v] = two_sum(excess[v], sum[v], rounding);
        lost[v] += rounding;
      }
    }
    for (int v = 0; v < 2; ++v) excess[v] += lost[v];
  }

  [[gnu::noinline]] void climb_on(Climb (&climb)[2], V (&excess)[2], V (&inside)[2]) {
    for (int readings = 1;; ++readings) {
      for (int v = 0; v < 2; ++v) climb[v].step(excess[v], inside[v], total_);
      if (readings == Climb::most_readings || !(any(climb[0].going) || any(climb[1].going))) break;
      read<0>(climb[0].lambda, climb[1].lambda, excess, inside);
    }
    for (int v = 0; v < 2; ++v) climb[v].off |= climb[v].going;
    if (any(climb[0].off) || any(climb[1].off)) project_anew(climb);
  }

  // Rows that are off take their y from the projection of any numbers.
  [[gnu::noinline]] void project_anew(Climb (&climb)[2]) {
    const std::unique_ptr<T[]> memory(new T[2 * length_ * group<T>]);
    T *const y = memory.get(), *const d = y + length_ * group<T>;
    for_each<0>([&](int v, int64_t at) CO_INLINE {
      const int64_t to = at / stride * group<T> + v * width<T>;
      store(y + to, load(z_ + at));
      store(d + to, 1 / load(u_ + at));
    });
    ProjectionScratch scratch(length_);
    constrained_ops::CO_LEVEL::project<true, false>(length_, group<T>, y, d, y, total_, scratch.live());
    for_each<0>([&](int v, int64_t at) CO_INLINE {
      const int64_t from = at / stride * group<T> + v * width<T>;
      store(z_ + at, climb[v].off ? load(y + from) : load(z_ + at));
    });
    for (int v = 0; v < 2; ++v) {
      climb[v].lambda = climb[v].off ? V{} : climb[v].lambda;
      climb[v].rest = climb[v].off ? V{} : climb[v].rest;
    }
  }

  const MetricTarget<T> of_;
  const T total_;
  const int64_t length_;
  T* const z_;
  const T* const m_;
  T* const u_;
};

// Rows that follow each other, of at least a vector's length: up to as many as that has lanes, since what is combined
// along a row is so for all of them at once. A last vector that a row does not fill overlaps the one before it.
template <typename T>
class MetricRows {
  using V = Vector<T>;
  using Climb = MetricClimb<T>;
  using Mask = typename Climb::Mask;

 public:
  static constexpr int lanes = width<T>;

  // z and u: as many rows, room(length) each, as are taken at once.
  static constexpr int64_t room(int64_t length) { return (length + lanes - 1) / lanes * lanes; }
  MetricRows(const Adam<T>& adam, T total, int64_t length, T* z, T* u)
      : of_(adam), total_(total), at_{length, length / lanes * lanes, room(length), z, u, {}} {
    for (int l = 0; l < lanes; ++l) at_.fresh[l] = l >= at_.room - length ? -1 : 0;
  }

  // y may be x. v_at(i, fresh): the v of which the metric is made, of the vector at i in the operands, where only what
  // is fresh may be written; called once for each vector, for a row's last one first.
  template <typename VAt>
  [[gnu::noinline]] void project(int rows, const VAt& v_at, const T* x, const T* m, T* y) {
    const MetricTarget<T> of = of_;  // locals, which no store can change
    const Rows at = at_;
    V part[lanes], part_u[lanes];  // what is combined along each row
    for (int r = rows; r < lanes; ++r) part[r] = part_u[r] = V{};
    for (int r = 0; r < rows; ++r) {
      V largest[2] = {};
      const auto measure = [&](int i, int64_t here, int64_t from, Mask fresh) CO_INLINE {
        const V d = of.metric(v_at(from, fresh));
        store(at.u + here, d);
        largest[i] = larger_of(largest[i], d);
      };
      at.for_last(r, measure);
      at.for_whole(r, 0, at.whole, measure);
      part[r] = larger_of(largest[0], largest[1]);
    }
    T floor[lanes];
    store(floor, combined(rows, part, Larger()) * adam_floor<T>);

    for (int r = 0; r < rows; ++r) {
      const V least = V{} + floor[r];
      V sum_z[2] = {}, sum_u[2] = {};
      at.for_each(r, [&](int i, int64_t here, int64_t from, Mask fresh) CO_INLINE {
        const V u = reciprocal(larger_of(load(at.u + here), least)), x_k = load(x + from);
        const V z = fresh ? of.target(x_k, load(m + from), u) : V{} - std::numeric_limits<T>::infinity();
        store(at.z + here, z);
        store(at.u + here, u);
        const auto counts = (x_k > V{}) & fresh;
        sum_z[i] = add_where(counts, sum_z[i], z);
        sum_u[i] = add_where(counts, sum_u[i], u);
      });
      part[r] = sum_z[0] + sum_z[1];
      part_u[r] = sum_u[0] + sum_u[1];
    }
    const V sum_z = combined(rows, part, Plus());
    Climb climb(sum_z, combined(rows, part_u, Plus()), total_);
    V excess, inside;
    read(rows, climb.lambda, V{} == V{}, part, part_u, excess, inside);
    if (!climb.ends(excess, inside, total_)) climb_on(rows, climb, part, part_u, excess, inside);

    T lambda[lanes], rest[lanes];
    store(lambda, climb.lambda);
    store(rest, climb.rest);
    for (int r = 0; r < rows; ++r) {
      const V lambda_r = V{} + lambda[r], rest_r = V{} + rest[r];
      const auto finish = [&](int, int64_t here, int64_t from, Mask) CO_INLINE {
        const V u = load(at.u + here);
        store(y + from, value_of_rest(projection_rest<true>(load(at.z + here), u, lambda_r, rest_r)));
      };
      at.for_last(r, finish);  // what overlaps, the vector before it overwrites
      at.for_whole(r, 0, at.whole, finish);
    }
  }

 private:
  static constexpr int64_t numbers_per_sum = 32 * lanes;

  struct Rows {
    int64_t length, whole, room;
    T *z, *u;
    Mask fresh;  // numbers of the last vector that are not of the one before

    // body(0 or 1 in turns, where numbers of row r are, where those of operands are, which of them count).
    template <typename Body>
    CO_HD void for_whole(int64_t r, int64_t begin, int64_t end, const Body& body) const {
      const int64_t here = r * room, from = r * length;
      int64_t k = begin;
      for (; k + 2 * lanes <= end; k += 2 * lanes) {
        body(0, here + k, from + k, V{} == V{});
        body(1, here + k + lanes, from + k + lanes, V{} == V{});
      }
      if (k < end) body(0, here + k, from + k, V{} == V{});
    }
    template <typename Body>
    CO_HD void for_last(int64_t r, const Body& body) const {
      if (whole < length) body(whole / lanes % 2, r * room + whole, (r + 1) * length - lanes, fresh);
    }
    template <typename Body>
    CO_HD void for_each(int64_t r, const Body& body) const {
      for_whole(r, 0, whole, body);
      for_last(r, body);
    }
  };

  // In a lane for each row; if there is but one, in all.
  template <typename Combine>
  CO_HD static V combined(int rows, const V (&part)[lanes], Combine combine) {
    return rows == 1 ? V{} + across<T, T>(part[0], combine) : across_each<lanes, lanes>(part, combine);
  }

  // How much more than total is left at lambda, and the sum of u of what is left, of some rows.
  CO_HD void read(int rows, V lambdas, Mask which, V (&part)[lanes], V (&part_u)[lanes], V& excess, V& inside) const {
    const Rows at = at_;
    T lambda[lanes];
    std::remove_reference_t<decltype(which[0])> reads[lanes];
    store(lambda, lambdas);
    std::memcpy(reads, &which, sizeof(which));
    V start = {};
    start[0] = -total_;
    for (int r = 0; r < rows; ++r) {
      if (!reads[r]) continue;
      const V lambda_r = V{} + lambda[r];
      V sum[2] = {start, {}}, sum_u[2] = {};
      const auto add = [&](int i, int64_t here, int64_t, Mask) CO_INLINE {
        const V u = load(at.u + here), left = projection_anchored<true>(load(at.z + here), u, lambda_r);
        const auto counts = ~(left <= V{});  // a NaN, too
        sum[i] = add_where(counts, sum[i], left);
        sum_u[i] = add_where(counts, sum_u[i], u);
      };
      if (at.room <= numbers_per_sum) {
        at.for_whole(r, 0, at.room, add);
        part[r] = sum[0] + sum[1];
      } else {
        V high = {}, low = {};
        for (int64_t k = 0; k < at.room; k += numbers_per_sum) {
          at.for_whole(r, k, std::min(k + numbers_per_sum, at.room), add);
          V rounding;
          high = two_sum(high, sum[0] + sum[1], rounding);
          low += rounding;
          sum[0] = sum[1] = V{};
        }
        part[r] = high + low;
      }
      part_u[r] = sum_u[0] + sum_u[1];
    }
    excess = combined(rows, part, Plus());
    inside = combined(rows, part_u, Plus());
  }

  [[gnu::noinline]] void climb_on(int rows, Climb& climb, V (&part)[lanes], V (&part_u)[lanes], V excess, V inside) {
    for (int l = 0; l < lanes; ++l) climb.going[l] = l < rows ? -1 : 0;
    climb.go_on(excess, inside, total_, [&](V lambda, Mask going, V& excess, V& inside) CO_INLINE {
      read(rows, lambda, going, part, part_u, excess, inside);
    });
    if (any(climb.off)) project_anew(climb);
  }

  // Rows that are off take their y from the projection of any numbers.
  [[gnu::noinline]] void project_anew(Climb& climb) {
    const int64_t room = at_.room;
    const std::unique_ptr<T[]> d(new T[room]);
    ProjectionScratch scratch(room);
    for (int r = 0; r < lanes; ++r) {
      if (!climb.off[r]) continue;
      T* const z = at_.z + r * room;
      for (int64_t k = 0; k < room; ++k) d[k] = 1 / at_.u[r * room + k];
      project_row<true>(room, z, d.get(), z, total_, scratch);
      climb.lambda[r] = climb.rest[r] = 0;
    }
  }

  const MetricTarget<T> of_;
  const T total_;
  Rows at_;
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
