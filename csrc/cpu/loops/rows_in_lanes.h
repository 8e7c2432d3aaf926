// Rows of n numbers that follow each other, as many vectors of them as a row has numbers, to a lane each, and back: in
// registers, by choices between two vectors and a permutation for each.
#pragma once

#include "vectors.h"

namespace constrained_ops::CO_LEVEL {
namespace {

// A row is an odd number of parts, each of a power of two. In every lane the parts are in order; of the numbers within
// one, k and k ^ l have changed places, where l is the lane's number modulo the length of a part.
template <int n>
class RowsInLanes {
  static constexpr int part = n & -n, parts = n / part;

  // `parts` vectors hold as many rows as a vector has parts, w of them. Place q of vector v has a part of the number
  // w v + q in memory, which is number k = w v + q of its row, modulo `parts`. That is odd and w a power of two: for
  // each q and k there is one v, by w v = k - q. So, with vectors in the order of w v, part k of all rows is what
  // vector k - q has in places q, and turn() brings it together.
  template <typename V>
  static constexpr int vector_of(int k) {
    const int w = lanes_of<V>().size() / part;
    int v = 0;
    while (v * w % parts != k) ++v;
    return v;
  }

  // x[k] becomes in places q what x[k - q] has there or, for the way back, what x[k + q] has: by the bits of q.
  template <bool back, int distance = 1, typename V>
  CO_HD static void turn(V (&x)[parts]) {
    if constexpr (distance < parts) {
      V y[parts];
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) {
        const V other = x[(k + (back ? distance : parts - distance)) % parts];
        y[k] = chosen<distance, part, parts>(x[k], other, lanes_of<V>());
      }
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) x[k] = y[k];
      turn<back, 2 * distance>(x);
    }
  }
  // Part k of a row from its place to that of the row's first, or back.
  template <int sign, typename V, int... k>
  CO_HD static void rotate(V (&x)[parts], std::integer_sequence<int, k...>) {
    ((x[k] = rotated<sign * k * part>(x[k], lanes_of<V>())), ...);
  }

  // The same for the numbers within a part, whose count has no inverse: x[k] becomes in lanes l what x[k ^ l] has
  // there.
  template <int distance = 1, typename V>
  CO_HD static void choose_diagonals(V (&x)[part]) {
    if constexpr (distance < part) {
      V y[part];
#pragma GCC unroll 8
      for (int k = 0; k < part; ++k) y[k] = chosen<distance>(x[k], x[k ^ distance], lanes_of<V>());
#pragma GCC unroll 8
      for (int k = 0; k < part; ++k) x[k] = y[k];
      choose_diagonals<2 * distance>(x);
    }
  }
  template <typename V, int... k>
  CO_HD static void exchange_lanes(V (&x)[part], std::integer_sequence<int, k...>) {
    ((x[k] = partners<k>(x[k], lanes_of<V>())), ...);
  }

 public:
  template <typename T>
  static constexpr bool fit = part <= width<T>;

  template <typename V>
  CO_HD static void from_rows(V (&x)[n]) {
    V y[parts][part];
#pragma GCC unroll 8
    for (int set = 0; set < part; ++set) {
      V whole[parts];
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) whole[k] = x[set * parts + vector_of<V>(k)];
      turn<false>(whole);
      rotate<1>(whole, std::make_integer_sequence<int, parts>());
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) y[k][set] = whole[k];
    }
#pragma GCC unroll 16
    for (int k = 0; k < parts; ++k) {
      choose_diagonals(y[k]);
      exchange_lanes(y[k], std::make_integer_sequence<int, part>());
#pragma GCC unroll 8
      for (int i = 0; i < part; ++i) x[k * part + i] = y[k][i];
    }
  }

  template <typename V>
  CO_HD static void to_rows(V (&x)[n]) {
    V y[parts][part];
#pragma GCC unroll 16
    for (int k = 0; k < parts; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < part; ++i) y[k][i] = x[k * part + i];
      exchange_lanes(y[k], std::make_integer_sequence<int, part>());
      choose_diagonals(y[k]);
    }
#pragma GCC unroll 8
    for (int set = 0; set < part; ++set) {
      V whole[parts];
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) whole[k] = y[k][set];
      rotate<-1>(whole, std::make_integer_sequence<int, parts>());
      turn<true>(whole);
#pragma GCC unroll 16
      for (int k = 0; k < parts; ++k) x[set * parts + vector_of<V>(k)] = whole[k];
    }
  }
};

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
