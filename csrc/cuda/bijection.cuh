// The bijections onto the simplex along rows (math/bijection.h): order 0 is forward, 1 backward, 2 double backward. A
// group of threads walks a row in parts, each thread with `row_items` neighbours, and carries sums from part to part.
// Walking a row again reads it out of the caches.
#pragma once

#include "../math/bijection.h"
#include "scan.cuh"
#include "simplex.cuh"

namespace constrained_ops {

constexpr int row_items = 4;

template <typename Storage>
struct BijectionOperands {
  const Storage *raw, *along, *g, *h;  // null: zeros
  Storage *x, *log_det, *grad_raw;     // null: not wanted; of order 2 x and log_det are those for g and h
  compute_t<Storage>* carries;         // two for each part of each row, where rows have more than one
  compute_t<Storage> smallest;         // the least positive number of the storage format
};

// A row as one thread sees it.
template <typename Storage>
struct BijectionRow {
  using T = compute_t<Storage>;
  BijectionOperands<Storage> at;
  int64_t size, step;  // of x, whose elements are `step` apart
  int64_t first, first_raw, row;
  bool inside;  // otherwise there is no such row, and nothing is read or written

  __device__ __forceinline__ BijectionRow(const BijectionOperands<Storage>& operands, const Rows& rows, int64_t row)
      : at(operands), size(rows.length), step(rows.inner.size), row(row), inside(row < rows.count) {
    const int64_t outer = rows.inner.quotient(row), rest = row - outer * step;
    first = outer * size * step + rest;
    first_raw = outer * (size - 1) * step + rest;
  }

  __device__ __forceinline__ bool has(int64_t k) const { return inside && k < size; }
  __device__ __forceinline__ bool has_raw(int64_t n) const { return inside && n >= 0 && n < size - 1; }
  __device__ __forceinline__ T read_raw(const Storage* from, int64_t n) const {
    return from != nullptr && has_raw(n) ? load(from + first_raw + n * step) : T(0);
  }
  __device__ __forceinline__ T read_g(int64_t k) const {
    return at.g != nullptr && has(k) ? load(at.g + first + k * step) : T(0);
  }
  __device__ __forceinline__ T read_h() const { return at.h != nullptr && inside ? load(at.h + row) : T(0); }
  __device__ __forceinline__ void write_x(int64_t k, T x) const {
    if (at.x != nullptr && has(k)) store(at.x + first + k * step, x);
  }
  __device__ __forceinline__ void write_raw(int64_t n, T grad_raw) const {
    if (at.grad_raw != nullptr && has_raw(n)) store(at.grad_raw + first_raw + n * step, grad_raw);
  }
  template <typename Group>
  __device__ __forceinline__ void write_log_det(const Group& group, T log_det) const {
    if (at.log_det != nullptr && inside && group.thread() == 0) store(at.log_det + row, log_det);
  }
};

// --- Isometric log-ratios
// ---------------------------------------------------------------------------------------------

template <typename Scalar, int order>
struct Ilr {
  using T = Scalar;
  using Rowwise = Softmax<T, order>;
  using Largest = typename Rowwise::State;            // what a group exchanges at a time
  static constexpr int streams = order == 2 ? 2 : 1;  // logits of raw, and of along
  using Before = Sums<T, streams>;

  // The inputs of softmax for a thread's items from k on; `carry` are the sums before the part, then those after it.
  template <typename Group, typename Row>
  __device__ __forceinline__ static void read(Group& group, const Row& row, int64_t k, Before& carry,
                                              T (&values)[1 + order][row_items]) {
    T w[streams][row_items];
    Before mine = Before::none();
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      const T scale = row.has_raw(k + i - 1) ? ilr_scale(T(k + i)) : T(0);
      w[0][i] = scale * row.read_raw(row.at.raw, k + i - 1);
      if constexpr (order == 2) w[1][i] = scale * row.read_raw(row.at.along, k + i - 1);
#pragma unroll
      for (int s = 0; s < streams; ++s) mine.values[s] += w[s][i];
    }
    const Scanned<Before> scanned = group.template scan<false>(mine);
    Before before = Before::merge(carry, scanned.outside);
    carry = Before::merge(carry, scanned.total);
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      const T n = T(k + i);
      const bool has = row.has(k + i);
      values[0][i] = has ? ilr_logit(before.values[0], n, w[0][i]) : Rowwise::padding(0);
      if constexpr (order > 0) values[1][i] = row.read_g(k + i);
      if constexpr (order == 2) values[2][i] = has ? ilr_logit(before.values[1], n, w[1][i]) : T(0);
#pragma unroll
      for (int s = 0; s < streams; ++s) before.values[s] += w[s][i];
    }
  }

  template <typename Group, typename Row>
  __device__ __forceinline__ static void run(Group& group, const Row& row) {
    const Rowwise rowwise{row.at.smallest};
    const int part = group.capacity(row_items);
    const int64_t mine = group.thread() * row_items;
    const T size = T(row.size);
    T values[1 + order][row_items];

    Before total = Before::none();
    typename Rowwise::State state[1] = {Rowwise::State::none()};
    for (int64_t start = 0; start < row.size; start += part) {
      read(group, row, start + mine, total, values);
      rowwise.add(state[0], values);
    }
    group.merge(state);
    const auto peak = state[0].peak();
    const auto sums = state[0].part();
    if constexpr (order == 0) {
      row.write_log_det(group, T(0.5) * log(size) - size * (total.values[0] + peak.values[0] + log(sums.values[0])));
    } else {
      if constexpr (order == 2) {
        row.write_log_det(group, -size * (total.values[1] + peak.values[2] + sums.values[2] / sums.values[0]));
      }
      state[0].values[1 + order + 1] += size * row.read_h() * sums.values[0];  // as if the mean of g were larger
    }

    typename Rowwise::Extra extra[1] = {Rowwise::Extra::none()};
    if constexpr (order == 2) {
      Before carry = Before::none();
      for (int64_t start = 0; start < row.size; start += part) {
        read(group, row, start + mine, carry, values);
        rowwise.extend(state[0], extra[0], values);
      }
      group.merge(extra);
    }

    Before carry = Before::none();
    Sums<T, 1> carry_u = Sums<T, 1>::none();
    for (int64_t start = 0; start < row.size; start += part) {
      const int64_t k = start + mine;
      read(group, row, k, carry, values);
      rowwise.finish(state[0], extra[0], values);
      if constexpr (order != 1) {
#pragma unroll
        for (int i = 0; i < row_items; ++i) row.write_x(k + i, values[0][i]);
      }
      if constexpr (order > 0) to_raw(group, row, k, carry_u, values[order - 1]);
    }
  }

  // The transpose of read(), for a thread's items of u.
  template <typename Group, typename Row>
  __device__ __forceinline__ static void to_raw(Group& group, const Row& row, int64_t k, Sums<T, 1>& carry,
                                                T (&u)[row_items]) {
    Sums<T, 1> mine = Sums<T, 1>::none();
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      u[i] = row.has(k + i) ? u[i] : T(0);
      mine.values[0] += u[i];
    }
    const Scanned<Sums<T, 1>> scanned = group.template scan<false>(mine);
    T before = carry.values[0] + scanned.outside.values[0];
    carry.values[0] += scanned.total.values[0];
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      const T n = T(k + i);
      row.write_raw(k + i - 1, ilr_to_w(before, n, u[i]) * ilr_scale(n));
      before += u[i];
    }
  }
};

// --- Stick-breaking
// ---------------------------------------------------------------------------------------------------

template <typename Scalar, int order>
struct StickBreaking {
  using T = Scalar;
  using Before = Sums<T, order == 2 ? 2 : 1>;  // of the logarithms of what is left, and of the parts taken times along
  using Largest = Affine<T>;

  // A thread's items: the breaks, and what they are to be weighed with. The last element of x is no break: it takes
  // nothing, and leaves all, of what softens and sums.
  struct Items {
    T taken[row_items], left[row_items], log_left[row_items], log_det[row_items], along[row_items];
    T g[row_items];  // less the last g of the row, so that equal ones give exactly 0
  };

  template <typename Row>
  __device__ __forceinline__ static void read(const Row& row, int64_t k, T last_g, Items& items) {
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      const bool breaks = row.has_raw(k + i);
      const T rest = breaks ? T(row.size - 1 - (k + i)) : T(1);
      const Break<T> at(row.read_raw(row.at.raw, k + i), rest, log(rest));
      items.taken[i] = breaks ? at.taken : T(0);
      items.left[i] = breaks ? at.left : T(1);
      items.log_left[i] = breaks ? at.log_left() : T(0);
      if constexpr (order == 0) {
        items.log_det[i] = breaks ? stick_log_det(at, rest) : T(0);
      } else {
        items.log_det[i] = breaks ? stick_log_det_raw(at.taken, at.left, rest) : T(0);
        items.g[i] = breaks ? row.read_g(k + i) - last_g : T(0);
      }
      if constexpr (order == 2) items.along[i] = row.read_raw(row.at.along, k + i);
    }
  }

  // What comes to a thread's items from those before it; `carry` as in Ilr::read.
  template <typename Group>
  __device__ __forceinline__ static Before scan_before(Group& group, const Items& items, Before& carry) {
    Before mine = Before::none();
#pragma unroll
    for (int i = 0; i < row_items; ++i) {
      mine.values[0] += items.log_left[i];
      if constexpr (order == 2) mine.values[1] += items.taken[i] * items.along[i];
    }
    const Scanned<Before> scanned = group.template scan<false>(mine);
    const Before before = Before::merge(carry, scanned.outside);
    carry = Before::merge(carry, scanned.total);
    return before;
  }

  // What comes from those after it, item by item: g less its mean after the item, and for order 2 the sum of along
  // times gradients; `carry` is what comes from after the part, then what the part makes of it.
  struct After {
    T deviation[row_items], sum[row_items];
  };
  template <typename Group>
  __device__ __forceinline__ static void scan_after(Group& group, const Items& items, T (&carry)[2], After& after) {
    Affine<T> mine = Affine<T>::none();
#pragma unroll
    for (int i = row_items - 1; i >= 0; --i) {
      mine = Affine<T>::merge({{items.left[i], items.taken[i] * items.g[i]}}, mine);
    }
    Scanned<Affine<T>> scanned = group.template scan<true>(mine);
    T mean = scanned.outside(carry[0]);
    carry[0] = scanned.total(carry[0]);
#pragma unroll
    for (int i = row_items - 1; i >= 0; --i) {
      after.deviation[i] = items.g[i] - mean;
      mean += items.taken[i] * after.deviation[i];
    }
    if constexpr (order == 2) {
      mine = Affine<T>::none();
#pragma unroll
      for (int i = row_items - 1; i >= 0; --i) {
        const T shift = stick_after(after.deviation[i], items.along[i], items.taken[i], items.left[i], T(0));
        mine = Affine<T>::merge({{items.left[i], shift}}, mine);
      }
      scanned = group.template scan<true>(mine);
      T sum = scanned.outside(carry[1]);
      carry[1] = scanned.total(carry[1]);
#pragma unroll
      for (int i = row_items - 1; i >= 0; --i) {
        after.sum[i] = sum;
        sum = stick_after(after.deviation[i], items.along[i], items.taken[i], items.left[i], sum);
      }
    }
  }

  template <typename Group, typename Row>
  __device__ __forceinline__ static void run(Group& group, const Row& row) {
    const int part = group.capacity(row_items);
    const int64_t mine = group.thread() * row_items, parts = (row.size + part - 1) / part;
    const T last_g = order > 0 ? row.read_g(row.size - 1) : T(0), h = order > 0 ? row.read_h() : T(0);
    T* const carries = row.at.carries + row.row * parts * 2;
    Items items;
    if constexpr (order > 0) {
      T carry[2] = {};
      for (int64_t p = parts - 1; p > 0; --p) {  // the first part needs nothing of it
        After unused;
        if (row.inside && group.thread() == 0) {
          carries[p * 2] = carry[0];
          carries[p * 2 + 1] = carry[1];
        }
        read(row, p * part + mine, last_g, items);
        scan_after(group, items, carry, unused);
      }
      if (parts > 1) {
        if (row.inside && group.thread() == 0) {
          carries[0] = carry[0];
          carries[1] = carry[1];
        }
        group.sync();
      }
    }

    Before carry = Before::none();
    Sums<T, 1> log_det[1] = {Sums<T, 1>::none()};
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t k = p * part + mine;
      read(row, k, last_g, items);
      Before before = scan_before(group, items, carry);
      After after;
      if constexpr (order > 0) {
        T carry_after[2] = {};
        if (parts > 1 && row.inside) {
          carry_after[0] = carries[p * 2];
          carry_after[1] = carries[p * 2 + 1];
        }
        scan_after(group, items, carry_after, after);
      }
#pragma unroll
      for (int i = 0; i < row_items; ++i) {
        const bool breaks = row.has_raw(k + i);
        const T taken = items.taken[i], left = items.left[i];
        const T remaining = stick_value(T(1), before.values[0]);
        if constexpr (order == 0) {
          row.write_x(k + i, kept_positive(breaks ? taken * remaining : remaining, row.at.smallest));
          log_det[0].values[0] += items.log_det[i];
        } else if constexpr (order == 1) {
          row.write_raw(k + i, after.deviation[i] * stick_slope(taken, left, remaining) + h * items.log_det[i]);
        } else {
          const T a = items.along[i];
          const T along = stick_along(left, a, before.values[1]);
          row.write_x(k + i, breaks ? remaining * taken * along : -remaining * before.values[1]);
          log_det[0].values[0] += a * items.log_det[i];
          const T rest = T(row.size - 1 - (k + i));
          const T second = stick_second(after.deviation[i], a, taken, left, before.values[1], after.sum[i]);
          row.write_raw(
              k + i, second * stick_slope(taken, left, remaining) + h * a * stick_log_det_raw_raw(taken, left, rest));
          before.values[1] += taken * a;
        }
        before.values[0] += items.log_left[i];
      }
    }
    if constexpr (order != 1) {
      group.merge(log_det);
      row.write_log_det(group, log_det[0].values[0]);
    }
  }
};

// --- Kernel and launcher
// ----------------------------------------------------------------------------------------------

template <int threads, typename Program, typename Storage, typename Group>
__global__ void __launch_bounds__(threads, 1)
    bijection_kernel(const BijectionOperands<Storage> operands, const Rows rows, Group group) {
  for (int64_t start = blockIdx.x * int64_t(group.rows()); start < rows.count;
       start += gridDim.x * int64_t(group.rows())) {
    const BijectionRow<Storage> row(operands, rows, start + group.row());
    Program::run(group, row);
  }
}

// Who works on a row: lanes of a warp, or from `threads` = 0 lanes on a block.
struct BijectionShape {
  int lanes = 0, threads = 0;
  int64_t parts;

  explicit BijectionShape(const Rows& rows, int most_threads) {
    constexpr int64_t enough_rows = 8192;  // to keep a device busy with a thread for each
    const int64_t shares = divide_up(rows.length, row_items);
    if (rows.inner.size > 1 && rows.count >= enough_rows) {  // neighbouring threads read neighbouring addresses
      lanes = 1;
    } else if (shares <= warp_size) {
      lanes = round_up_to_power_of_two(shares);
    } else {
      threads = static_cast<int>(std::min<int64_t>(divide_up(shares, warp_size) * warp_size, most_threads));
    }
    parts = divide_up(shares, lanes > 0 ? lanes : threads);
  }
};

// A block's threads, as registers allow: doubles take two, and backward has more numbers, double backward most.
template <typename Storage, int order>
constexpr int bijection_threads =
    sizeof(compute_t<Storage>) == 8 ? (order == 0 ? 512 : 256) : (order == 2 ? 512 : 1024);

template <typename Program, int order, typename Storage>
void launch_bijection(const Queue& queue, const BijectionOperands<Storage>& operands, const Rows& rows,
                      const BijectionShape& shape) {
  if (shape.lanes > 0) {
    constexpr int threads = lane_threads;
    launch(queue, Grid(limit_blocks(divide_up(rows.count, threads / shape.lanes), threads, queue), threads),
           bijection_kernel<threads, Program, Storage, ScanLanes>, operands, rows, ScanLanes{{shape.lanes}});
  } else {
    constexpr int state = static_cast<int>(std::max(
        {sizeof(typename Program::Largest), sizeof(typename Program::Before), sizeof(Affine<compute_t<Storage>>)}));
    const ScanBlock group{BlockGroup(shape.threads, state)};
    launch(queue, Grid(limit_blocks(rows.count, shape.threads, queue), shape.threads, group.shared_bytes()),
           bijection_kernel<bijection_threads<Storage, order>, Program, Storage, ScanBlock>, operands, rows, group);
  }
}

}  // namespace constrained_ops
