// Kernels over the rows of [outer, length, inner]. A program says what is computed (simplex.cuh); here is who reads
// what: a group of threads (reduce.cuh) takes a row, each thread `items` numbers of it, `vector` neighbours at a time.
//
// A program has `inputs` and `results` (result k takes the place of input k) and works on values[inputs][items], with
// `padding(k)` where a row has ended; it is `heavy` if that leaves it too few registers:
//   whole(group, values)             rows that are all in registers, several at a time
//   State, add(state, values)              rows in parts: what one part adds to the state of the row
//   Known, know(state)                     ... what follows from the state of the whole row
//   Extra, extend(known, extra, values)    ... what another reading of a part adds, if `rereads`
//   again(known, extra)                    ... and whether one more reading has to follow
//   finish(known, extra, values)           the results of a part
#pragma once

#include <cuda_runtime.h>

#include "../math/storage.h"
#include "indexing.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "storage.cuh"

namespace constrained_ops {

struct Rows {
  int64_t count, length;
  Divider inner;

  Rows(int64_t outer, int64_t length, int64_t inner) : count(outer * inner), length(length), inner(inner) {}
};

template <typename Program, typename Storage>
struct RowOperands {
  const Storage* in[Program::inputs];
  Storage* out[Program::results];  // null: not wanted
};

// A row, or what is left of it: `length` items, `step` apart. A thread without one has length 0.
struct Row {
  int64_t first, step, length;

  template <typename Group>
  __device__ __forceinline__ static Row at(const Rows& rows, const Group& group, int64_t row) {
    const int64_t length = row < rows.count && group.takes_part() ? rows.length : 0;
    if constexpr (Group::contiguous) {
      return {row * rows.length, 1, length};
    } else {
      const int64_t outer = rows.inner.quotient(row), inner = rows.inner.size;
      return {outer * rows.length * inner + (row - outer * inner), inner, length};
    }
  }

  __device__ __forceinline__ Row from(int64_t start) const { return {first + start * step, step, length - start}; }

  // How many of the next `capacity` items there are, or fewer than none.
  __device__ __forceinline__ int count(int capacity) const {
    return length < capacity ? static_cast<int>(length) : capacity;
  }
};

template <int vector, typename Program, typename Storage, typename Group, typename T, int items>
__device__ __forceinline__ void load_items(const RowOperands<Program, Storage>& operands, const Row& row,
                                           const Group& group, T (&values)[Program::inputs][items]) {
  const int count = row.count(group.capacity(items));
#pragma unroll
  for (int k = 0; k < Program::inputs; ++k) {
#pragma unroll
    for (int i = 0; i < items; i += vector) {
      const int item = group.template item<items, vector>(i);
      const Storage* p = operands.in[k] + row.first + item * row.step;
      if (item >= count) {
#pragma unroll
        for (int j = 0; j < vector; ++j) values[k][i + j] = Program::padding(k);
      } else if constexpr (vector == 1) {
        values[k][i] = load(p);
      } else {
        load_vector(p).unpack(&values[k][i]);
      }
    }
  }
}

template <int vector, typename Program, typename Storage, typename Group, typename T, int items>
__device__ __forceinline__ void store_items(const RowOperands<Program, Storage>& operands, const Row& row,
                                            const Group& group, const T (&values)[Program::inputs][items]) {
  const int count = row.count(group.capacity(items));
#pragma unroll
  for (int k = 0; k < Program::results; ++k) {
    if (operands.out[k] == nullptr) continue;
#pragma unroll
    for (int i = 0; i < items; i += vector) {
      const int item = group.template item<items, vector>(i);
      if (item >= count) continue;
      Storage* p = operands.out[k] + row.first + item * row.step;
      if constexpr (vector == 1) {
        store(p, values[k][i]);
      } else {
        store_vectors<vector>(p, &values[k][i]);
      }
    }
  }
}

// Launch bounds name one block per multiprocessor: left to itself, the compiler spills to reach one block more.

// Rows that their group holds in registers: read once, written once. A thread takes a share in `batch` rows at a time,
// to have enough loads under way where rows are short.
template <int threads, int items, int vector, int batch, typename Program, typename Storage, typename Group>
__global__ void __launch_bounds__(threads, 1)
    row_kernel(const RowOperands<Program, Storage> operands, const Rows rows, Group group, const Program program) {
  const int64_t tile = int64_t(group.rows()) * batch;
  for (int64_t start = blockIdx.x * tile; start < rows.count; start += gridDim.x * tile) {
    compute_t<Storage> values[batch][Program::inputs][items];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const Row row = Row::at(rows, group, start + b * group.rows() + group.row());
      load_items<vector>(operands, row, group, values[b]);
    }
    program.whole(group, values);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const Row row = Row::at(rows, group, start + b * group.rows() + group.row());
      store_items<vector>(operands, row, group, values[b]);
    }
  }
}

// Rows of any length, in parts: read again for the results, out of the L2 cache as long as that holds the rows in work.
template <int threads, int items, int vector, typename Program, typename Storage, typename Group>
__global__ void __launch_bounds__(threads, 1)
    long_row_kernel(const RowOperands<Program, Storage> operands, const Rows rows, Group group, const Program program) {
  const int part = group.capacity(items);
  for (int64_t start = blockIdx.x * int64_t(group.rows()); start < rows.count;
       start += gridDim.x * int64_t(group.rows())) {
    const Row row = Row::at(rows, group, start + group.row());
    compute_t<Storage> values[Program::inputs][items];
    typename Program::State state[1] = {Program::State::none()};
    typename Program::Extra extra[1] = {Program::Extra::none()};
    for (int64_t at = 0; at < rows.length; at += part) {
      load_items<vector>(operands, row.from(at), group, values);
      program.add(state[0], values);
    }
    group.merge(state);
    typename Program::Known known = program.know(state[0]);
    if constexpr (Program::rereads) {
      do {
        extra[0] = Program::Extra::none();
        for (int64_t at = 0; at < rows.length; at += part) {
          load_items<vector>(operands, row.from(at), group, values);
          program.extend(known, extra[0], values);
        }
        group.merge(extra);
      } while (group.any(program.again(known, extra[0])));
    }
    for (int64_t at = 0; at < rows.length; at += part) {
      load_items<vector>(operands, row.from(at), group, values);
      program.finish(known, extra[0], values);
      store_items<vector>(operands, row.from(at), group, values);
    }
  }
}

// --- Launchers ------------------------------------------------------------------------------------------------------

constexpr int lane_threads = 256, column_threads = 512, block_threads = 1024;

// How many numbers of each operand a thread holds, for occupancy and at most, as the registers allow.
template <typename Storage>
constexpr int few_items = 32 / static_cast<int>(sizeof(compute_t<Storage>));
template <typename Program, typename Storage>
constexpr int most_items = (Program::inputs < 3 && !Program::heavy ? 2 : 1) * few_items<Storage>;

inline int round_up_to_power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <typename Program>
constexpr int state_bytes(bool in_parts) {
  return static_cast<int>(in_parts ? std::max(sizeof(typename Program::State), sizeof(typename Program::Extra))
                                   : sizeof(typename Program::Part));
}

template <int vector, int items, int batch, int width, typename Program, typename Storage>
void launch_lanes(const Queue& queue, const RowOperands<Program, Storage>& operands, const Rows& rows,
                  const Program& program) {
  const LaneGroup<width> group{width > 0 ? width : round_up_to_power_of_two(divide_up(rows.length, items))};
  const int64_t blocks = divide_up(rows.count, int64_t(lane_threads / group.width()) * batch);
  launch(queue, Grid(limit_blocks(blocks, lane_threads, queue), lane_threads),
         row_kernel<lane_threads, items, vector, batch, Program, Storage, LaneGroup<width>>, operands, rows, group,
         program);
}

template <int vector, int items, typename Program, typename Storage>
void launch_blocks(const Queue& queue, const RowOperands<Program, Storage>& operands, const Rows& rows,
                   const Program& program) {
  const int threads = static_cast<int>(divide_up(rows.length, items * warp_size)) * warp_size;
  const BlockGroup group(threads, state_bytes<Program>(false));
  launch(queue, Grid(limit_blocks(rows.count, threads, queue), threads, group.shared_bytes()),
         row_kernel<block_threads, items, vector, 1, Program, Storage, BlockGroup>, operands, rows, group, program);
}

// Rows that are contiguous. `vector` is 1, or the length of a vector where rows and pointers are multiples of it.
template <int vector, typename Program, typename Storage>
void launch_contiguous(const Queue& queue, const RowOperands<Program, Storage>& operands, const Rows& rows,
                       const Program& program) {
  constexpr int least = vector == 1 ? 4 : vector, few = few_items<Storage>, most = most_items<Program, Storage>;
  const int64_t length = rows.length;
  if (vector == 1 && length <= warp_size) return launch_lanes<1, 1, 4, 0>(queue, operands, rows, program);
  if (length <= least * warp_size) return launch_lanes<vector, least, 2, 0>(queue, operands, rows, program);
  if constexpr (few > least) {
    if (length <= few * warp_size) return launch_lanes<vector, few, 1, warp_size>(queue, operands, rows, program);
  }
  if (length <= few * block_threads) return launch_blocks<vector, few>(queue, operands, rows, program);
  if constexpr (most > few) {
    if (length <= most * block_threads) return launch_blocks<vector, most>(queue, operands, rows, program);
  }
  constexpr bool few_registers = sizeof(compute_t<Storage>) == 8 || Program::heavy;
  constexpr int threads = few_registers ? block_threads / 2 : block_threads;
  const BlockGroup group(threads, state_bytes<Program>(true));
  launch(queue, Grid(limit_blocks(rows.count, threads, queue), threads, group.shared_bytes()),
         long_row_kernel<threads, few, vector, Program, Storage, BlockGroup>, operands, rows, group, program);
}

// As many columns as there are threads for; whole lines of neighbours where rows are few.
inline ColumnGroup column_group(const Rows& rows, int lines, int threads, int state_bytes) {
  const int64_t inner = rows.inner.size, most = threads / lines;
  const int64_t columns = lines == 1 || inner >= most ? most : most / inner * inner;
  return {static_cast<int>(columns), lines, state_bytes};
}

// Rows with inner > 1 between their items.
template <typename Program, typename Storage>
void launch_columns(const Queue& queue, const RowOperands<Program, Storage>& operands, const Rows& rows,
                    const Program& program) {
  constexpr int items = most_items<Program, Storage>;
  constexpr int sector = 32 / static_cast<int>(sizeof(Storage));  // fewer neighbours would waste what is read
  const int64_t side_by_side = std::min<int64_t>(rows.inner.size, sector);
  const int64_t lines = divide_up(rows.length, items);
  if (lines * side_by_side <= column_threads && round_up_to_power_of_two(lines) * side_by_side <= column_threads) {
    const int threads = lines <= 8 ? column_threads / 2 : column_threads;
    const auto group = column_group(rows, round_up_to_power_of_two(lines), threads, state_bytes<Program>(false));
    launch(queue,
           Grid(limit_blocks(divide_up(rows.count, group.columns), group.threads(), queue), group.threads(),
                group.shared_bytes()),
           row_kernel<column_threads, items, 1, 1, Program, Storage, ColumnGroup>, operands, rows, group, program);
  } else {
    constexpr bool crowded = Program::heavy || (Program::rereads && Program::inputs > 2);
    constexpr int few = few_items<Storage> / (crowded ? 2 : 1);
    const int columns = round_up_to_power_of_two(std::min<int64_t>(rows.inner.size, warp_size));
    const auto group = column_group(rows, column_threads / columns, column_threads, state_bytes<Program>(true));
    launch(queue,
           Grid(limit_blocks(divide_up(rows.count, group.columns), group.threads(), queue), group.threads(),
                group.shared_bytes()),
           long_row_kernel<column_threads, few, 1, Program, Storage, ColumnGroup>, operands, rows, group, program);
  }
}

template <typename Program, typename Storage>
void launch_rows(const Queue& queue, const RowOperands<Program, Storage>& operands, const Rows& rows,
                 const Program& program) {
  if (rows.length == 1) return launch_contiguous<1>(queue, operands, Rows(rows.count, 1, 1), program);
  if (rows.inner.size > 1) return launch_columns(queue, operands, rows, program);
  if constexpr (sizeof(Storage) < 8) {  // two doubles already fill a transaction
    bool vectors = rows.length % vector_length<Storage> == 0;
    for (const Storage* p : operands.in) vectors = vectors && is_aligned(p);
    for (const Storage* p : operands.out) vectors = vectors && is_aligned(p);
    if (vectors) return launch_contiguous<vector_length<Storage>>(queue, operands, rows, program);
  }
  launch_contiguous<1>(queue, operands, rows, program);
}

}  // namespace constrained_ops
