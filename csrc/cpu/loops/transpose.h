// Rows that follow each other in memory into the columns of a tile, and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../math/storage.h"
#include "../loops.h"

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
using Four __attribute__((vector_size(16), aligned(4))) = float;

inline Four read_four(const float* from) { return *reinterpret_cast<const Four*>(from); }
inline void write_eight(Eight numbers, float* to) { *reinterpret_cast<Eight*>(to) = numbers; }

// Eight numbers each of eight rows, row(i) giving their address, to column(c, its numbers). Halves are joined as they
// are read, which takes a load, and not one of the few shuffles that a processor does at a time.
template <typename Row, typename Column>
CO_HD void transpose_8x8(const Row& row, const Column& column) {
  Eight a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float *const upper = row(i), *const lower = row(i + 4);
    a[i] = __builtin_shufflevector(read_four(upper), read_four(lower), 0, 1, 2, 3, 4, 5, 6, 7);
    a[i + 4] = __builtin_shufflevector(read_four(upper + 4), read_four(lower + 4), 0, 1, 2, 3, 4, 5, 6, 7);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // pairs of rows, number by number
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int c = 0; c < 8; c += 4) {  // pairs of pairs
    column(c, __builtin_shufflevector(b[c], b[c + 2], 0, 1, 8, 9, 4, 5, 12, 13));
    column(c + 1, __builtin_shufflevector(b[c], b[c + 2], 2, 3, 10, 11, 6, 7, 14, 15));
    column(c + 2, __builtin_shufflevector(b[c + 1], b[c + 3], 0, 1, 8, 9, 4, 5, 12, 13));
    column(c + 3, __builtin_shufflevector(b[c + 1], b[c + 3], 2, 3, 10, 11, 6, 7, 14, 15));
  }
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c], converted.
template <typename From, typename To>
void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t columns) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
    if (rows >= 8 && columns >= 8) {  // the last square of a line overlaps the one before
      for (int64_t r = 0; r < rows; r = r + 8 < rows ? std::min(r + 8, rows - 8) : rows)
        for (int64_t c = 0; c < columns; c = c + 8 < columns ? std::min(c + 8, columns - 8) : columns)
          transpose_8x8([=](int i) CO_INLINE { return from + (r + i) * from_stride + c; },
                        [=](int k, Eight numbers) CO_INLINE { write_eight(numbers, to + (c + k) * to_stride + r); });
      return;
    }
  }
#endif
  transpose_plain(from, from_stride, to, to_stride, rows, columns);
}

// Whole tiles of short rows: a length known to the compiler turns strided access into shuffles of its own.
template <int length, typename From, typename To>
void short_rows_to_tile(const From* from, To* to) {
  constexpr int64_t lanes = RowUnits::lanes;
#pragma GCC ivdep
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t k = 0; k < length; ++k) to[k * lanes + l] = to_storage<To>(to_compute(from[l * length + k]));
}
template <int length, typename From, typename To>
void tile_to_short_rows(const From* from, To* to) {
  constexpr int64_t lanes = RowUnits::lanes;
#pragma GCC ivdep
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t k = 0; k < length; ++k) to[l * length + k] = to_storage<To>(to_compute(from[k * lanes + l]));
}

#if defined(CO_SHUFFLES)
// Rows of 5 to 7 numbers as if of 8: what is read beyond a row is not kept, what is written beyond it the next row
// overwrites, and the last has a place of its own.
inline void squares_to_tile(const float* rows, float* tile, int64_t length) {
  constexpr int64_t lanes = RowUnits::lanes;
  float last[8] = {};
  std::copy_n(rows + (lanes - 1) * length, length, last);
  for (int64_t l = 0; l < lanes; l += 8)
    transpose_8x8([=, &last](int i) CO_INLINE { return l + i < lanes - 1 ? rows + (l + i) * length : last; },
                  [=](int k, Eight numbers) CO_INLINE {
                    if (k < length) write_eight(numbers, tile + k * lanes + l);
                  });
}
inline void tile_to_squares(const float* tile, float* rows, int64_t length) {
  constexpr int64_t lanes = RowUnits::lanes;
  float last[8];
  const float none[8] = {};
  for (int64_t l = 0; l < lanes; l += 8)
    transpose_8x8([=, &none](int k) CO_INLINE { return k < length ? tile + k * lanes + l : none; },
                  [=, &last](int i, Eight numbers)
                      CO_INLINE { write_eight(numbers, l + i < lanes - 1 ? rows + (l + i) * length : last); });
  std::copy_n(last, length, rows + (lanes - 1) * length);
}
#endif

// `count` rows of `length` numbers to the lanes of a tile, or back.
template <typename From, typename To>
[[gnu::noinline]] void rows_to_tile(const From* rows, To* tile, int64_t length, int64_t count) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>)
    if (count == RowUnits::lanes && length > 4 && length < 8) return squares_to_tile(rows, tile, length);
#endif
  if (count == RowUnits::lanes) switch (length) {
      case 2:
        return short_rows_to_tile<2>(rows, tile);
      case 3:
        return short_rows_to_tile<3>(rows, tile);
      case 4:
        return short_rows_to_tile<4>(rows, tile);
      case 5:
        return short_rows_to_tile<5>(rows, tile);
      case 6:
        return short_rows_to_tile<6>(rows, tile);
      case 7:
        return short_rows_to_tile<7>(rows, tile);
    }
  transpose(rows, length, tile, RowUnits::lanes, count, length);
}
template <typename From, typename To>
[[gnu::noinline]] void tile_to_rows(const From* tile, To* rows, int64_t length, int64_t count) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>)
    if (count == RowUnits::lanes && length > 4 && length < 8) return tile_to_squares(tile, rows, length);
#endif
  if (count == RowUnits::lanes) switch (length) {
      case 2:
        return tile_to_short_rows<2>(tile, rows);
      case 3:
        return tile_to_short_rows<3>(tile, rows);
      case 4:
        return tile_to_short_rows<4>(tile, rows);
      case 5:
        return tile_to_short_rows<5>(tile, rows);
      case 6:
        return tile_to_short_rows<6>(tile, rows);
      case 7:
        return tile_to_short_rows<7>(tile, rows);
    }
  transpose(tile, RowUnits::lanes, rows, length, length, count);
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
