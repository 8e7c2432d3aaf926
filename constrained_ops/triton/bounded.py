"""raw -> an open interval, a half-line or the line: ``csrc/math/bounded.h``, which has the table of formulas."""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import Point, kernels
from .numeric import INFINITY, divide, exp_nonpositive, log1p_unit


class Sigmoid(NamedTuple):
    """What the maps share at one raw. `near` = e / (1 + e) is the smaller of s and 1 - s, `far` the larger."""

    raw: Any
    magnitude: Any
    e: Any
    near: Any
    far: Any  # 1 - near = 1 / (1 + e)
    slope: Any  # s (1 - s)
    tanh_half: Any  # tanh(raw / 2)
    log1p_e: Any
    upper_half: Any  # raw >= 0


@triton.jit
def sigmoid_at(raw):
    magnitude = tl.abs(raw)
    exponential = exp_nonpositive(-magnitude)
    e = exponential.exp
    quotient = divide(e, 1.0 + e)
    far = 1.0 - quotient
    near = tl.fma(far, tl.fma(-e, quotient, e) - quotient, quotient)  # a step of Newton's: rounded once, not twice
    tanh_magnitude = -exponential.expm1 * far
    upper_half = raw >= 0.0
    tanh_half = tl.where(upper_half, tanh_magnitude, -tanh_magnitude)
    return Sigmoid(raw, magnitude, e, near, far, quotient * far, tanh_half, log1p_unit(e), upper_half)


@triton.jit
def sigmoid(s):
    return tl.where(s.upper_half, s.far, s.near)


@triton.jit
def one_minus_sigmoid(s):
    return tl.where(s.upper_half, s.near, s.far)


@triton.jit
def softplus(s):
    """log(1 + exp(raw))"""
    return tl.where(s.upper_half, s.raw, 0.0) + s.log1p_e


@triton.jit
def softplus_minus(s):
    """log(1 + exp(-raw))"""
    return tl.where(s.upper_half, 0.0, -s.raw) + s.log1p_e


@triton.jit
def interval_from(s, b):
    distance = b.width * s.near
    below_upper = b.upper - distance
    middle = b.lower + b.width * 0.5  # the most that the lower half gives: x must not fall where halves meet
    return Point(
        x=tl.where(s.upper_half, tl.where(below_upper < middle, middle, below_upper), b.lower + distance),
        x_raw=b.width * s.slope,
        x_raw_raw=-b.width * s.slope * s.tanh_half,
        x_lower=one_minus_sigmoid(s),
        x_upper=sigmoid(s),
        x_raw_width=s.slope,
        log_det=(b.log_width - s.magnitude) - 2.0 * s.log1p_e,
        log_det_raw=-s.tanh_half,
        log_det_raw_raw=-2.0 * s.slope,
        log_det_width=b.inverse_width,
        log_det_width_width=-b.inverse_width * b.inverse_width,
    )


@triton.jit
def lower_only_from(s, b):
    return Point(
        x=b.lower + softplus(s),
        x_raw=sigmoid(s),
        x_raw_raw=s.slope,
        x_lower=1.0,
        x_upper=0.0,
        x_raw_width=0.0,
        log_det=-softplus_minus(s),
        log_det_raw=one_minus_sigmoid(s),
        log_det_raw_raw=-s.slope,
        log_det_width=0.0,
        log_det_width_width=0.0,
    )


@triton.jit
def upper_only_from(s, b):
    return Point(
        x=b.upper - softplus_minus(s),
        x_raw=one_minus_sigmoid(s),
        x_raw_raw=-s.slope,
        x_lower=0.0,
        x_upper=1.0,
        x_raw_width=0.0,
        log_det=-softplus(s),
        log_det_raw=-sigmoid(s),
        log_det_raw_raw=-s.slope,
        log_det_width=0.0,
        log_det_width_width=0.0,
    )


@triton.jit
def unbounded(raw, b):
    return Point(
        x=raw,
        x_raw=1.0,
        x_raw_raw=0.0,
        x_lower=0.0,
        x_upper=0.0,
        x_raw_width=0.0,
        log_det=0.0,
        log_det_raw=0.0,
        log_det_raw_raw=0.0,
        log_det_width=0.0,
        log_det_width_width=0.0,
    )


@triton.jit
def interval(raw, b):
    return interval_from(sigmoid_at(raw), b)


@triton.jit
def lower_only(raw, b):
    return lower_only_from(sigmoid_at(raw), b)


@triton.jit
def upper_only(raw, b):
    return upper_only_from(sigmoid_at(raw), b)


@triton.jit
def by_element(raw, b):
    """Bounds that differ from element to element choose the map by which of them are finite. A NaN bound makes NaN."""
    s = sigmoid_at(raw)
    no_lower = b.lower == -INFINITY
    no_upper = b.upper == INFINITY
    with_lower = choose(no_upper, lower_only_from(s, b), interval_from(s, b))
    without_lower = choose(no_upper, unbounded(raw, b), upper_only_from(s, b))
    return choose(no_lower, without_lower, with_lower)


@triton.jit
def choose(condition, yes, no):
    return Point(
        x=tl.where(condition, yes.x, no.x),
        x_raw=tl.where(condition, yes.x_raw, no.x_raw),
        x_raw_raw=tl.where(condition, yes.x_raw_raw, no.x_raw_raw),
        x_lower=tl.where(condition, yes.x_lower, no.x_lower),
        x_upper=tl.where(condition, yes.x_upper, no.x_upper),
        x_raw_width=tl.where(condition, yes.x_raw_width, no.x_raw_width),
        log_det=tl.where(condition, yes.log_det, no.log_det),
        log_det_raw=tl.where(condition, yes.log_det_raw, no.log_det_raw),
        log_det_raw_raw=tl.where(condition, yes.log_det_raw_raw, no.log_det_raw_raw),
        log_det_width=tl.where(condition, yes.log_det_width, no.log_det_width),
        log_det_width_width=tl.where(condition, yes.log_det_width_width, no.log_det_width_width),
    )


def _transform_between(lower: Any, upper: Any) -> Any:
    if isinstance(lower, Tensor):
        return by_element
    if lower == -math.inf:
        return unbounded if upper == math.inf else upper_only
    return lower_only if upper == math.inf else interval


KERNELS = kernels(_transform_between)
