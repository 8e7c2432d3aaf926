// How numbers lie in memory: float, double, and the two 16-bit formats as their bits. Formulas compute in
// compute_t<Storage> (float for the 16-bit formats); bounds stay strict whatever the storage rounds to.
#pragma once

#include "numeric.h"

namespace constrained_ops {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename Storage>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename Storage>
using compute_t = typename Compute<Storage>::type;

CO_HD float to_compute(float x) { return x; }
CO_HD double to_compute(double x) { return x; }
CO_HD float to_compute(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Exponent and mantissa move into float's places; the multiplication repairs the exponent and normalises subnormals.
CO_HD float to_compute(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return bit_cast<float>((magnitude >= 0x7c00u ? special : finite) | sign);
}

template <typename Storage>
CO_HD Storage to_storage(compute_t<Storage> x) {
  return x;
}

template <>
CO_HD BFloat16 to_storage<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// Round to nearest even: normal results by integer arithmetic on the bits, subnormal ones by one float addition.
template <>
CO_HD Half to_storage<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const float aligned =
      bit_cast<float>(magnitude) + 0.5f;  // subnormal half: its unit is 2^-24, that of floats in [0.5, 1)
  const uint32_t subnormal = bit_cast<uint32_t>(aligned) - 0x3f000000u;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN : infinity
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t value = magnitude >= 0x477ff000u ? overflow : finite;
  return {static_cast<uint16_t>(value | ((bits >> 16) & 0x8000u))};
}

CO_HD uint16_t raw_bits(Half x) { return x.bits; }
CO_HD uint16_t raw_bits(BFloat16 x) { return x.bits; }
CO_HD uint32_t raw_bits(float x) { return bit_cast<uint32_t>(x); }
CO_HD uint64_t raw_bits(double x) { return bit_cast<uint64_t>(x); }

// The next number towards +infinity, as bits; sign and magnitude are apart, and -0 counts as 0.
template <typename Bits>
CO_HD Bits next_up(Bits bits) {
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits up = static_cast<Bits>(bits + 1), toward_zero = static_cast<Bits>(bits - 1);
  return bits < sign ? up : (bits == sign ? Bits(1) : toward_zero);
}

// The smallest number of the storage format that is strictly greater than x.
template <typename Storage>
CO_HD compute_t<Storage> next_above(compute_t<Storage> x) {
  const Storage nearest = to_storage<Storage>(x);
  const compute_t<Storage> rounded = to_compute(nearest);
  const auto up = next_up(raw_bits(nearest));
  return rounded > x ? rounded : to_compute(bit_cast<Storage>(up));
}

template <typename Storage>
CO_HD compute_t<Storage> next_below(compute_t<Storage> x) {
  return -next_above<Storage>(-x);
}

}  // namespace constrained_ops
