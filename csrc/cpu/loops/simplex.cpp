// Softmax along rows of [outer, length, inner], three ways; see RowUnits.
#include <memory>

#include "simplex_columns.h"
#include "simplex_rows.h"
#include "tiles.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int64_t scratch_size = 1 << 16;  // longer rows of 16-bit numbers compute their weights again

// The three kernels as types, for a template argument each.
struct ForwardRows {
  static constexpr int inputs = 1, outputs = 1;
  template <int64_t lanes, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out) {
    columns_forward<lanes>(length, stride, smallest, in[0], out[0]);
  }
  template <bool kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_forward<kept>(rows, length, in, out, weights, smallest);
  }
};
struct BackwardRows {
  static constexpr int inputs = 2, outputs = 1;
  template <int64_t lanes, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out) {
    columns_backward<lanes>(length, stride, smallest, in[0], in[1], out[0]);
  }
  template <bool kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_backward<kept>(rows, length, in, out, weights, smallest);
  }
};
struct DoubleBackwardRows {
  static constexpr int inputs = 3, outputs = 2;
  template <int64_t lanes, typename Storage, typename T>
  static void columns(int64_t length, int64_t stride, T smallest, const Storage* const* in, Storage* const* out) {
    columns_double_backward<lanes>(length, stride, smallest, in[0], in[1], in[2], out[0], out[1]);
  }
  template <bool kept, typename Storage, typename T>
  static void rows(int rows, int64_t length, const Storage* const* in, Storage* const* out, T* weights, T smallest) {
    rows_double_backward<kept>(rows, length, in, out, weights, smallest);
  }
};

template <typename Rows, typename Storage>
void run_tiles(const RowCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const Tiles<T> tiles(Rows::inputs + Rows::outputs, call.layout.length);
  const T* in[Rows::inputs];
  T* out[Rows::outputs];
  for (int i = 0; i < Rows::inputs; ++i) in[i] = tiles.at(i);
  for (int i = 0; i < Rows::outputs; ++i) out[i] = call.outputs[i] ? tiles.at(Rows::inputs + i) : nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const TileRows rows(call.layout, units, unit);
    for (int i = 0; i < Rows::inputs; ++i) rows.load(static_cast<const Storage*>(call.inputs[i]), tiles.at(i));
    Rows::template columns<tiles.lanes>(tiles.length, tiles.lanes, next_above<Storage>(T(0)), in, out);
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
    const Storage* in[Rows::inputs];
    Storage *out[Rows::outputs], *last = nullptr;
    for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const Storage*>(call.inputs[i]) + offset;
    for (int i = 0; i < Rows::outputs; ++i) {
      out[i] = call.outputs[i] ? static_cast<Storage*>(call.outputs[i]) + offset : nullptr;
      if (out[i]) last = out[i];
    }
    T* weights = scratch.get();
    if constexpr (std::is_same_v<Storage, T>) weights = last;
    const auto run = kept ? Rows::template rows<true, Storage, T> : Rows::template rows<false, Storage, T>;
    run(rows, length, in, out, weights, next_above<Storage>(T(0)));
  }
}

// Long rows that lie side by side.
template <typename Rows, typename Storage>
void run_columns(const RowCall& call, const RowUnits& units, int64_t begin, int64_t end) {
  const auto [outer, length, inner] = call.layout;
  const auto smallest = next_above<Storage>(compute_t<Storage>(0));
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t lane = unit % units.per_outer * units.lanes;
    const int64_t count = std::min(units.lanes, inner - lane);
    for (const int64_t last = lane + count; lane < last; lane += count < units.lanes ? 1 : count) {
      const int64_t offset = unit / units.per_outer * length * inner + lane;
      const Storage* in[Rows::inputs];
      Storage* out[Rows::outputs];
      for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const Storage*>(call.inputs[i]) + offset;
      for (int i = 0; i < Rows::outputs; ++i)
        out[i] = call.outputs[i] ? static_cast<Storage*>(call.outputs[i]) + offset : nullptr;
      const auto run = count == units.lanes ? Rows::template columns<units.lanes, Storage, compute_t<Storage>>
                                            : Rows::template columns<1, Storage, compute_t<Storage>>;
      run(length, inner, smallest, in, out);
    }
  }
}

template <typename Rows, typename Storage>
void run(const RowCall& call, int64_t begin, int64_t end) {
  const RowUnits units = softmax_units(call.layout);
  const auto loop = units.way == RowUnits::tiles  ? run_tiles<Rows, Storage>
                    : units.way == RowUnits::rows ? run_rows<Rows, Storage>
                                                  : run_columns<Rows, Storage>;
  loop(call, units, begin, end);
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
