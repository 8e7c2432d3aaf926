// Rows that follow each other in memory into the columns of a tile, and back.
#pragma once

#include <cstdint>

#include "../../math/storage.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename From, typename To>
void transpose_plain(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = to_storage<To>(to_compute(from[r * from_stride + c]));
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CO_SHUFFLES 1
#endif
#endif

#if defined(CO_SHUFFLES)
using Eight __attribute__((vector_size(32), aligned(4))) = float;

inline void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Eight*>(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {  // pairs of rows, number by number
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {  // pairs of pairs
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[i + 2] = __builtin_shufflevector(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 3] = __builtin_shufflevector(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {  // halves
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) *reinterpret_cast<Eight*>(to + i * to_stride) = b[i];
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c], converted.
template <typename From, typename To>
void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t columns) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8)
      for (int64_t c = 0; c < whole_columns; c += 8)
        transpose_8x8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    transpose_plain(from + whole_columns, from_stride, to + whole_columns * to_stride, to_stride, whole_rows,
                    columns - whole_columns);
    transpose_plain(from + whole_rows * from_stride, from_stride, to + whole_rows, to_stride, rows - whole_rows,
                    columns);
    return;
  }
#endif
  transpose_plain(from, from_stride, to, to_stride, rows, columns);
}

// A length known to the compiler turns strided access into shuffles of its own.
template <int length, typename From, typename To>
void interleave(const From* from, To* to, int64_t stride, int64_t n, bool into_tile) {
#pragma GCC ivdep
  for (int64_t l = 0; l < n; ++l)
    for (int64_t k = 0; k < length; ++k) {
      const int64_t in_row = l * length + k, in_tile = k * stride + l;
      if (into_tile)
        to[in_tile] = to_storage<To>(to_compute(from[in_row]));
      else
        to[in_row] = to_storage<To>(to_compute(from[in_tile]));
    }
}

template <int length, typename From, typename To>
void interleave_either(const From* from, To* to, int64_t stride, int64_t n, bool into_tile) {
  into_tile ? interleave<length>(from, to, stride, n, true) : interleave<length>(from, to, stride, n, false);
}

// `n` rows of `length` numbers to the tile, whose rows are `stride` apart, or back.
template <typename From, typename To>
void rows_and_tile(const From* from, To* to, int64_t length, int64_t stride, int64_t n, bool into_tile) {
  switch (length) {
    case 2:
      return interleave_either<2>(from, to, stride, n, into_tile);
    case 3:
      return interleave_either<3>(from, to, stride, n, into_tile);
    case 4:
      return interleave_either<4>(from, to, stride, n, into_tile);
    default:
      return into_tile ? transpose(from, length, to, stride, n, length)
                       : transpose(from, stride, to, length, length, n);
  }
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
