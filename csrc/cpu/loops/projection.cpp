// The projection onto the simplex along rows of [outer, length, inner], three ways:
//   short rows   a block of rows is transposed into a tile, whose columns are the rows
//   inner = 1    one row at a time
//   inner > 1    blocks of neighbouring rows, whatever their length
#include <memory>

#include "projection_steps.h"
#include "transpose.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// The kernels as types, for a template argument each. Inputs in the order of RowCall.
template <bool weighted>
struct ForwardRows {
  static constexpr int inputs = 1 + weighted, outputs = 1;
  template <typename T, typename Storage>
  CO_HD static void run(const Steps& steps, const Storage* const* in, Storage* const* out, T total, T* tops) {
    project<weighted, T>(steps, in[0], weighted ? in[inputs - 1] : nullptr, out[0], total, tops);
  }
};
template <bool weighted, bool to_weight>
struct BackwardRows {
  static constexpr int inputs = 2 + weighted + to_weight, outputs = 1 + to_weight;
  template <typename T, typename Storage>
  CO_HD static void run(const Steps& steps, const Storage* const* in, Storage* const* out, T, T*) {
    project_backward<weighted, to_weight, T>(steps, in[0], in[1], weighted ? in[1 + weighted] : nullptr,
                                             to_weight ? in[inputs - 1] : nullptr, out[0],
                                             to_weight ? out[outputs - 1] : nullptr);
  }
};

template <typename Rows, typename Storage>
void run_tiles(const ProjectionCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const int64_t lanes = RowUnits(call.layout).lanes, apart = length * lanes + 16;
  const std::unique_ptr<T[]> memory(new T[(Rows::inputs + Rows::outputs) * apart]());
  const T* in[Rows::inputs];
  T* out[Rows::outputs];
  int64_t base[RowUnits::max_lanes];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit * lanes, n = std::min(lanes, outer * inner - row);
    for (int64_t l = 0; l < n; ++l) base[l] = (row + l) / inner * length * inner + (row + l) % inner;
    for (int i = 0; i < Rows::inputs; ++i) {
      const Storage* from = static_cast<const Storage*>(call.inputs[i]);
      T* tile = memory.get() + i * apart;
      if (inner == 1)
        rows_and_tile(from + base[0], tile, length, lanes, n, true);
      else
        for (int64_t k = 0; k < length; ++k)
          for (int64_t l = 0; l < n; ++l) tile[k * lanes + l] = to_compute(from[base[l] + k * inner]);
    }
    for (int64_t first = 0; first < n; first += lanes_of<T>) {
      for (int i = 0; i < Rows::inputs; ++i) in[i] = memory.get() + i * apart + first;
      for (int i = 0; i < Rows::outputs; ++i)
        out[i] = call.outputs[i] ? memory.get() + (Rows::inputs + i) * apart + first : nullptr;
      Rows::template run<T>(Steps::side_by_side(length, lanes, lanes_of<T>), in, out, T(call.total),
                            static_cast<T*>(nullptr));
    }
    for (int i = 0; i < Rows::outputs; ++i) {
      if (!call.outputs[i]) continue;
      const T* tile = memory.get() + (Rows::inputs + i) * apart;
      Storage* to = static_cast<Storage*>(call.outputs[i]);
      if (inner == 1)
        rows_and_tile(tile, to + base[0], length, lanes, n, false);
      else
        for (int64_t k = 0; k < length; ++k)
          for (int64_t l = 0; l < n; ++l) to[base[l] + k * inner] = to_storage<Storage>(tile[k * lanes + l]);
    }
  }
}

template <typename Rows, typename Storage>
void run(const ProjectionCall& call, int64_t begin, int64_t end) {
  using T = compute_t<Storage>;
  const auto [outer, length, inner] = call.layout;
  const RowUnits units(call.layout);
  if (units.tiles) return run_tiles<Rows, Storage>(call, begin, end);
  const Steps along = Steps::along<T>(length);
  const std::unique_ptr<T[]> tops(new T[blocks_of(along)]);
  const Storage* in[Rows::inputs];
  Storage* out[Rows::outputs];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t lane = unit % units.per_outer * units.lanes;
    for (int64_t first = lane; first < std::min(inner, lane + units.lanes); first += lanes_of<T>) {
      const int64_t offset = unit / units.per_outer * length * inner + first;
      for (int i = 0; i < Rows::inputs; ++i) in[i] = static_cast<const Storage*>(call.inputs[i]) + offset;
      for (int i = 0; i < Rows::outputs; ++i)
        out[i] = call.outputs[i] ? static_cast<Storage*>(call.outputs[i]) + offset : nullptr;
      const int lanes = static_cast<int>(std::min<int64_t>(lanes_of<T>, inner - first));
      if (inner == 1)
        Rows::template run<T>(along, in, out, T(call.total), Rows::inputs == 1 ? tops.get() : nullptr);
      else
        Rows::template run<T>(Steps::side_by_side(length, inner, lanes), in, out, T(call.total),
                              static_cast<T*>(nullptr));
    }
  }
}

template <typename Rows>
ProjectionLoop pick_loop(Dtype dtype) {
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
