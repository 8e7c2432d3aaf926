// A step of Adam on the simplex (metric_climb.h) for rows of at least a vector, where they lie in memory.
#pragma once

#include <memory>

#include "metric_climb.h"

namespace constrained_ops::CO_LEVEL {
namespace {

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
  // is fresh may be written; called once for each vector, for a row's last one first. fetch(i) is called once for each
  // vector after that, to ask for what is read later. vectors: of how many whole ones a row is, or 0 where that is not
  // known before.
  template <int vectors, typename VAt, typename Fetch>
  [[gnu::noinline]] void project(int rows, const VAt v_at, const Fetch fetch, const T* x, const T* m, T* y) {
    const MetricTarget<T> of = of_;  // locals, which no store can change
    const Rows at = at_.of_vectors(vectors);
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
        fetch(from);
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
    read<vectors>(rows, climb.lambda, V{} == V{}, part, part_u, excess, inside);
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

    // The same, of a length that a compiler knows unless it is 0.
    CO_HD Rows of_vectors(int vectors) const {
      const int64_t known = vectors * lanes;
      return vectors == 0 ? *this : Rows{known, known, known, z, u, fresh};
    }

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
      if (whole < length) body(1, r * room + whole, (r + 1) * length - lanes, fresh);
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
    return rows == 1 ? V{} + across<T, T>(part[0], combine) : across_each<lanes>(part, combine);
  }

  // How much more than total is left at lambda, and the sum of u of what is left, of some rows.
  template <int vectors>
  CO_HD void read(int rows, V lambdas, Mask which, V (&part)[lanes], V (&part_u)[lanes], V& excess, V& inside) const {
    const Rows at = at_.of_vectors(vectors);
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
      read<0>(rows, lambda, going, part, part_u, excess, inside);
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
