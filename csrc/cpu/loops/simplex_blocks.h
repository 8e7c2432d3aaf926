// Softmax of short rows that follow each other in memory, a block of them in registers. A row of at least a vector's
// length is some vectors, the last of which overlaps the one before; a shorter one, if of a power of two, is part of a
// vector. In between, half a vector of AVX-512 is one.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../../math/simplex.h"
#include "vectors.h"

namespace constrained_ops::CO_LEVEL {
namespace {

constexpr int block_vectors = 8;  // at most
constexpr int longest_in_registers = 64;
constexpr int block_vector_bytes = std::max(32, vector_bytes);
template <typename T>
constexpr int vector_lanes = block_vector_bytes / sizeof(T);

// The most groups of a block: a tile has to hold its rows.
template <typename T, int part>
constexpr int most_groups = std::min(block_vectors, static_cast<int>(RowUnits::lanes) * part / vector_lanes<T>);

// Numbers of some rows. It is copied by whole vectors: a copy in smaller pieces, as a compiler makes it of an array,
// would hold up the vector loads that follow.
// part: how many lanes of a vector belong to one row. per_row: how many vectors do.
template <typename T, int part_, int per_row_, int groups_ = most_groups<T, part_> / per_row_,
          int lanes_ = vector_lanes<T>>
class Block {
 public:
  static constexpr int lanes = lanes_, part = part_, per_row = per_row_;
  static constexpr int groups = groups_;  // of per_row vectors: one row, or lanes / part of them
  static constexpr int vectors = groups * per_row, size = vectors * lanes;
  static constexpr int rows = groups * (lanes / part);
  static_assert(rows <= RowUnits::lanes);

  CO_HD Block() {}
  CO_HD Block(const Block& other) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) vector_[v] = other.vector_[v];
  }
  CO_HD Block(const T* from, int64_t length) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) vector_[v] = *reinterpret_cast<const Unaligned*>(from + start(v, length));
  }
  CO_HD Block& operator=(const Block& other) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) vector_[v] = other.vector_[v];
    return *this;
  }
  // Zeros where a vector overlaps the one before: in sums these numbers are to count once.
  CO_HD void clear_overlap(int64_t length) {
    if constexpr (part == lanes) clear_lanes(length, std::make_integer_sequence<int, lanes>());
  }
  CO_HD void store(T* to, int64_t length) const {
#pragma GCC unroll 8
    for (int v = vectors - 1; v >= 0; --v) *reinterpret_cast<Unaligned*>(to + start(v, length)) = vector_[v];
  }

  CO_HD void clear() {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) vector_[v] = Vector{};
  }
  CO_HD void add(const T* numbers) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) vector_[v] += *reinterpret_cast<const Unaligned*>(numbers + v * lanes);
  }
  CO_HD T sum() const {
    Vector all = vector_[0];
#pragma GCC unroll 8
    for (int v = 1; v < vectors; ++v) all += vector_[v];
    return within<part>(all, Plus())[0];
  }

  CO_HD T& operator[](int i) { return reinterpret_cast<T*>(vector_)[i]; }
  CO_HD const T& operator[](int i) const { return reinterpret_cast<const T*>(vector_)[i]; }

  // Every number becomes the first of its row.
  CO_HD Block row_heads() const {
    Block result;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      result.vector_[v] = heads(vector_[v / per_row * per_row], std::make_integer_sequence<int, lanes>());
    return result;
  }

  // Every number becomes that of its whole row.
  template <typename Combine>
  CO_HD Block along_rows(Combine combine) const {
    Block result;
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      Vector all = vector_[g * per_row];
#pragma GCC unroll 8
      for (int v = 1; v < per_row; ++v) all = combine(all, vector_[g * per_row + v]);
      all = within<part>(all, combine);
#pragma GCC unroll 8
      for (int v = 0; v < per_row; ++v) result.vector_[g * per_row + v] = all;
    }
    return result;
  }

 private:
  static constexpr int bytes = lanes * sizeof(T);
  typedef T Vector __attribute__((vector_size(bytes), may_alias));
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int Mask __attribute__((vector_size(bytes)));
  Vector vector_[vectors];

  CO_HD static int64_t start(int v, int64_t length) {
    if constexpr (part < lanes) return v * lanes;
    const int in_row = v % per_row;
    return v / per_row * length + (in_row == per_row - 1 ? length - lanes : in_row * lanes);
  }

  template <int... lane>
  CO_HD void clear_lanes(int64_t length, std::integer_sequence<int, lane...>) {
    const Mask index = {lane...};
    const Mask overlap = index < static_cast<Int>(per_row * lanes - length);
#pragma GCC unroll 8
    for (int v = per_row - 1; v < vectors; v += per_row) vector_[v] = overlap ? Vector{} : vector_[v];
  }

  template <int... lane>
  CO_HD static Vector heads(Vector v, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(v, v, (lane / part * part)...);
  }
};

// By vectors of the block's size: a wider one would wait for what was stored in two halves.
#define CO_EACH _Pragma("omp simd simdlen(Block::lanes)") for (int i = 0; i < Block::size; ++i)

// v less its mean over a row, in which each number counts by its weight, and the sum of weights is 1 / inverse. The
// mean is taken of differences from a first mean, so that it keeps its digits where one weight is nearly all; that one
// of differences from a number of the row, so that equal numbers have exactly their mean.
template <typename Block>
CO_HD Block block_centered(const Block& weight, const Block& inverse, const Block& v) {
  const Block head = v.row_heads();
  Block centered, product;
  CO_EACH product[i] = weight[i] * (v[i] - head[i]);
  Block sum = product.along_rows(Plus());
  CO_EACH centered[i] = v[i] - (head[i] + sum[i] * inverse[i]);
  CO_EACH product[i] = weight[i] * centered[i];
  sum = product.along_rows(Plus());
  CO_EACH centered[i] -= sum[i] * inverse[i];
  return centered;
}

template <typename Block>
CO_HD void block_weights(const Block& raw, int64_t length, Block& weight, Block& inverse) {
  const Block largest = raw.along_rows(Larger());
  CO_EACH weight[i] = softmax_lifted_weight(raw[i], largest[i]);
  weight.clear_overlap(length);
  const Block sum = weight.along_rows(Plus());
  CO_EACH inverse[i] = 1 / sum[i];
}

// Each kernel takes `count` blocks of rows.
template <typename Block, typename T>
[[gnu::noinline]] void blocks_forward(int64_t count, int64_t length, T smallest, const T* __restrict raw,
                                      T* __restrict x) {
  for (int64_t at = 0; at < count * Block::rows * length; at += Block::rows * length) {
    const Block r(raw + at, length);
    Block weight, inverse, result;
    block_weights(r, length, weight, inverse);
    CO_EACH result[i] = softmax_value(r[i], weight[i], inverse[i], smallest);
    result.store(x + at, length);
  }
}

// given: `raw` holds x.
template <bool given, typename Block, typename T>
[[gnu::noinline]] void blocks_backward(int64_t count, int64_t length, const T* __restrict raw,
                                       const T* __restrict grad_x, T* __restrict grad_raw) {
  for (int64_t at = 0; at < count * Block::rows * length; at += Block::rows * length) {
    const Block r(raw + at, length);
    Block weight = r, inverse, result;
    if constexpr (given) {
      weight.clear_overlap(length);
      CO_EACH inverse[i] = 1;
    } else {
      block_weights(r, length, weight, inverse);
    }
    const Block g = block_centered(weight, inverse, Block(grad_x + at, length));
    CO_EACH result[i] = weight[i] * inverse[i] * g[i];
    result.store(grad_raw + at, length);
  }
}

// Either result may be null.
template <typename Block, typename T>
[[gnu::noinline]] void blocks_double_backward(int64_t count, int64_t length, const T* __restrict raw,
                                              const T* __restrict along, const T* __restrict grad_x,
                                              T* __restrict for_g, T* __restrict for_raw) {
  for (int64_t at = 0; at < count * Block::rows * length; at += Block::rows * length) {
    const Block r(raw + at, length);
    Block weight, inverse, result;
    block_weights(r, length, weight, inverse);
    const Block a = block_centered(weight, inverse, Block(along + at, length));
    const Block g = block_centered(weight, inverse, Block(grad_x + at, length));
    if (for_g) {
      CO_EACH result[i] = weight[i] * inverse[i] * a[i];
      result.store(for_g + at, length);
    }
    if (for_raw) {
      Block product, sum;
      CO_EACH product[i] = a[i] * g[i];
      CO_EACH result[i] = weight[i] * product[i];
      sum = result.along_rows(Plus());
      CO_EACH result[i] = weight[i] * inverse[i] * (product[i] - sum[i] * inverse[i]);
      result.store(for_raw + at, length);
    }
  }
}

#undef CO_EACH

// The kernel of `Rows` for rows of `length`, and how many rows it takes at a time; null if there is none. What all rows
// have in common it takes as Rows::Common<T>.
template <typename Rows, typename T>
struct BlockKernel {
  void (*run)(int64_t count, int64_t length, typename Rows::template Common<T> common, const T* const* in,
              T* const* out);
  int rows;
};
template <typename Rows, typename Block, typename T>
BlockKernel<Rows, T> block_kernel() {
  return {Rows::template blocks<Block, T>, Block::rows};
}
template <typename Rows, typename T, int per_row = 1>
BlockKernel<Rows, T> pick_vectors(int64_t length) {
  constexpr int lanes = vector_lanes<T>;
  if (length <= per_row * lanes) return block_kernel<Rows, Block<T, lanes, per_row>, T>();
  if constexpr (per_row < block_vectors && per_row * lanes < longest_in_registers)
    return pick_vectors<Rows, T, per_row + 1>(length);
  return {};
}
template <typename Rows, typename T>
BlockKernel<Rows, T> pick_blocks(int64_t length) {
  constexpr int lanes = vector_lanes<T>, half = lanes / 2;
  if (length == 2) return block_kernel<Rows, Block<T, 2, 1>, T>();
  if (length == 4) return block_kernel<Rows, Block<T, 4, 1>, T>();
  if constexpr (block_vector_bytes == 64) {
    if (length == half) return block_kernel<Rows, Block<T, half, 1>, T>();
    if (half < length && length < lanes) return block_kernel<Rows, Block<T, half, 2, block_vectors / 2, half>, T>();
  }
  return length < lanes ? BlockKernel<Rows, T>{} : pick_vectors<Rows, T>(length);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
