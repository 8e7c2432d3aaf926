// The projection onto the simplex along rows of [outer, length, inner], three ways; see RowUnits.
#include <memory>

#include "convert.h"
#include "of_dtype.h"
#include "projection_lanes.h"
#include "projection_rows.h"
#include "projection_sorted.h"
#include "strides.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// The kernels as types, for a template argument each, on operands of the compute type; inputs and outputs in the order
// of ProjectionCall. Results may take their inputs' place: output i that of input `place[i]`.
template <bool weighted>
struct ForwardRows {
  static constexpr bool forward = true;
  static constexpr bool is_weighted = weighted;
  static constexpr int inputs = 1 + weighted, outputs = 1;
  static constexpr int place[] = {0};
  template <typename T>
  static void row(int64_t length, const T* const* in, T* const* out, T total, ProjectionScratch& scratch) {
    project_row<weighted>(length, in[0], weighted ? in[inputs - 1] : nullptr, out[0], total, scratch);
  }
  template <typename T>
  static void columns(int64_t length, int64_t stride, const T* const* in, T* const* out, T total,
                      ProjectionScratch& scratch) {
    project_columns<weighted>(length, stride, in[0], weighted ? in[inputs - 1] : nullptr, out[0], total, scratch);
  }
};

template <bool weighted, bool to_weight>
struct BackwardRows {
  static constexpr bool forward = false;
  static constexpr int inputs = 2 + weighted + to_weight, outputs = 1 + to_weight;
  static constexpr int place[] = {0, 2};
  template <typename T>
  static void row(int64_t length, const T* const* in, T* const* out, T, ProjectionScratch&) {
    project_row_backward<weighted, to_weight>(length, operands(in, out));
  }
  template <typename T>
  static void columns(int64_t length, int64_t stride, const T* const* in, T* const* out, T, ProjectionScratch&) {
    project_columns_backward<weighted, to_weight>(length, stride, operands(in, out));
  }

 private:
  template <typename T>
  static ProjectionGradient<T> operands(const T* const* in, T* const* out) {
    return {in[0],
            in[1],
            weighted ? in[1 + weighted] : nullptr,
            to_weight ? in[inputs - 1] : nullptr,
            out[0],
            to_weight ? out[outputs - 1] : nullptr};
  }
};

template <bool weighted>
constexpr int64_t shortest_side_by_side = weighted ? 48 : shortest_alone;

// Rows that follow each other. Others than those of the compute type are converted.

// Whether they were done in registers: rows of n and more.
template <int n, typename Storage>
bool run_in_lanes(const ProjectionCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  if (call.layout.length != n) {
    if constexpr (n < longest_in_lanes) return run_in_lanes<n + 1, Storage>(call, begin, end);
  } else if constexpr (RowsInLanes<n>::template fit<T>) {
    const int64_t first = begin * RowUnits::lanes * n;
    const int64_t last = std::min(end * RowUnits::lanes, call.layout.outer * call.layout.inner) * n;
    const Storage* from = static_cast<const Storage*>(call.inputs[0]);
    Storage* to = static_cast<Storage*>(call.outputs[0]);
    if constexpr (std::is_same_v<Storage, T>) {
      project_lanes<n>(from + first, last - first, T(call.total), to + first);
    } else {
      constexpr int64_t batch = LanesProjection<n, T>::batch, chunk = loop_chunk / batch * batch;
      T numbers[chunk];
      for (int64_t i = first; i < last; i += chunk) {
        const int64_t size = std::min(chunk, last - i);
        read_numbers(from + i, 1, size, numbers);
        project_lanes<n>(numbers, size, T(call.total), numbers);
        write_numbers(numbers, size, to + i, 1);
      }
    }
    return true;
  }
  return false;
}

// As many at once as a tile has lanes.
template <bool weighted, typename Storage>
void run_side_by_side(const ProjectionCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  constexpr int64_t lanes = RowUnits::lanes;
  constexpr bool converted = !std::is_same_v<Storage, T>;
  const int64_t length = call.layout.length;
  RowsProjection<weighted, T> project(length);
  const std::unique_ptr<T[]> memory(new T[converted ? 3 * lanes * length : 0]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit * lanes, rows = std::min(lanes, call.layout.outer - row), n = rows * length;
    const T* in[2] = {};
    for (int i = 0; i < 1 + weighted; ++i) {
      const Storage* from = static_cast<const Storage*>(call.inputs[i]) + row * length;
      if constexpr (converted) {
        T* to = memory.get() + i * lanes * length;
        read_numbers(from, 1, n, to);
        in[i] = to;
      } else {
        in[i] = from;
      }
    }
    Storage* out = static_cast<Storage*>(call.outputs[0]) + row * length;
    if constexpr (converted) {
      T* y = memory.get() + 2 * lanes * length;
      project(rows, in[0], in[1], y, T(call.total));
      write_numbers(y, n, out, 1);
    } else {
      project(rows, in[0], in[1], out, T(call.total));
    }
  }
}

template <int inputs, int outputs, typename Storage>
CO_HD void fetch_next(const ProjectionCall& call, const RowUnits& units, int64_t unit, int64_t end) {
  if (unit + 1 < end)
    TileRows(call.layout, units, unit + 1).prefetch<Storage>(call.inputs, inputs, call.outputs, outputs);
}

// Rows in tiles that are padded: to n numbers, the power of two next to `length`, or to whole blocks.
template <int n, bool weighted, typename Storage>
void run_sorted(const ProjectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const int64_t length = call.layout.length;
  if constexpr (n < sorted_block)
    if (length > n) return run_sorted<2 * n, weighted, Storage>(call, units, begin, end);
  const int64_t padded = length <= n ? n : (length + sorted_block - 1) / sorted_block * sorted_block;
  const Tiles<T> tiles(1 + weighted, padded, call.layout);
  T *const x = tiles.at(0), *const weight = weighted ? tiles.at(1) : nullptr;
  if (weighted) std::fill(weight + length * tiles.lanes, weight + padded * tiles.lanes, T(1));
  ProjectionScratch scratch(length);
  // Rows of a vector and more are finished where they lie, in place of being brought back.
  const bool to_roots = !weighted && call.layout.inner == 1 && length >= width<T> && std::is_same_v<Storage, T>;
  LaneRoots<T> roots;
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileRows rows(call.layout, units, unit);
    const Storage* from = static_cast<const Storage*>(call.inputs[0]);
    Storage* to = static_cast<Storage*>(call.outputs[0]);
    rows.load(from, x);
    std::fill(x + length * tiles.lanes, x + padded * tiles.lanes, padding<T>);
    if (weighted) rows.load(static_cast<const Storage*>(call.inputs[1]), weight);
    fetch_next<1 + weighted, 1, Storage>(call, units, unit, end);
    if constexpr (weighted)
      project_sorted<n>(x, weight, T(call.total));
    else if (length > 2 * sorted_block)
      project_largest(length, x, T(call.total), scratch, to_roots, roots);
    else if (to_roots)  // never of up to n where n is less than a vector
      (length > n ? project_two_blocks<true, T> : project_sorted<n, (n >= width<T>), T>)(x, T(call.total), roots);
    else
      (length > n ? project_two_blocks<false, T> : project_sorted<n, false, T>)(x, T(call.total), roots);
    if constexpr (std::is_same_v<Storage, T>)
      if (to_roots) roots.values(rows.count, length, from + rows.first, to + rows.first);
    if (!to_roots) rows.store(x, to);
  }
}

// One row at a time, in place or, where its elements are of 16 bits or apart, in memory of the thread's own.
template <typename Storage, typename Rows>
class SingleRows {
  using T = compute_t<Storage>;

 public:
  explicit SingleRows(const ProjectionCall& call)
      : call_(call),
        stride_(call.layout.inner),
        in_place_(stride_ == 1 && std::is_same_v<Storage, T>),
        scratch_(call.layout.length),
        memory_(new T[in_place_ ? 0 : Rows::inputs * call.layout.length]) {}

  void run(int64_t first) {
    const int64_t length = call_.layout.length;
    const T* in[Rows::inputs];
    T* out[Rows::outputs];
    for (int i = 0; i < Rows::inputs; ++i) in[i] = input(i, first);
    for (int i = 0; i < Rows::outputs; ++i) out[i] = output(i, first);
    Rows::row(length, in, out, T(call_.total), scratch_);
    if (in_place_) return;
    for (int i = 0; i < Rows::outputs; ++i) {
      if (!out[i]) continue;
      write_numbers(out[i], length, static_cast<Storage*>(call_.outputs[i]) + first, stride_);
    }
  }

 private:
  const T* input(int i, int64_t first) {
    const Storage* from = static_cast<const Storage*>(call_.inputs[i]) + first;
    if constexpr (std::is_same_v<Storage, T>)
      if (in_place_) return from;
    T* row = memory_.get() + i * call_.layout.length;
    read_numbers(from, stride_, call_.layout.length, row);
    return row;
  }
  T* output(int i, int64_t first) {
    if (!call_.outputs[i]) return nullptr;
    if constexpr (std::is_same_v<Storage, T>)
      if (in_place_) return static_cast<T*>(call_.outputs[i]) + first;
    return memory_.get() + Rows::place[i] * call_.layout.length;
  }

  const ProjectionCall& call_;
  const int64_t stride_;
  const bool in_place_;
  ProjectionScratch scratch_;
  const std::unique_ptr<T[]> memory_;
};

template <typename Rows, typename Storage>
void run_tiles(const ProjectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const int64_t length = call.layout.length;
  if constexpr (Rows::forward) {
    constexpr bool weighted = Rows::is_weighted;
    if (call.layout.inner == 1 && length >= shortest_side_by_side<weighted>)
      return run_side_by_side<weighted, Storage>(call, begin, end);
    if constexpr (!weighted)
      if ((call.layout.inner == 1 || length == 1) && run_in_lanes<1, Storage>(call, begin, end)) return;
    if (!weighted || length <= sorted_block) return run_sorted<2, weighted, Storage>(call, units, begin, end);
  }
  const Tiles<T> tiles(Rows::inputs, length, call.layout);
  ProjectionScratch scratch(length);
  const T* in[Rows::inputs];
  T* out[Rows::outputs];
  for (int i = 0; i < Rows::inputs; ++i) in[i] = tiles.at(i);
  for (int i = 0; i < Rows::outputs; ++i) out[i] = call.outputs[i] ? tiles.at(Rows::place[i]) : nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileRows rows(call.layout, units, unit);
    for (int i = 0; i < Rows::inputs; ++i) rows.load(static_cast<const Storage*>(call.inputs[i]), tiles.at(i));
    fetch_next<Rows::inputs, Rows::outputs, Storage>(call, units, unit, end);
    Rows::columns(length, tiles.lanes, in, out, T(call.total), scratch);
    for (int i = 0; i < Rows::outputs; ++i)
      if (out[i]) rows.store(out[i], static_cast<Storage*>(call.outputs[i]));
  }
}

template <typename Rows, typename Storage>
void run_rows(const ProjectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  SingleRows<Storage, Rows> rows(call);
  const int64_t last = std::min(call.layout.outer, end * units.rows_per_unit);
  for (int64_t row = begin * units.rows_per_unit; row < last; ++row) rows.run(row * call.layout.length);
}

// Long rows that lie side by side: those that fill no whole unit, or are not of the compute type, one at a time.
template <typename Rows, typename Storage>
void run_columns(const ProjectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  SingleRows<Storage, Rows> rows(call);
  ProjectionScratch scratch(length);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t lane = unit % units.per_outer * units.lanes, count = std::min(units.lanes, inner - lane);
    const int64_t first = unit / units.per_outer * length * inner + lane;
    if constexpr (std::is_same_v<Storage, T>) {
      if (count == units.lanes) {
        const T* in[Rows::inputs];
        T* out[Rows::outputs];
        for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const T*>(call.inputs[i]) + first;
        for (int i = 0; i < Rows::outputs; ++i)
          out[i] = call.outputs[i] ? static_cast<T*>(call.outputs[i]) + first : nullptr;
        Rows::columns(length, inner, in, out, T(call.total), scratch);
        continue;
      }
    }
    for (int64_t l = 0; l < count; ++l) rows.run(first + l);
  }
}

template <typename Rows, typename Storage>
void run(const ProjectionCall& call, int64_t begin, int64_t end) {
  const RowUnits units = projection_units(call.layout, Rows::forward);
  const auto loop = units.way == RowUnits::tiles  ? run_tiles<Rows, Storage>
                    : units.way == RowUnits::rows ? run_rows<Rows, Storage>
                                                  : run_columns<Rows, Storage>;
  loop(call, units, begin, end);
}

template <typename Rows>
ProjectionLoop pick_loop(Dtype dtype) {
  return of_dtype(dtype, []<typename Storage>() -> ProjectionLoop { return run<Rows, Storage>; });
}

}  // namespace

ProjectionLoop projection_loop(Projection kernel, Dtype dtype) {
  switch (kernel) {
    case Projection::forward:
      return pick_loop<ForwardRows<false>>(dtype);
    case Projection::forward_weighted:
      return pick_loop<ForwardRows<true>>(dtype);
    case Projection::backward:
      return pick_loop<BackwardRows<false, false>>(dtype);
    case Projection::backward_weighted:
      return pick_loop<BackwardRows<true, false>>(dtype);
    default:
      return pick_loop<BackwardRows<true, true>>(dtype);
  }
}

}  // namespace constrained_ops::CO_LEVEL
