// The numbers under the formulas: exp, log1p and log for float and double without branches, so that one source
// serves CPU vector units, CUDA threads and the emulation alike, with one error statement: exp and log1p within
// 1.1 and 2 units in the last place. Short polynomials after range reduction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define CO_HD __host__ __device__ __forceinline__
#else
#define CO_HD inline __attribute__((always_inline))
#endif

namespace constrained_ops {

template <typename To, typename From>
CO_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct Format;

template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int exponent_bias = 127;
  static constexpr Int sqrt_half_bits = 0x3f3504f3;  // the bits of sqrt(1/2)
  static constexpr float ln2_hi = 0.693359375f;      // few enough bits that k * ln2_hi is exact
  static constexpr float ln2_lo = -2.12194440054690583e-4f;
  static constexpr float exp_underflow = -104.0f;  // exp of anything smaller rounds to zero
  static constexpr float exp_overflow = 88.8f;     // ... and of anything larger to infinity
  static constexpr Int lift = 64;                  // takes the exponent of every nonzero exp(x), x <= 0, back to normal
  // Adding 1.5 * 2^23 rounds to an integer k; with the rest, the low bits are the exponent field of 2^(k + lift).
  static constexpr float round_magic = 12582912.0f + exponent_bias + lift;
};

template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int exponent_bias = 1023;
  static constexpr Int sqrt_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr double ln2_hi = 6.93147180369123816490e-1;
  static constexpr double ln2_lo = 1.90821492927058770002e-10;
  static constexpr double exp_underflow = -746.0;
  static constexpr double exp_overflow = 710.0;
  static constexpr Int lift = 128;
  static constexpr double round_magic = 6755399441055744.0 + exponent_bias + lift;  // 1.5 * 2^52 + ...
};

template <typename T>
CO_HD bool is_finite(T x) {
  return x - x == T(0);
}

CO_HD float magnitude_of(float x) { return ::fabsf(x); }
CO_HD double magnitude_of(double x) { return ::fabs(x); }

// NaN stays NaN: std::fmin and std::fmax would drop it.
template <typename T>
CO_HD T clamp(T x, T smallest, T largest) {
  x = x < smallest ? smallest : x;
  return x > largest ? largest : x;
}

// NaN if either is, as torch.maximum has it. T may be a vector.
template <typename T>
CO_HD T larger_or_nan(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// 2^k as a number; k within the normal exponents.
template <typename T>
CO_HD T power_of_two(typename Format<T>::Int k) {
  using F = Format<T>;
  return bit_cast<T>((k + F::exponent_bias) << F::mantissa_bits);
}

// Beyond these exp(x) is zero or infinite. CPU loops see them as variables from elsewhere (cpu/limits.cpp): given
// constants, a compiler derives what the whole formula comes to on a clamp's other side, and blends the two.
#if defined(CO_EXTERNAL_LIMITS)
extern const float exp_limits_float[2];
extern const double exp_limits_double[2];
template <typename T>
CO_HD T exp_limit(int end) {
  if constexpr (sizeof(T) == sizeof(float))
    return exp_limits_float[end];
  else
    return exp_limits_double[end];
}
#else
template <typename T>
CO_HD T exp_limit(int end) {
  return end == 0 ? Format<T>::exp_underflow : Format<T>::exp_overflow;
}
#endif

// c[0] + c[1] x + ..., even and odd powers apart: half as long a chain of dependent operations as Horner's.
template <int n, typename T>
CO_HD T polynomial(const T (&c)[n], T x) {
  const T x2 = x * x;
  T even = c[(n - 1) / 2 * 2], odd = c[n / 2 * 2 - 1];
#pragma GCC unroll 16
  for (int i = (n - 1) / 2 * 2 - 2; i >= 0; i -= 2) even = even * x2 + c[i];
#pragma GCC unroll 16
  for (int i = n / 2 * 2 - 3; i >= 1; i -= 2) odd = odd * x2 + c[i];
  return even + x * odd;
}

// (e^r - 1 - r) / r^2 for |r| <= ln2 / 2.
CO_HD float exp_tail(float r) {  // Chebyshev fit: e^r to 8e-9 relative
  constexpr float c[] = {0.5f, 0.166665769897f, 0.0416665546172f, 0.00836317905272f, 0.00139261835877f};
  return polynomial(c, r);
}
CO_HD double exp_tail(double r) {  // Taylor series: the first term left out is below 2^-57
  constexpr double c[] = {1 / 2.0,     1 / 6.0,      1 / 24.0,      1 / 120.0,      1 / 720.0,       1 / 5040.0,
                          1 / 40320.0, 1 / 362880.0, 1 / 3628800.0, 1 / 39916800.0, 1 / 479001600.0, 1 / 6227020800.0};
  return polynomial(c, r);
}

// (2 atanh(z) - 2 z) / z^3 for |z| <= 1/3, as a function of z^2.
CO_HD float atanh_tail(float z2) {  // Chebyshev fit: log(1 + e) to 4e-10 relative
  constexpr float c[] = {0.666666673205f, 0.399997063319f, 0.285923579943f, 0.217065758009f, 0.23224329224f};
  return polynomial(c, z2);
}
CO_HD double atanh_tail(double z2) {  // Taylor series: the first term left out is below 2^-57
  constexpr double c[] = {2 / 3.0,  2 / 5.0,  2 / 7.0,  2 / 9.0,  2 / 11.0, 2 / 13.0, 2 / 15.0, 2 / 17.0,
                          2 / 19.0, 2 / 21.0, 2 / 23.0, 2 / 25.0, 2 / 27.0, 2 / 29.0, 2 / 31.0, 2 / 33.0};
  return polynomial(c, z2);
}

// e^x = 2^k (1 + p), |ln(1 + p)| <= ln2 / 2, for x within the format's exponents. Written 2^k + 2^k p it is one
// operation where there is FMA, and rounded once in any case.
template <typename T>
struct Reduced {
  using Int = typename Format<T>::Int;
  Int low_bits;  // see Format::round_magic
  T p;

  CO_HD explicit Reduced(T x) {
    using F = Format<T>;
    const T shifted = x * T(1.4426950408889634) + F::round_magic;
    const T whole = shifted - F::round_magic;
    const T r = (x - whole * F::ln2_hi) - whole * F::ln2_lo;
    low_bits = bit_cast<Int>(shifted);
    p = r + r * r * exp_tail(r);
  }

  CO_HD Int k() const { return low_bits - bit_cast<Int>(Format<T>::round_magic); }
  CO_HD T lifted() const { return bit_cast<T>(low_bits << Format<T>::mantissa_bits); }  // 2^(k + lift)
};

template <typename T>
struct Exp {
  T exp;    // e^x
  T expm1;  // e^x - 1, without cancellation
};

// For x <= 0, to about one unit in the last place, subnormal results included.
template <typename T>
CO_HD Exp<T> exp_nonpositive(T x) {
  using F = Format<T>;
  const T least = exp_limit<T>(0);
  const Reduced<T> r(x < least ? least : x);
  const T lifted = r.lifted(), lower = power_of_two<T>(-F::lift);  // 2^k itself may be subnormal
  const T scale = lifted * lower;
  return {(lifted + r.p * lifted) * lower, r.p * scale + (scale - T(1))};
}

// 2^lift e^x for x <= 0: one multiplication less, for those who divide by such a number in the end.
template <typename T>
CO_HD T lifted_exp_nonpositive(T x) {
  const T least = exp_limit<T>(0);
  const Reduced<T> r(x < least ? least : x);
  return r.lifted() + r.p * r.lifted();
}

// For any x.
template <typename T>
CO_HD T exp(T x) {
  const Reduced<T> r(clamp(x, exp_limit<T>(0), exp_limit<T>(1)));
  const auto k = r.k(), half = k >> 1;  // 2^k in two factors: k alone may leave the normal exponents at either end
  const T first = power_of_two<T>(half);
  return (first + r.p * first) * power_of_two<T>(k - half);
}

// log(1 + e) for 0 <= e <= 1.
template <typename T>
CO_HD T log1p_unit(T e) {
  const T z = e / (T(2) + e);
  return e - z * (e - z * z * atanh_tail(z * z));  // 2 z = e - e z: the leading term carries no rounding of its own
}

// log(x) for normal x > 0; log(0) = -inf.
template <typename T>
CO_HD T log(T x) {
  using F = Format<T>;
  using Int = typename F::Int;
  const Int bits = bit_cast<Int>(x);
  const Int k = (bits - F::sqrt_half_bits) >> F::mantissa_bits;
  const T m = bit_cast<T>(bits - (k << F::mantissa_bits));  // in [sqrt(1/2), sqrt(2))
  const T z = (m - T(1)) / (m + T(1));
  const T kf = bit_cast<T>(k + bit_cast<Int>(F::round_magic)) - F::round_magic;  // T(k), for every vector unit
  const T result = kf * F::ln2_hi + (T(2) * z + (z * z * z * atanh_tail(z * z) + kf * F::ln2_lo));
  return x > T(0) ? result : (x == T(0) ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN());
}

}  // namespace constrained_ops
