"""x -> the simplex, nearest in a diagonal metric: ``csrc/math/projection.h``, which has the formulas.

Tiles are those of ``simplex.py``; every further reading of the rows is a step of Newton's method.
"""

# ruff: noqa: N803, N806, RET505, SIM300  (Triton: constants in capitals, static branches)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, empty_results, with_layout_of
from .numeric import INFINITY, bits_of, divide, from_bits
from .simplex import launch_rows, load, rows_of_program, store

EPS_32 = tl.constexpr(2.0**-23)
EPS_64 = tl.constexpr(2.0**-52)
READINGS = tl.constexpr(100)  # residual times slope falls to a quarter or less with each: more than any row can take


@triton.jit
def minus_product(a, b, c):
    """a - b c, rounded once."""
    return tl.fma(-b, c, a)


class Ascent(NamedTuple):
    """lambda on its way up: anchor + high + low."""

    anchor: Any
    high: Any
    low: Any
    slope: Any  # the sum of u over the support at the last reading
    going: Any  # 1.0, or 0.0 when done


@triton.jit
def ascent_from(bound, total, WEIGHTED: tl.constexpr):
    """From the largest bound of the row, downwards by more than rounding could have lifted it."""
    EPS: tl.constexpr = EPS_64 if bound.dtype == tl.float64 else EPS_32
    zero = tl.zeros_like(bound)
    infinite = (bound == INFINITY) | (bound == -INFINITY)
    if WEIGHTED:
        below, high = bound - 4 * EPS * tl.abs(bound), zero
    else:
        below, high = bound, zero - total
    return Ascent(tl.where(infinite, float("nan"), below), high, zero, zero + INFINITY, zero + 1.0)


@triton.jit
def step(at, sum, sum_u, total):
    """What a reading found on the support: the sum of z - lambda u, and that of u."""
    EPS: tl.constexpr = EPS_64 if sum.dtype == tl.float64 else EPS_32
    excess = sum - total
    unsettled = (excess > 8 * EPS * total) & ((sum_u < at.slope) | (sum > 2 * total))
    rise = divide(tl.where(unsettled, excess - 4 * EPS * sum, excess), sum_u)
    more = at.low + tl.where(sum_u > 0.0, rise, float("nan"))
    # high + more, and what rounding takes from it (Knuth).
    raised = at.high + more
    added = raised - at.high
    rest = (at.high - (raised - added)) + (more - added)
    going = at.going > 0.0
    return Ascent(
        at.anchor,
        tl.where(going, raised, at.high),
        tl.where(going, rest, at.low),
        tl.where(going, sum_u, at.slope),
        tl.where(going & unsettled, 1.0, 0.0).to(sum.dtype),
    )


@triton.jit
def rest_of(z, u, at, WEIGHTED: tl.constexpr):
    """z - lambda u: positive on the support, where it is y."""
    if WEIGHTED:
        return minus_product(minus_product(z, at.high, u), at.low, u)
    else:
        return (z - at.high) - at.low


@triton.jit
def u_and_x(x, weight, rows, first, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """1 / weight, and x, which is NaN where there is no such weight."""
    tile = load(x, rows, first, BLOCK, -INFINITY)
    if WEIGHTED:
        u = divide(1.0, load(weight, rows, first, BLOCK, 1.0))
        return u, tl.where((u > 0.0) & (u < INFINITY), tile, float("nan"))
    else:
        return tl.full(tile.shape, 1.0, tile.dtype), tile


@triton.jit
def u_and_z(x, weight, rows, first, BLOCK: tl.constexpr, at, WEIGHTED: tl.constexpr):
    u, tile = u_and_x(x, weight, rows, first, BLOCK, WEIGHTED)
    if WEIGHTED:
        return u, minus_product(tile, at.anchor, u)
    else:
        return u, tile - at.anchor


# --- The kernels. END is the constant BLOCK where one block holds a row. ---------------------------------------------


@triton.jit(do_not_specialize=["total_bits"])
def projection_forward_kernel(
    y,
    x,
    weight,
    outer,
    size,
    inner,
    total_bits: tl.int64,  # a number as bits
    WEIGHTED: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    STORAGE: tl.constexpr = x.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    total = from_bits(total_bits, STORAGE)
    bound = tl.full((OUTERS, 1, INNERS), -INFINITY, COMPUTE)
    poison = tl.zeros((OUTERS, 1, INNERS), COMPUTE)  # NaN if one of the bounds is, which a maximum may drop
    for first in range(0, end, BLOCK):
        _, tile = u_and_x(x, weight, rows, first, BLOCK, WEIGHTED)
        if WEIGHTED:
            tile = (tile - total) * load(weight, rows, first, BLOCK, 1.0)
        candidate = tl.max(tile, 1, keep_dims=True)
        bound = tl.where(candidate > bound, candidate, bound)
        poison += tl.sum(tl.where(tile == tile, 0.0, tile), 1, keep_dims=True)
    at = ascent_from(bound + poison, total, WEIGHTED)
    left = READINGS
    while left > 0:
        sum = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
        sum_u = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
        for first in range(0, end, BLOCK):
            u, z = u_and_z(x, weight, rows, first, BLOCK, at, WEIGHTED)
            rest = rest_of(z, u, at, WEIGHTED)
            sum += tl.sum(tl.where(rest > 0.0, rest, 0.0), 1, keep_dims=True)
            sum_u += tl.sum(tl.where(rest > 0.0, u, 0.0), 1, keep_dims=True)
        at = step(at, sum, sum_u, total)
        left = tl.where(tl.max(at.going) > 0.0, left - 1, 0)
    for first in range(0, end, BLOCK):
        u, z = u_and_z(x, weight, rows, first, BLOCK, at, WEIGHTED)
        rest = rest_of(z, u, at, WEIGHTED)
        store(y, rows, first, BLOCK, tl.where(rest <= 0.0, 0.0, rest))


@triton.jit
def on_support(v, y, rows, first, BLOCK: tl.constexpr, fill):
    """v where y is not 0, which a NaN is not, and else 0."""
    return tl.where(load(y, rows, first, BLOCK, 0.0) != 0.0, load(v, rows, first, BLOCK, fill), 0.0)


@triton.jit
def u_on_support(weight, y, rows, first, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    inside = load(y, rows, first, BLOCK, 0.0) != 0.0
    if WEIGHTED:
        return tl.where(inside, divide(1.0, load(weight, rows, first, BLOCK, 1.0)), 0.0)
    else:
        return tl.where(inside, 1.0, 0.0).to(tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def projection_backward_kernel(
    grad_x,
    grad_weight,
    grad_y,
    x,
    y,
    weight,
    outer,
    size,
    inner,
    WEIGHTED: tl.constexpr,
    TO_X: tl.constexpr,
    TO_WEIGHT: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    sum = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    slope = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    taken = tl.zeros((OUTERS, 1, INNERS), COMPUTE)  # by the projection: x - y
    for first in range(0, end, BLOCK):
        u = u_on_support(weight, y, rows, first, BLOCK, WEIGHTED)
        sum += tl.sum(on_support(grad_y, y, rows, first, BLOCK, 0.0) * u, 1, keep_dims=True)
        slope += tl.sum(u, 1, keep_dims=True)
        if TO_WEIGHT:
            rest = on_support(x, y, rows, first, BLOCK, 0.0) - load(y, rows, first, BLOCK, 0.0)
            taken += tl.sum(rest, 1, keep_dims=True)
    mean = divide(sum, slope)
    multiplier = divide(taken, slope)
    for first in range(0, end, BLOCK):
        inside = load(y, rows, first, BLOCK, 0.0) != 0.0
        grad = tl.where(inside, load(grad_y, rows, first, BLOCK, 0.0) - mean, 0.0)
        if TO_X:
            store(grad_x, rows, first, BLOCK, grad)
        if TO_WEIGHT:
            u = u_on_support(weight, y, rows, first, BLOCK, WEIGHTED)
            store(grad_weight, rows, first, BLOCK, multiplier * u * u * grad)


# --- The launchers ---------------------------------------------------------------------------------------------------


def _run_forward(x: Tensor, weight: Tensor | None, dim: int, total: float) -> Tensor:
    (y,) = empty_results(x, [x.dtype], 1)
    if y.numel():
        operands = [with_layout_of(y, t) for t in (x, x if weight is None else weight)]
        bits = bits_of(total, x.dtype == torch.float64)
        with device_of(x):
            weighted = weight is not None
            options = {"total_bits": bits, "WEIGHTED": weighted, "heavy": weighted}
            launch_rows(projection_forward_kernel, [y], operands, y, dim, **options)
    return y


def _run_backward(
    grad_y: Tensor, x: Tensor | None, y: Tensor, weight: Tensor | None, dim: int, needed: int
) -> tuple[Tensor, Tensor]:
    results = grad_x, grad_weight = empty_results(y, [y.dtype] * 2, needed)
    dense = grad_x if grad_x.numel() else grad_weight
    if dense.numel():
        to_weight = grad_weight.numel() > 0
        given = (grad_y, x if to_weight and x is not None else y, y, y if weight is None else weight)
        options = {"WEIGHTED": weight is not None, "TO_X": grad_x.numel() > 0, "TO_WEIGHT": to_weight}
        with device_of(y):
            operands = [with_layout_of(dense, t) for t in given]
            launch_rows(projection_backward_kernel, results, operands, dense, dim, **options)
    return grad_x, grad_weight


def _forward(x: Tensor, dim: int, total: float) -> Tensor:
    return _run_forward(x, None, dim, total)


def _backward(grad_y: Tensor, y: Tensor, dim: int) -> Tensor:
    return _run_backward(grad_y, None, y, None, dim, 1)[0]


KERNELS = {
    "forward": _forward,
    "forward.weighted": _run_forward,
    "backward": _backward,
    "backward.weighted": _run_backward,
}
