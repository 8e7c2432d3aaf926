// Vectors as wide as the instruction set has them.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

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

// n numbers if a vector has more, and zeros.
template <typename T>
CO_HD Vector<T> load_some(const T* p, int64_t n) {
  if (n >= width<T>) return load(p);
  Vector<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <typename T>
CO_HD void store_some(T* p, Vector<T> v, int64_t n) {
  if (n >= width<T>) return store(p, v);
  std::memcpy(p, &v, n * sizeof(T));
}

// To memory without a place in the caches: for what is not read soon. `to` is at a whole vector. Other threads see it
// after written_past_caches().
template <typename T>
CO_HD void copy_past_caches(const T* from, int64_t n, T* to) {
  const int64_t whole = n / width<T> * width<T>;
  for (int64_t i = 0; i < whole; i += width<T>) {
    const Vector<T> v = load(from + i);
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), reinterpret_cast<__m128i>(v));
#else
    store(to + i, v);
#endif
  }
  for (int64_t i = whole; i < n; ++i) to[i] = from[i];
}
CO_HD void written_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
    if constexpr (sizeof(V) == 64)  // masked, since GCC 12 says of the plain one that it reads what is not set
      rough = V(_mm512_maskz_rcp14_ps(0xffff, __m512(v)));
    else
      rough = V(_mm256_rcp14_ps(__m256(v)));
    return rough + rough * (1 - v * rough);
  }
#endif
  return 1 / v;
}

// sqrt(v) times a factor, to two units in the last place, for v of at least 0. If not right for infinity, then NaN or,
// if `infinite` is asked for, minus infinity. With AVX-512 float takes short instructions in place of a long one; 1 /
// sqrt(v) of any other v is between the bounds that it gets here.
#if defined(__AVX512F__)
template <typename T>
constexpr T root_factor = std::is_same_v<T, float> ? 2 : 1;
#else
template <typename T>
constexpr T root_factor = 1;
#endif
template <bool infinite = false, typename V>
CO_HD V scaled_root(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == sizeof(float)) {
    V rough = smaller_of(V{} + 0x1p76f, V(_mm512_maskz_rsqrt14_ps(0xffff, __m512(v))));
    if constexpr (infinite) rough = larger_of(V{} + 0x1p-70f, rough);
    const V near = v * rough;
    return near * (3 - near * rough);
  }
#endif
  V result;
  for (size_t l = 0; l < sizeof(V) / sizeof(v[0]); ++l) result[l] = std::sqrt(v[l]);
  return result;
}

// 2^lift e^-|x| to 1.1 units in the last place, as math/numeric.h has it, from 2^k 2^(j/16) e^r with the middle factor
// from a table. Where that is one register, a fourth of the polynomial does.
template <typename T>
constexpr bool has_exp_table = false;
#if defined(__AVX512F__)
template <>
constexpr bool has_exp_table<float> = true;

CO_HD Vector<float> lifted_exp_of_magnitude(Vector<float> x) {
  using F = Format<float>;
  typedef F::Int Ints __attribute__((vector_size(vector_bytes)));
  // The bits of 2^(j/16) less those of 1 and less j << 19, which the shift below leaves behind.
  constexpr Ints table = {0,       -152893, -289342, -408621, -509968, -592590, -655657, -698305,
                          -719629, -718684, -694486, -646004, -572163, -471841, -343865, -187011};
  constexpr float parts = 16, magic = 1.5f * 8388608 + parts * (F::exponent_bias + F::lift);
  x = reinterpret_cast<Vector<float>>(reinterpret_cast<Ints>(x) | std::numeric_limits<F::Int>::min());
  x = larger_of(x, Vector<float>{} + exp_limit<float>(0));
  const Vector<float> shifted = x * (parts * 1.4426950408889634f) + magic, whole = shifted - magic;
  const Vector<float> r = (x - whole * (F::ln2_hi / parts)) - whole * (F::ln2_lo / parts);
  const Ints n = reinterpret_cast<Ints>(shifted);  // 16 k + j, with what is added to k, in the low bits
  const Ints of_j = reinterpret_cast<Ints>(_mm512_permutexvar_epi32(__m512i(n), __m512i(table)));
  const Vector<float> scale = reinterpret_cast<Vector<float>>((n << (F::mantissa_bits - 4)) + of_j);
  return scale + scale * (r + r * r * (0.5f + r * (1 / 6.f)));
}

// e / (1 + e) from 2^lift e, to 14 bits.
CO_HD Vector<float> rough_sigmoid(Vector<float> lifted_e) {
  const Vector<float> sum = lifted_e + power_of_two<float>(Format<float>::lift);
  return lifted_e * Vector<float>(_mm512_maskz_rcp14_ps(0xffff, __m512(sum)));
}
#endif

struct Larger {
  template <typename V>
  CO_HD V operator()(V a, V b) const {
    return larger_of(b, a);
  }
};
struct Plus {
  template <typename V>
  CO_HD V operator()(V a, V b) const {
    return a + b;
  }
};

template <typename V>
constexpr auto lanes_of() {
  return std::make_integer_sequence<int, sizeof(V) / sizeof(std::declval<V>()[0])>();
}

template <int distance, typename V, int... lane>
CO_HD V partners(V v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ distance)...);
}

// Lane l gets what lane l + distance has, modulo their number.
template <int distance, typename V, int... lane>
CO_HD V rotated(V v, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(v, v, ((lane + distance) & (lanes - 1))...);
}

// Of a in lanes without the bit `distance`, of b in those with it; or in parts of so many lanes, by the bits of a
// part's number modulo n.
template <int distance, int part = 1, int n = vector_bytes, typename V, int... lane>
CO_HD V chosen(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane / part % n & distance ? lane + lanes : lane)...);
}

// Every lane gets what its part of the vector, `part` lanes, is combined.
template <int part, int distance = 1, typename V, typename Combine>
CO_HD V within(V v, Combine combine) {
  if constexpr (distance < part)
    return within<part, 2 * distance>(combine(v, partners<distance>(v, lanes_of<V>())), combine);
  return v;
}

// All lanes combined, in a type with more digits if R is one.
template <typename R, typename T, typename Combine>
CO_HD R across(Vector<T> v, Combine combine) {
  if constexpr (std::is_same_v<R, T>) {
    return within<width<T>>(v, combine)[0];
  } else {
    typedef T Half __attribute__((vector_size(vector_bytes / 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return across<R, R>(
        combine(__builtin_convertvector(halves[0], Vector<R>), __builtin_convertvector(halves[1], Vector<R>)), combine);
  }
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
