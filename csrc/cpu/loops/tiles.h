// Short rows as the columns of tiles, in memory of a thread's own.
#pragma once

#include <memory>

#include "transpose.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Tiles [length][lanes] of the compute type, one for each operand, in memory of one thread: aligned to cache lines, and
// a line more than a tile apart, as cache sets are few.
template <typename T>
class Tiles {
 public:
  static constexpr int64_t lanes = RowUnits::lanes;

  // Of zeros, since rows may not fill all lanes, unless those of a layout do; or, of another `width`, of anything.
  Tiles(int count, int64_t length) : Tiles(count, length, lanes) {
    std::fill(first_, first_ + (count - 1) * apart_ + length * lanes, T(0));
  }
  Tiles(int count, int64_t length, const RowLayout& rows) : Tiles(count, length, lanes) {
    if ((rows.inner < lanes ? rows.outer * rows.inner : rows.inner) % lanes != 0)
      std::fill(first_, first_ + (count - 1) * apart_ + length * lanes, T(0));
  }
  Tiles(int count, int64_t length, int64_t width)
      : apart_(length * width + line), memory_(new T[count * apart_ + line]), first_(memory_.get()) {
    first_ += (line - reinterpret_cast<uintptr_t>(first_) / sizeof(T) % line) % line;
  }
  T* at(int tile) const { return first_ + tile * apart_; }

 private:
  static constexpr int64_t line = 64 / sizeof(T);
  const int64_t apart_;
  const std::unique_ptr<T[]> memory_;
  T* first_;
};

// Where the rows of a tile lie: `count` of them, each `length` elements, `inner` apart. In memory they are runs of
// neighbours: one, or the rest of an outer index, some whole ones, and the beginning of another.
struct TileRows {
  int64_t length, inner, count;
  int64_t first;      // first element of the first row
  int64_t first_run;  // how many rows the first run has
  int64_t numel;      // of the operand

  TileRows(const RowLayout& layout, const RowUnits& units, int64_t unit)
      : length(layout.length), inner(layout.inner), numel(layout.outer * layout.length * layout.inner) {
    if (inner == 1) {  // without a division, which is as much as some of a tile's rows take
      first = unit * units.lanes * length;
      count = std::min(units.lanes, layout.outer - unit * units.lanes);
      first_run = 1;
      return;
    }
    const int64_t rows = units.per_outer != 0 ? inner : layout.outer * inner;
    const int64_t row = units.per_outer != 0 ? unit % units.per_outer * units.lanes : unit * units.lanes;
    const int64_t outer = units.per_outer != 0 ? unit / units.per_outer : row / inner;
    count = std::min(units.lanes, rows - row);
    first = outer * length * inner + row % inner;
    first_run = std::min(count, inner - row % inner);
  }

  template <typename Storage, typename T>
  [[gnu::noinline]] void load(const Storage* from, T* tile) const {
    if (inner == 1) return rows_to_tile(from + first, tile, length, count);
    for_each_run([&](int64_t at, int64_t lane, int64_t rows) CO_INLINE {
      // Eight numbers at once may be some too many, if there is place: later runs put theirs there.
      const bool eights = lane + 8 <= RowUnits::lanes && at + (length - 1) * inner + 8 <= numel;
      move(from + at, inner, tile + lane, RowUnits::lanes, rows, eights ? length : 0);
    });
  }
  template <typename Storage, typename T>
  [[gnu::noinline]] void store(const T* tile, Storage* to) const {
    if (inner == 1) return tile_to_rows(tile, to + first, length, count);
    const int64_t before = first_run == inner ? 0 : first_run;  // and after them, runs that are whole up to
    const int64_t whole = (before ? next_outer() : first) + (count - before) / inner * length * inner;
    for_each_run([&](int64_t at, int64_t lane, int64_t rows) CO_INLINE {
      const int64_t eights = rows < inner || whole - at < 8 ? 0 : std::min(length, (whole - at - 8) / inner + 1);
      move(tile + lane, RowUnits::lanes, to + at, inner, rows, eights);
    });
  }

  // Rows that follow each other are read in as many places at once as a tile has lanes, too many for the processor to
  // foresee what comes next. Inlined: a compiler drops a call that does nothing but fetch.
  template <typename Storage>
  CO_HD void prefetch(const void* const* in, int inputs, void* const* out, int outputs) const {
    if (inner != 1) return;
    const int64_t begin = first * sizeof(Storage), end = begin + count * length * sizeof(Storage);
    for (int i = 0; i < inputs; ++i)
      for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(static_cast<const char*>(in[i]) + at);
    for (int i = 0; i < outputs; ++i)
      if (out[i])
        for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(static_cast<const char*>(out[i]) + at, 1);
  }

 private:
  int64_t next_outer() const { return (first / (length * inner) + 1) * length * inner; }

  // run(first element, first lane, number of rows)
  template <typename Run>
  void for_each_run(const Run& run) const {
    run(first, 0, first_run);
    for (int64_t lane = first_run, at = next_outer(); lane < count; lane += inner, at += length * inner)
      run(at, lane, std::min(inner, count - lane));
  }

  // n numbers at each of `length` steps. If they are fewer than 8, then at the first `eights` steps 8 all the same.
  template <typename From, typename To>
  void move(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n, int64_t eights) const {
    for (int64_t i = 0; n >= 8 && i < n; i += 8) {  // the last ones overlap those before
      const int64_t at = std::min(i, n - 8);
      for (int64_t k = 0; k < length; ++k) move_eight(from + k * from_stride + at, to + k * to_stride + at);
    }
    if (n >= 8) return;
    for (int64_t k = 0; k < eights; ++k) move_eight(from + k * from_stride, to + k * to_stride);
    for (int64_t k = eights; k < length; ++k)
      for (int64_t i = 0; i < n; ++i) to[k * to_stride + i] = to_storage<To>(to_compute(from[k * from_stride + i]));
  }
  template <typename From, typename To>
  CO_HD static void move_eight(const From* from, To* to) {
    if constexpr (std::is_same_v<From, To>) {
      typedef To Eight __attribute__((vector_size(8 * sizeof(To)), aligned(sizeof(To)), may_alias));
      *reinterpret_cast<Eight*>(to) = *reinterpret_cast<const Eight*>(from);
    } else {
#pragma GCC unroll 1  // unrolled it would not become vectors
#pragma GCC ivdep
      for (int i = 0; i < 8; ++i) to[i] = to_storage<To>(to_compute(from[i]));
    }
  }
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
