// Vectors as wide as the instruction set has them.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "../../math/numeric.h"
#include "../loops.h"

namespace constrained_ops::CO_LEVEL {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int width = vector_bytes / sizeof(T);
template <typename T>
constexpr int group = 2 * width<T>;

template <typename T>
CO_HD Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
CO_HD void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// An instruction each, which the compiler does not find in vectors of AVX-512.
template <typename V>
CO_HD V larger_of(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (requires { _mm512_max_ps(b, a); }) return V(_mm512_max_ps(b, a));
#endif
  return b > a ? b : a;
}
template <typename V>
CO_HD V smaller_of(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (requires { _mm512_min_ps(a, b); }) return V(_mm512_min_ps(a, b));
#endif
  return b > a ? a : b;
}

// 1 / v to a unit in the last place, the same in vectors of any width, for v whose reciprocal is a normal number; NaN
// for 0 and infinities, if not right. With AVX-512 float takes a third of the time of a division.
template <typename V>
CO_HD V reciprocal(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == sizeof(float)) {
    V rough;
    if constexpr (sizeof(V) == 64)
      rough = V(_mm512_rcp14_ps(__m512(v)));
    else
      rough = V(_mm256_rcp14_ps(__m256(v)));
    return rough + rough * (1 - v * rough);
  }
#endif
  return 1 / v;
}

// All lanes combined, by halves, in a type with more digits if R is one.
template <typename R, typename T, typename Combine>
CO_HD R across(Vector<T> v, const Combine& combine) {
  R values[width<T>];
  for (int l = 0; l < width<T>; ++l) values[l] = v[l];
  for (int half = width<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) values[l] = combine(values[l], values[l + half]);
  return values[0];
}

// Whether any bit of a comparison is set.
template <typename Mask>
CO_HD bool any(Mask mask) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi64_mask(bits, bits) != 0;
#else
  uint64_t words[vector_bytes / 8], together = 0;
  std::memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) together |= word;
  return together != 0;
#endif
}

}  // namespace
}  // namespace constrained_ops::CO_LEVEL
