"""exp, log1p, log, and the neighbours of a number: ``csrc/math/numeric.h`` and ``csrc/math/storage.h``.

Triton's own exp and log are approximations whose relative error grows with their argument, and its float32 division
is not rounded correctly.
"""

# ruff: noqa: N803, N806, RET505, SIM300  (Triton: constants in capitals, static branches)

import math
from ctypes import c_double, c_float, c_int32, c_int64
from typing import Any, NamedTuple

import triton
import triton.language as tl

ROUND_MAGIC_32 = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer in the low bits
ROUND_MAGIC_64 = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52
ROUND_MAGIC_BITS_32 = tl.constexpr(0x4B400000)
ROUND_MAGIC_BITS_64 = tl.constexpr(0x4338000000000000)
LN2_HI_32 = tl.constexpr(0.693359375)  # few enough bits that k * LN2_HI is exact
LN2_LO_32 = tl.constexpr(-2.12194440054690583e-4)
LN2_HI_64 = tl.constexpr(6.93147180369123816490e-1)
LN2_LO_64 = tl.constexpr(1.90821492927058770002e-10)
EXP_UNDERFLOW_32 = tl.constexpr(-104.0)  # exp of anything smaller rounds to zero
EXP_UNDERFLOW_64 = tl.constexpr(-746.0)
EXP_OVERFLOW_32 = tl.constexpr(88.8)  # ... and of anything larger to infinity
EXP_OVERFLOW_64 = tl.constexpr(710.0)
LIFT_32 = tl.constexpr(64)  # takes the exponent of every nonzero exp(x), x <= 0, back to normal
LIFT_64 = tl.constexpr(128)
LOWER_32 = tl.constexpr(2.0**-64)  # and down again
LOWER_64 = tl.constexpr(2.0**-128)
LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF_BITS_32 = tl.constexpr(0x3F3504F3)
SQRT_HALF_BITS_64 = tl.constexpr(0x3FE6A09E667F3BCD)
# Chebyshev fit: e^r to 8e-9 relative.
EXP_TAIL_32 = tl.constexpr((0.5, 0.166665769897, 0.0416665546172, 0.00836317905272, 0.00139261835877))
# Taylor series, here and below: the first term left out is below 2^-57.
EXP_TAIL_64 = tl.constexpr(tuple(1 / math.factorial(n) for n in range(2, 14)))
# Chebyshev fit: log(1 + e) to 4e-10 relative.
ATANH_TAIL_32 = tl.constexpr((0.666666673205, 0.399997063319, 0.285923579943, 0.217065758009, 0.23224329224))
ATANH_TAIL_64 = tl.constexpr(tuple(2 / n for n in range(3, 34, 2)))
INFINITY = tl.constexpr(math.inf)


@triton.jit
def divide(a, b):
    """a / b, rounded correctly."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def square_root(x):
    """Rounded correctly."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.math.sqrt_rn(x)


@triton.jit
def clamp(x, smallest, largest):
    """NaN stays NaN: tl.minimum and tl.maximum would drop it."""
    x = tl.where(x < smallest, smallest, x)
    return tl.where(x > largest, largest, x)


@triton.jit
def power_of_two(k, dtype: tl.constexpr):
    """2^k as a number; k within the normal exponents."""
    if dtype == tl.float64:
        return ((k + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def polynomial(c: tl.constexpr, N: tl.constexpr, x):
    """c[0] + c[1] x + ... + c[N - 1] x^(N - 1), even and odd powers apart: half as long a chain as Horner's."""
    x2 = x * x
    even = tl.zeros_like(x) + c[(N - 1) // 2 * 2]
    odd = tl.zeros_like(x) + c[N // 2 * 2 - 1]
    for i in tl.static_range((N - 1) // 2 * 2 - 2, -1, -2):
        even = even * x2 + c[i]
    for i in tl.static_range(N // 2 * 2 - 3, 0, -2):
        odd = odd * x2 + c[i]
    return even + x * odd


@triton.jit
def exp_tail(r):
    """(e^r - 1 - r) / r^2 for |r| <= ln2 / 2."""
    if r.dtype == tl.float64:
        return polynomial(EXP_TAIL_64, 12, r)
    else:
        return polynomial(EXP_TAIL_32, 5, r)


@triton.jit
def atanh_tail(z2):
    """(2 atanh(z) - 2 z) / z^3 for |z| <= 1/3, as a function of z^2."""
    if z2.dtype == tl.float64:
        return polynomial(ATANH_TAIL_64, 16, z2)
    else:
        return polynomial(ATANH_TAIL_32, 5, z2)


class Reduced(NamedTuple):
    """e^x = 2^k (1 + p), |ln(1 + p)| <= ln2 / 2, for x within the format's exponents."""

    k: Any
    p: Any


@triton.jit
def reduced(x):
    DOUBLE: tl.constexpr = x.dtype == tl.float64
    INT: tl.constexpr = tl.int64 if DOUBLE else tl.int32
    ROUND_MAGIC: tl.constexpr = ROUND_MAGIC_64 if DOUBLE else ROUND_MAGIC_32
    ROUND_MAGIC_BITS: tl.constexpr = ROUND_MAGIC_BITS_64 if DOUBLE else ROUND_MAGIC_BITS_32
    LN2_HI: tl.constexpr = LN2_HI_64 if DOUBLE else LN2_HI_32
    LN2_LO: tl.constexpr = LN2_LO_64 if DOUBLE else LN2_LO_32
    shifted = x * LOG2_E + ROUND_MAGIC
    whole = shifted - ROUND_MAGIC
    r = (x - whole * LN2_HI) - whole * LN2_LO
    return Reduced(shifted.to(INT, bitcast=True) - ROUND_MAGIC_BITS, r + r * r * exp_tail(r))


class Exp(NamedTuple):
    exp: Any  # e^x
    expm1: Any  # e^x - 1, without cancellation


@triton.jit
def exp_nonpositive(x):
    """For x <= 0, to about one unit in the last place, subnormal results included."""
    DOUBLE: tl.constexpr = x.dtype == tl.float64
    UNDERFLOW: tl.constexpr = EXP_UNDERFLOW_64 if DOUBLE else EXP_UNDERFLOW_32
    LIFT: tl.constexpr = LIFT_64 if DOUBLE else LIFT_32
    LOWER: tl.constexpr = LOWER_64 if DOUBLE else LOWER_32
    r = reduced(tl.where(x < UNDERFLOW, UNDERFLOW, x))
    lifted = power_of_two(r.k + LIFT, x.dtype)  # 2^k itself may be subnormal
    scale = lifted * LOWER
    return Exp((1.0 + r.p) * lifted * LOWER, r.p * scale + (scale - 1.0))


@triton.jit
def exp(x):
    """For any x."""
    DOUBLE: tl.constexpr = x.dtype == tl.float64
    UNDERFLOW: tl.constexpr = EXP_UNDERFLOW_64 if DOUBLE else EXP_UNDERFLOW_32
    OVERFLOW: tl.constexpr = EXP_OVERFLOW_64 if DOUBLE else EXP_OVERFLOW_32
    r = reduced(clamp(x, UNDERFLOW, OVERFLOW))
    half = r.k >> 1  # 2^k in two factors: k alone may leave the normal exponents at either end
    return (1.0 + r.p) * power_of_two(half, x.dtype) * power_of_two(r.k - half, x.dtype)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1."""
    z = divide(e, 2.0 + e)
    return e - z * (e - z * z * atanh_tail(z * z))  # 2 z = e - e z: the leading term carries no rounding of its own


@triton.jit
def log(x):
    """log(x) for normal x > 0; log(0) = -inf."""
    DOUBLE: tl.constexpr = x.dtype == tl.float64
    INT: tl.constexpr = tl.int64 if DOUBLE else tl.int32
    MANTISSA_BITS: tl.constexpr = 52 if DOUBLE else 23
    SQRT_HALF_BITS: tl.constexpr = SQRT_HALF_BITS_64 if DOUBLE else SQRT_HALF_BITS_32
    LN2_HI: tl.constexpr = LN2_HI_64 if DOUBLE else LN2_HI_32
    LN2_LO: tl.constexpr = LN2_LO_64 if DOUBLE else LN2_LO_32
    bits = x.to(INT, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    m = (bits - (k << MANTISSA_BITS)).to(x.dtype, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    z = divide(m - 1.0, m + 1.0)
    kf = k.to(x.dtype)
    result = kf * LN2_HI + (2.0 * z + (z * z * z * atanh_tail(z * z) + kf * LN2_LO))
    return tl.where(x > 0.0, result, tl.where(x == 0.0, -INFINITY, float("nan")))


def bits_of(number: float, double: bool) -> int:
    """The bits of a number in the compute dtype, for :func:`from_bits`."""
    source, bits = (c_double, c_int64) if double else (c_float, c_int32)
    return bits.from_buffer(source(number)).value


@triton.jit
def from_bits(bits, STORAGE: tl.constexpr):
    """A number of the compute dtype. Triton passes floats as float32, but the bits of a double unchanged."""
    if STORAGE == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


# --- Storage formats: 16-bit ones compute in float32, the others in themselves ---------------------------------------


@triton.jit
def to_compute(x):
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def to_storage(x, STORAGE: tl.constexpr):
    """Rounded to nearest even; bfloat16 by its bits: Triton's interpreter would neither round nor keep subnormals."""
    if STORAGE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(STORAGE)


@triton.jit
def next_up(bits):
    """The next number towards +infinity, as bits; sign and magnitude are apart, and -0 counts as 0."""
    up = bits + 1
    toward_zero = bits - 1
    return tl.where(bits >= 0, up, tl.where(bits + bits == 0, 1, toward_zero)).to(bits.dtype)


@triton.jit
def next_above(x, STORAGE: tl.constexpr):
    """The smallest number of the storage format that is strictly greater than x."""
    BITS: tl.constexpr = tl.int64 if STORAGE == tl.float64 else (tl.int32 if STORAGE == tl.float32 else tl.int16)
    nearest = to_storage(x, STORAGE)
    rounded = to_compute(nearest)
    up = next_up(nearest.to(BITS, bitcast=True))
    return tl.where(rounded > x, rounded, to_compute(up.to(STORAGE, bitcast=True)))


@triton.jit
def next_below(x, STORAGE: tl.constexpr):
    return -next_above(-x, STORAGE)
