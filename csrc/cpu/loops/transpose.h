// Rows that follow each other in memory into the columns of a tile, and back.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
using Four __attribute__((vector_size(16), aligned(4))) = float;
using Eight __attribute__((vector_size(32), aligned(4))) = float;

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

#if defined(__AVX512F__)
// The same of four by four numbers in each quarter.
CO_HD void transpose_quarters(__m512 (&a)[4]) {
  const __m512 low[] = {_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpacklo_ps(a[2], a[3])};
  const __m512 high[] = {_mm512_unpackhi_ps(a[0], a[1]), _mm512_unpackhi_ps(a[2], a[3])};
  a[0] = _mm512_shuffle_ps(low[0], low[1], 0x44);
  a[1] = _mm512_shuffle_ps(low[0], low[1], 0xee);
  a[2] = _mm512_shuffle_ps(high[0], high[1], 0x44);
  a[3] = _mm512_shuffle_ps(high[0], high[1], 0xee);
}

// Four numbers each of sixteen rows to sixteen each of four, and back. Quarters are joined as they are read, and parted
// as they are written.
CO_HD void transpose_16x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, from += from_stride) {
    a[i] = _mm512_castps128_ps512(_mm_loadu_ps(from));
    a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(from + 4 * from_stride), 1);
    a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(from + 8 * from_stride), 2);
    a[i] = _mm512_insertf32x4(a[i], _mm_loadu_ps(from + 12 * from_stride), 3);
  }
  transpose_quarters(a);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c, to += to_stride) _mm512_storeu_ps(to, a[c]);
}
CO_HD void transpose_4x16(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r, from += from_stride) a[r] = _mm512_loadu_ps(from);
  transpose_quarters(a);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += to_stride) {
    _mm_storeu_ps(to, _mm512_castps512_ps128(a[i]));
    _mm_storeu_ps(to + 4 * to_stride, _mm512_extractf32x4_ps(a[i], 1));
    _mm_storeu_ps(to + 8 * to_stride, _mm512_extractf32x4_ps(a[i], 2));
    _mm_storeu_ps(to + 12 * to_stride, _mm512_extractf32x4_ps(a[i], 3));
  }
}
#endif

// block(r, c) for blocks of `tall` by `wide` numbers that cover all; the last ones overlap those before.
template <int64_t tall, int64_t wide, typename Block>
CO_HD void in_blocks(int64_t rows, int64_t columns, const Block& block) {
  for (int64_t r = 0; r < rows; r = r + tall < rows ? std::min(r + tall, rows - tall) : rows)
    for (int64_t c = 0; c < columns; c = c + wide < columns ? std::min(c + wide, columns - wide) : columns) block(r, c);
}
#endif

// Whether transpose() does whole tiles of such rows by quarters of vectors.
template <typename From, typename To>
constexpr bool in_quarters([[maybe_unused]] int64_t length) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) return vector_bytes == 64 && length > 4;
#endif
  return false;
}

// to[c * to_stride + r] = from[r * from_stride + c], converted.
template <typename From, typename To>
void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t columns) {
#if defined(CO_SHUFFLES)
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
#if defined(__AVX512F__)
    if (rows >= 16 && columns >= 4)
      return in_blocks<16, 4>(rows, columns, [=](int64_t r, int64_t c) CO_INLINE {
        transpose_16x4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
      });
    if (rows >= 4 && columns >= 16)
      return in_blocks<4, 16>(rows, columns, [=](int64_t r, int64_t c) CO_INLINE {
        transpose_4x16(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
      });
#endif
    if (rows >= 8 && columns >= 8)
      return in_blocks<8, 8>(rows, columns, [=](int64_t r, int64_t c) CO_INLINE {
        transpose_8x8([=](int i) CO_INLINE { return from + (r + i) * from_stride + c; },
                      [=](int k, Eight numbers) CO_INLINE { write_eight(numbers, to + (c + k) * to_stride + r); });
      });
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
    if (!in_quarters<From, To>(length) && count == RowUnits::lanes && length > 4 && length < 8)
      return squares_to_tile(rows, tile, length);
#endif
  if (count == RowUnits::lanes && !in_quarters<From, To>(length)) switch (length) {
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
    if (!in_quarters<From, To>(length) && count == RowUnits::lanes && length > 4 && length < 8)
      return tile_to_squares(tile, rows, length);
#endif
  if (count == RowUnits::lanes && !in_quarters<From, To>(length)) switch (length) {
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
