// The bijections onto the simplex along rows of [outer, length, inner]: rows side by side as the columns of a tile, or
// long ones by themselves.
#include <memory>

#include "bijection_rows.h"
#include "convert.h"
#include "of_dtype.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// The kinds and kernels as types, for a template argument each.
struct IlrRows {
  template <int64_t lanes, typename T>
  using Of = Ilr<lanes, T>;
};
struct StickBreakingRows {
  template <int64_t lanes, typename T>
  using Of = StickBreaking<lanes, T>;
};
template <Kernel kernel, typename Rows, typename T>
void run_rows(const Rows& rows, const BijectionRows<T>& at, T* scratch) {
  if constexpr (kernel == Kernel::forward)
    rows.forward(at, scratch);
  else if constexpr (kernel == Kernel::backward)
    rows.backward(at, scratch);
  else
    rows.double_backward(at, scratch);
}

// Per-row numbers of `count` rows, converted.
template <typename Storage, typename T>
const T* load_numbers(const void* from, int64_t first, int64_t count, T* to) {
  if (!from) return nullptr;
  read_numbers(static_cast<const Storage*>(from) + first, 1, count, to);
  return to;
}
template <typename Storage, typename T>
void store_numbers(const T* from, void* to, int64_t first, int64_t count) {
  if (!to) return;
  write_numbers(from, count, static_cast<Storage*>(to) + first, 1);
}

template <typename Kind, Kernel kernel, typename Storage>
void run_tiles(const BijectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  constexpr int64_t lanes = RowUnits::lanes;
  const int64_t size = call.layout.length;
  const RowLayout raw_layout{call.layout.outer, size - 1, call.layout.inner};
  const Tiles<T> tiles(5 + bijection_scratch + 1, size);  // the last one for the table
  const typename Kind::template Of<lanes, T> rows(size, next_above<Storage>(T(0)), tiles.at(5 + bijection_scratch));
  T h[lanes] = {}, log_det[lanes] = {};
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileRows of_x(call.layout, units, unit), of_raw(raw_layout, units, unit);
    const int64_t first =
        units.per_outer ? unit / units.per_outer * call.layout.inner + unit % units.per_outer * lanes : unit * lanes;
    const auto load = [&](const TileRows& layout, const void* from, int tile) -> const T* {
      if (!from) return nullptr;
      layout.load(static_cast<const Storage*>(from), tiles.at(tile));
      return tiles.at(tile);
    };
    const BijectionRows<T> at{load(of_raw, call.raw, 0),
                              load(of_raw, call.along_raw, 1),
                              load(of_x, call.grad_x, 2),
                              load_numbers<Storage>(call.grad_log_det, first, of_x.count, h),
                              call.x ? tiles.at(3) : nullptr,
                              call.log_det ? log_det : nullptr,
                              call.grad_raw ? tiles.at(4) : nullptr};
    run_rows<kernel>(rows, at, tiles.at(5));
    if (call.x) of_x.store(at.x, static_cast<Storage*>(call.x));
    if (call.grad_raw) of_raw.store(at.grad_raw, static_cast<Storage*>(call.grad_raw));
    store_numbers<Storage>(log_det, call.log_det, first, of_x.count);
  }
}

// One row after the other.
template <typename Kind, Kernel kernel, typename Storage>
void run_single(const BijectionCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, size, inner] = call.layout;
  const Tiles<T> memory(1, (5 + bijection_scratch + 2) * size / RowUnits::lanes + 1);
  const auto tile = [&](int i) { return memory.at(0) + i * size; };
  const typename Kind::template Of<1, T> rows(size, next_above<Storage>(T(0)), tile(5 + bijection_scratch));
  const auto load = [&](const void* from, int64_t first, int64_t count, int i) -> const T* {
    if (!from) return nullptr;
    const Storage* at = static_cast<const Storage*>(from) + first;
    if constexpr (std::is_same_v<Storage, T>)
      if (inner == 1) return at;
    read_numbers(at, inner, count, tile(i));
    return tile(i);
  };
  const auto store = [&](const T* from, void* to, int64_t first, int64_t count) {
    if (to) write_numbers(from, count, static_cast<Storage*>(to) + first, inner);
  };
  const auto run_row = [&](int64_t row) {
    const int64_t first = row / inner * size * inner + row % inner;
    const int64_t first_raw = row / inner * (size - 1) * inner + row % inner;
    T h, log_det = 0;
    const BijectionRows<T> at{load(call.raw, first_raw, size - 1, 0),
                              load(call.along_raw, first_raw, size - 1, 1),
                              load(call.grad_x, first, size, 2),
                              load_numbers<Storage>(call.grad_log_det, row, 1, &h),
                              call.x ? tile(3) : nullptr,
                              call.log_det ? &log_det : nullptr,
                              call.grad_raw ? tile(4) : nullptr};
    run_rows<kernel>(rows, at, tile(5));
    store(at.x, call.x, first, size);
    store(at.grad_raw, call.grad_raw, first_raw, size - 1);
    store_numbers<Storage>(&log_det, call.log_det, row, 1);
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t row = unit * units.rows_per_unit, last = std::min(outer, row + units.rows_per_unit);
    if (units.way == RowUnits::columns) {
      const int64_t lane = unit % units.per_outer * units.lanes;
      row = unit / units.per_outer * inner + lane;
      last = row + std::min(units.lanes, inner - lane);
    }
    for (; row < last; ++row) run_row(row);
  }
}

template <typename Kind, Kernel kernel, typename Storage>
void run(const BijectionCall& call, int64_t begin, int64_t end) {
  const RowUnits units = bijection_units(call.layout);
  const auto loop = units.way == RowUnits::tiles ? run_tiles<Kind, kernel, Storage> : run_single<Kind, kernel, Storage>;
  loop(call, units, begin, end);
}

template <typename Kind, Kernel kernel>
BijectionLoop pick_dtype(Dtype dtype) {
  return of_dtype(dtype, []<typename Storage>() -> BijectionLoop { return run<Kind, kernel, Storage>; });
}

template <typename Kind>
BijectionLoop pick_kernel(Kernel kernel, Dtype dtype) {
  switch (kernel) {
    case Kernel::forward:
      return pick_dtype<Kind, Kernel::forward>(dtype);
    case Kernel::backward:
      return pick_dtype<Kind, Kernel::backward>(dtype);
    default:
      return pick_dtype<Kind, Kernel::double_backward>(dtype);
  }
}

}  // namespace

BijectionLoop bijection_loop(Bijection kind, Kernel kernel, Dtype dtype) {
  return kind == Bijection::ilr ? pick_kernel<IlrRows>(kernel, dtype) : pick_kernel<StickBreakingRows>(kernel, dtype);
}

}  // namespace constrained_ops::CO_LEVEL
