// Short rows as the columns of tiles, in memory of a thread's own.
#pragma once

#include <memory>

#include "transpose.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// Tiles [length][lanes] of the compute type, one for each operand, in memory of one thread.
template <typename T>
struct Tiles {
  static constexpr int64_t lanes = RowUnits::lanes;
  const int64_t length, apart;  // a line more than a tile apart: cache sets are few
  const std::unique_ptr<T[]> memory;

  Tiles(int count, int64_t length) : length(length), apart(length * lanes + 16), memory(new T[count * apart]()) {}
  T* at(int tile) const { return memory.get() + tile * apart; }
};

// Where the rows of a tile lie: `count` of them, each `length` elements, `inner` apart.
struct TileRows {
  int64_t length, inner, count;
  int64_t first;                    // first element of the first row
  bool neighbours;                  // the rows follow each other element by element
  int64_t starts[RowUnits::lanes];  // otherwise, if inner > 1: first elements of all

  TileRows(const RowLayout& layout, const RowUnits& units, int64_t unit) : length(layout.length), inner(layout.inner) {
    neighbours = units.per_outer != 0;
    if (neighbours) {
      const int64_t lane = unit % units.per_outer * units.lanes;
      count = std::min(units.lanes, inner - lane);
      first = unit / units.per_outer * length * inner + lane;
      return;
    }
    const int64_t row = unit * units.lanes;
    count = std::min(units.lanes, layout.outer * inner - row);
    first = row * length;
    if (inner > 1)
      for (int64_t l = 0; l < count; ++l) starts[l] = (row + l) / inner * length * inner + (row + l) % inner;
  }

  template <typename Storage, typename T>
  void load(const Storage* from, T* tile) const {
    if (inner == 1) return rows_to_tile(from + first, tile, length, count);
    for_each([=](int64_t in_memory, int64_t in_tile) { tile[in_tile] = to_compute(from[in_memory]); });
  }
  template <typename Storage, typename T>
  void store(const T* tile, Storage* to) const {
    if (inner == 1) return tile_to_rows(tile, to + first, length, count);
    for_each([=](int64_t in_memory, int64_t in_tile) { to[in_memory] = to_storage<Storage>(tile[in_tile]); });
  }

 private:
  template <typename Move>
  CO_HD void for_each(Move move) const {
    for (int64_t k = 0; k < length; ++k) {
      const int64_t in_tile = k * RowUnits::lanes;
      if (neighbours) {
#pragma GCC ivdep
        for (int64_t l = 0; l < count; ++l) move(first + k * inner + l, in_tile + l);
      } else {
        for (int64_t l = 0; l < count; ++l) move(starts[l] + k * inner, in_tile + l);
      }
    }
  }
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
