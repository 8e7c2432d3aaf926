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

// Rows [begin, begin + n) of [outer, length, inner] as a tile of [length][max_lanes] of the compute type.
template <typename Rows, typename Storage>
void run_tile(const RowCall& call, int64_t begin, int64_t n, compute_t<Storage>* tiles) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const int64_t tile_size = length * max_lanes;
  int64_t base[max_lanes];  // of each row's first element
  for (int64_t l = 0; l < n; ++l) base[l] = (begin + l) / inner * length * inner + (begin + l) % inner;
  const T* in[Rows::inputs];
  for (int i = 0; i < Rows::inputs; ++i, tiles += tile_size) {
    const Storage* from = static_cast<const Storage*>(call.inputs[i]);
    in[i] = tiles;
    if (inner == 1) {
      rows_and_tile(from + base[0], tiles, length, max_lanes, n, true);
      continue;
    }
    for (int64_t k = 0; k < length; ++k)
      for (int64_t l = 0; l < n; ++l) tiles[k * max_lanes + l] = to_compute(from[base[l] + k * inner]);
  }
  T* out[Rows::outputs];
  for (int i = 0; i < Rows::outputs; ++i, tiles += tile_size) out[i] = call.outputs[i] ? tiles : nullptr;
  Rows::template columns<true>(Columns{length, max_lanes, n}, in, out, tiles, next_above<Storage>(T(0)));
  for (int i = 0; i < Rows::outputs; ++i) {
    if (!out[i]) continue;
    Storage* to = static_cast<Storage*>(call.outputs[i]);
    if (inner == 1) {
      rows_and_tile(out[i], to + base[0], length, max_lanes, n, false);
      continue;
    }
    for (int64_t k = 0; k < length; ++k)
      for (int64_t l = 0; l < n; ++l) to[base[l] + k * inner] = to_storage<Storage>(out[i][k * max_lanes + l]);
  }
}

template <typename Rows, typename Storage>
void run(const RowCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const T smallest = next_above<Storage>(T(0));
  const RowUnits units(call.layout);
  if (units.tiles) {
    const auto tiles = std::make_unique<T[]>((Rows::inputs + Rows::outputs + 1) * length * max_lanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * max_lanes;
      run_tile<Rows, Storage>(call, first, std::min(max_lanes, outer * inner - first), tiles.get());
    }
    return;
  }
  const bool kept = length * std::min(inner, max_lanes) <= scratch_size;
  const auto scratch = std::make_unique<T[]>(kept ? scratch_size : 0);
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
