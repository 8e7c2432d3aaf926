// Softmax along rows of [outer, length, inner], three ways, see RowUnits. Tiles of rows that follow each other are
// better done in registers where rows are of a length for that; long rows, too few side by side, are gathered first.
#include <memory>

#include "convert.h"
#include "of_dtype.h"
#include "simplex_blocks.h"
#include "simplex_columns.h"
#include "simplex_rows.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t scratch_size = 1 << 16;  // longer rows of 16-bit numbers compute their weights again

// The kernels as types, for a template argument each.
struct ForwardRows {
  template <typename T>
  using Common = T;  // the smallest positive number
  static constexpr int inputs = 1, outputs = 1;
  template <typename Block, typename T>
  static void blocks(int64_t count, int64_t length, T smallest, const T* const* in, T* const* out) {
    blocks_forward<Block>(count, length, smallest, in[0], out[0]);
  }
  template <int64_t lanes, bool tiled, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out,
                      T* const* tiles) {
    columns_forward<lanes, tiled>(length, stride, smallest, in, out, tiles);
  }
  template <Weights kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_forward<kept>(rows, length, in, out, weights, smallest);
  }
};
// given: x takes the place of raw.
template <bool given>
struct BackwardRows {
  template <typename T>
  using Common = T;
  static constexpr int inputs = 2, outputs = 1;
  template <typename Block, typename T>
  static void blocks(int64_t count, int64_t length, T, const T* const* in, T* const* out) {
    blocks_backward<given, Block>(count, length, in[0], in[1], out[0]);
  }
  template <int64_t lanes, bool tiled, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out,
                      T* const* tiles) {
    columns_backward<lanes, tiled, given>(length, stride, smallest, in, out, tiles);
  }
  template <Weights kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_backward<given ? Weights::given : kept>(rows, length, in, out, weights, smallest);
  }
};
struct DoubleBackwardRows {
  template <typename T>
  using Common = T;
  static constexpr int inputs = 3, outputs = 2;
  template <typename Block, typename T>
  static void blocks(int64_t count, int64_t length, T, const T* const* in, T* const* out) {
    blocks_double_backward<Block>(count, length, in[0], in[1], in[2], out[0], out[1]);
  }
  template <int64_t lanes, bool tiled, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out,
                      T* const* tiles) {
    columns_double_backward<lanes, tiled>(length, stride, smallest, in, out, tiles);
  }
  template <Weights kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_double_backward<kept>(rows, length, in, out, weights, smallest);
  }
};

// Tiles for columns, in a cache of the second level: longer ones would not stay there, and steps of few bytes need
// none.
template <typename Rows>
constexpr int column_tiles = std::max(Rows::inputs, 2);  // of forward one for the weights
template <typename T>
bool column_tiles_help(const RowLayout& layout) {
  constexpr int64_t largest = 256 << 10, smallest = 64 << 10;
  const int64_t step = layout.length * sizeof(T);
  return step * RowUnits::lanes <= largest && step * layout.inner > smallest;
}

// The operands of a call from an element on.
template <typename Rows, typename Storage>
struct Pointers {
  const Storage* in[Rows::inputs];
  Storage* out[Rows::outputs];

  Pointers(const RowCall& call, int64_t offset) {
    for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const Storage*>(call.inputs[i]) + offset;
    for (int i = 0; i < Rows::outputs; ++i)
      out[i] = call.outputs[i] ? static_cast<Storage*>(call.outputs[i]) + offset : nullptr;
  }
};

// Units of tiles, with rows that follow each other. Whole blocks of the compute type in place; 16-bit numbers, and what
// does not fill a block, through memory of one thread.
template <typename Rows, typename Storage>
void run_blocks(const RowCall& call, const BlockKernel<Rows, compute_t<Storage>>& kernel, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const int64_t length = call.layout.length, last = std::min(end * RowUnits::lanes, call.layout.outer);
  const T smallest = next_above<Storage>(T(0));
  int64_t row = begin * RowUnits::lanes;
  if constexpr (std::is_same_v<Storage, T>) {
    const Pointers<Rows, T> at(call, row * length);
    const int64_t count = (last - row) / kernel.rows;
    kernel.run(count, length, smallest, at.in, at.out);
    row += count * kernel.rows;
    if (row == last) return;
  }
  const Tiles<T> memory(Rows::inputs + Rows::outputs, length);
  const T* in[Rows::inputs];
  T* out[Rows::outputs];
  for (int i = 0; i < Rows::inputs; ++i) in[i] = memory.at(i);
  for (int i = 0; i < Rows::outputs; ++i) out[i] = call.outputs[i] ? memory.at(Rows::inputs + i) : nullptr;
  for (; row < last; row += RowUnits::lanes) {
    const int64_t rows = std::min(RowUnits::lanes, last - row), n = rows * length;
    const Pointers<Rows, Storage> at(call, row * length);
    for (int i = 0; i < Rows::inputs; ++i) read_numbers(at.in[i], 1, n, memory.at(i));
    kernel.run((rows + kernel.rows - 1) / kernel.rows, length, smallest, in, out);
    for (int i = 0; i < Rows::outputs; ++i)
      if (out[i]) write_numbers(out[i], n, at.out[i], 1);
  }
}

template <typename Rows, typename Storage>
void run_tiles(const RowCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const int64_t length = call.layout.length;
  const Tiles<T> tiles(Rows::inputs + Rows::outputs, length);
  const T* in[Rows::inputs];
  T *out[Rows::outputs], *const none[column_tiles<Rows>] = {};
  for (int i = 0; i < Rows::inputs; ++i) in[i] = tiles.at(i);
  for (int i = 0; i < Rows::outputs; ++i) out[i] = call.outputs[i] ? tiles.at(Rows::inputs + i) : nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileRows rows(call.layout, units, unit);
    for (int i = 0; i < Rows::inputs; ++i) rows.load(static_cast<const Storage*>(call.inputs[i]), tiles.at(i));
    Rows::template columns<tiles.lanes, false>(length, tiles.lanes, next_above<Storage>(T(0)), in, out, none);
    for (int i = 0; i < Rows::outputs; ++i)
      if (out[i]) rows.store(out[i], static_cast<Storage*>(call.outputs[i]));
  }
}

// Rows one after the other.
template <typename Rows, typename Storage>
void run_rows(const RowCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const int64_t length = call.layout.length;
  const bool in_result = std::is_same_v<Storage, T>, kept = in_result || units.rows_per_unit * length <= scratch_size;
  const std::unique_ptr<T[]> scratch(new T[kept && !in_result ? units.rows_per_unit * length : 0]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * units.rows_per_unit, offset = first * length;
    const int rows = static_cast<int>(std::min(units.rows_per_unit, call.layout.outer - first));
    const Pointers<Rows, Storage> at(call, offset);
    T* weights = scratch.get();
    if constexpr (std::is_same_v<Storage, T>) {
      for (Storage* out : at.out)
        if (out) weights = out;
    }
    const auto run = kept ? Rows::template rows<Weights::kept, Storage, T>
                          : Rows::template rows<Weights::computed_again, Storage, T>;
    run(rows, length, at.in, at.out, weights, next_above<Storage>(T(0)));
  }
}

// Rows that lie side by side: units of `lanes`, the last of an outer index of at least `fewest_lanes`, up to so many
// more. What does not fill a unit goes by fewer lanes, at the end some of them twice.
template <typename Rows, typename Storage>
void run_columns(const RowCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const T smallest = next_above<Storage>(T(0));
  const bool tiled = column_tiles_help<T>(call.layout);
  const Tiles<T> memory(column_tiles<Rows>, length, tiled ? units.lanes : fewest_lanes);
  T* tiles[column_tiles<Rows>];
  for (int i = 0; i < column_tiles<Rows>; ++i) tiles[i] = memory.at(i);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t in_outer = unit % units.per_outer,
                  last = in_outer + 1 < units.per_outer ? (in_outer + 1) * units.lanes : inner;
    for (int64_t lane = in_outer * units.lanes; lane < last;) {
      const bool whole = last - lane >= units.lanes;
      if (!whole) lane = std::min(lane, last - fewest_lanes);
      const Pointers<Rows, Storage> at(call, unit / units.per_outer * length * inner + lane);
      const auto run = !whole  ? Rows::template columns<fewest_lanes, true, Storage, T>
                       : tiled ? Rows::template columns<units.lanes, true, Storage, T>
                               : Rows::template columns<units.lanes, false, Storage, T>;
      run(length, inner, smallest, at.in, at.out, tiles);
      lane += whole ? units.lanes : fewest_lanes;
    }
  }
}

// Long rows, too few side by side for a vector: brought to where they lie one after the other.
template <typename Rows, typename Storage>
void run_gathered(const RowCall& call, const RowUnits&, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const int64_t n = length * inner;
  const std::unique_ptr<T[]> memory(new T[(Rows::inputs + Rows::outputs) * n]);
  const T* in[Rows::inputs];
  T *out[Rows::outputs], *weights = nullptr;
  for (int i = 0; i < Rows::outputs; ++i) {
    out[i] = call.outputs[i] ? memory.get() + (Rows::inputs + i) * n : nullptr;
    if (out[i]) weights = out[i];
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const Pointers<Rows, Storage> at(call, unit * n);
    for (int i = 0; i < Rows::inputs; ++i) {
      in[i] = memory.get() + i * n;
      transpose(at.in[i], inner, memory.get() + i * n, length, length, inner);
    }
    Rows::template rows<Weights::kept>(static_cast<int>(inner), length, in, out, weights, next_above<Storage>(T(0)));
    for (int i = 0; i < Rows::outputs; ++i)
      if (out[i]) transpose(out[i], length, at.out[i], inner, inner, length);
  }
}

template <typename Rows, typename Storage>
void run(const RowCall& call, int64_t begin, int64_t end) {
  const RowUnits units = softmax_units(call.layout);
  if (units.way == RowUnits::tiles && call.layout.inner == 1) {
    const auto kernel = pick_blocks<Rows, compute_t<Storage>>(call.layout.length);
    if (kernel.run) return run_blocks<Rows, Storage>(call, kernel, begin, end);
  }
  const auto loop = units.way == RowUnits::tiles       ? run_tiles<Rows, Storage>
                    : units.way == RowUnits::rows      ? run_rows<Rows, Storage>
                    : call.layout.inner < fewest_lanes ? run_gathered<Rows, Storage>
                                                       : run_columns<Rows, Storage>;
  loop(call, units, begin, end);
}

template <typename Rows>
RowLoop pick_loop(Dtype dtype) {
  return of_dtype(dtype, []<typename Storage>() -> RowLoop { return run<Rows, Storage>; });
}

}  // namespace

RowLoop softmax_loop(Kernel kernel, Dtype dtype) {
  switch (kernel) {
    case Kernel::forward:
      return pick_loop<ForwardRows>(dtype);
    case Kernel::backward:
      return pick_loop<BackwardRows<false>>(dtype);
    case Kernel::backward_from_result:
      return dtype == Dtype::float32 ? run<BackwardRows<true>, float> : run<BackwardRows<true>, double>;
    default:
      return pick_loop<DoubleBackwardRows>(dtype);
  }
}

}  // namespace constrained_ops::CO_LEVEL
