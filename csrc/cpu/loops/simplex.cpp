// Softmax along rows of [outer, length, inner], three ways:
//   short rows   a block of rows is transposed into a tile, whose columns are the rows
//   inner = 1    one row at a time
//   inner > 1    blocks of neighbouring rows, whatever their length
#include <memory>

#include "simplex_columns.h"
#include "simplex_rows.h"
#include "transpose.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t scratch_size = 1 << 16;  // weights exp(raw - largest) are kept up to here, and computed again beyond

// The three kernels as types, for a template argument each.
struct ForwardRows {
  static constexpr int inputs = 1, outputs = 1;
  template <bool kept, typename... Args>
  static void columns(Args... args) {
    columns_forward<kept>(args...);
  }
  template <bool kept, typename... Args>
  static void row(Args... args) {
    row_forward<kept>(args...);
  }
};
struct BackwardRows {
  static constexpr int inputs = 2, outputs = 1;
  template <bool kept, typename... Args>
  static void columns(Args... args) {
    columns_backward<kept>(args...);
  }
  template <bool kept, typename... Args>
  static void row(Args... args) {
    row_backward<kept>(args...);
  }
};
struct DoubleBackwardRows {
  static constexpr int inputs = 3, outputs = 2;
  template <bool kept, typename... Args>
  static void columns(Args... args) {
    columns_double_backward<kept>(args...);
  }
  template <bool kept, typename... Args>
  static void row(Args... args) {
    row_double_backward<kept>(args...);
  }
};

// Tiles [length][lanes] of the compute type, one for each operand and the weights, in memory of one thread.
template <typename Rows, typename T>
struct Tiles {
  static constexpr int count = Rows::inputs + Rows::outputs + 1;
  const int64_t length, lanes, apart;  // a line more than a tile apart: cache sets are few
  const std::unique_ptr<T[]> memory;

  Tiles(int64_t length, int64_t lanes)
      : length(length), lanes(lanes), apart(length * lanes + 16), memory(new T[count * apart]) {}
  T* at(int tile) const { return memory.get() + tile * apart; }
};

// `n` rows of [outer, length, inner], the first of them `begin`, through the tiles' columns.
template <typename Rows, typename Storage, typename T>
void run_tiles(const RowCall& call, int64_t begin, int64_t n, const Tiles<Rows, T>& tiles) {
  const int64_t length = tiles.length, lanes = tiles.lanes, inner = call.layout.inner;
  const int64_t first = begin / inner * length * inner + begin % inner;
  int64_t base[max_lanes];  // of each row's first element
  if (inner > 1)
    for (int64_t l = 0; l < n; ++l) base[l] = (begin + l) / inner * length * inner + (begin + l) % inner;

  const T* in[Rows::inputs];
  for (int i = 0; i < Rows::inputs; ++i) {
    const Storage* from = static_cast<const Storage*>(call.inputs[i]);
    T* tile = tiles.at(i);
    in[i] = tile;
    if (inner == 1)
      rows_and_tile(from + first, tile, length, lanes, n, true);
    else
      for (int64_t k = 0; k < length; ++k)
        for (int64_t l = 0; l < n; ++l) tile[k * lanes + l] = to_compute(from[base[l] + k * inner]);
  }
  T* out[Rows::outputs];
  for (int i = 0; i < Rows::outputs; ++i) out[i] = call.outputs[i] ? tiles.at(Rows::inputs + i) : nullptr;
  Rows::template columns<true>(Columns{length, lanes, n}, in, out, tiles.at(tiles.count - 1),
                               next_above<Storage>(T(0)));
  for (int i = 0; i < Rows::outputs; ++i) {
    if (!out[i]) continue;
    Storage* to = static_cast<Storage*>(call.outputs[i]);
    if (inner == 1)
      rows_and_tile(out[i], to + first, length, lanes, n, false);
    else
      for (int64_t k = 0; k < length; ++k)
        for (int64_t l = 0; l < n; ++l) to[base[l] + k * inner] = to_storage<Storage>(out[i][k * lanes + l]);
  }
}

template <typename Rows, typename Storage>
void run(const RowCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const T smallest = next_above<Storage>(T(0));
  const RowUnits units(call.layout);
  if (units.tiles) {
    const Tiles<Rows, T> tiles(length, units.lanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * units.lanes;
      run_tiles<Rows, Storage>(call, first, std::min(units.lanes, outer * inner - first), tiles);
    }
    return;
  }
  const bool kept = length * std::min(inner, max_lanes) <= scratch_size;
  const std::unique_ptr<T[]> scratch(new T[kept ? scratch_size : 0]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t lane = unit % units.per_outer * max_lanes;
    const int64_t offset = unit / units.per_outer * length * inner + lane;
    const Storage* in[Rows::inputs];
    for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const Storage*>(call.inputs[i]) + offset;
    Storage* out[Rows::outputs];
    for (int i = 0; i < Rows::outputs; ++i)
      out[i] = call.outputs[i] ? static_cast<Storage*>(call.outputs[i]) + offset : nullptr;
    const Columns columns{length, inner, std::min(max_lanes, inner - lane)};
    if (inner == 1)
      kept ? Rows::template row<true>(length, in, out, scratch.get(), smallest)
           : Rows::template row<false>(length, in, out, scratch.get(), smallest);
    else
      kept ? Rows::template columns<true>(columns, in, out, scratch.get(), smallest)
           : Rows::template columns<false>(columns, in, out, scratch.get(), smallest);
  }
}

template <typename Rows>
RowLoop pick_loop(Dtype dtype) {
  switch (dtype) {
    case Dtype::half:
      return run<Rows, Half>;
    case Dtype::bfloat16:
      return run<Rows, BFloat16>;
    case Dtype::float32:
      return run<Rows, float>;
    default:
      return run<Rows, double>;
  }
}

}  // namespace

RowLoop softmax_loop(Kernel kernel, Dtype dtype) {
  switch (kernel) {
    case Kernel::forward:
      return pick_loop<ForwardRows>(dtype);
    case Kernel::backward:
      return pick_loop<BackwardRows>(dtype);
    default:
      return pick_loop<DoubleBackwardRows>(dtype);
  }
}

}  // namespace constrained_ops::CO_LEVEL
