"""raw -> the simplex by stick-breaking; the formulas are in ``csrc/math/bijection.h``.

The derivatives take sums from the end of a row on, for which a first walk from its beginning leaves where it stood at
each block.
"""

# ruff: noqa: N803, N806, SIM300  (Triton: constants in capitals, static branches)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bijection_rows import (
    kept_positive,
    load_number,
    load_raw,
    raw_rows_of,
    row_numbers,
    store_number,
    store_raw,
    sum_before,
)
from .numeric import divide, exp, exp_nonpositive, log, log1p_unit, next_above, to_compute
from .simplex import load, rows_of_program, store


class Break(NamedTuple):
    taken: Any
    left: Any
    log_taken: Any
    log_left: Any
    rest: Any


@triton.jit
def broken(raw, raw_rows, first, BLOCK: tl.constexpr):
    """The breaks from ``first`` on; after the last one nothing is taken and all left."""
    value = load_raw(raw, raw_rows, first, BLOCK)
    k = first + tl.arange(0, BLOCK)[None, :, None]
    breaks = k < raw_rows.size
    rest = tl.where(breaks, raw_rows.size - k, 1).to(value.dtype)
    odds = value - log(rest)
    most = odds > 0.0
    e = exp(tl.where(most, -value, value))  # not of the odds, which are rounded where they are large
    ratio = tl.where(most, e * rest, divide(e, rest))
    q = tl.where(ratio > 1.0, 1.0, ratio)
    larger = divide(1.0, 1.0 + q)
    smaller = q * larger
    log1p = log1p_unit(q)
    return Break(
        tl.where(breaks, tl.where(most, larger, smaller), 0.0),
        tl.where(breaks, tl.where(most, smaller, larger), 1.0),
        tl.where(breaks, tl.where(most, 0.0, odds) - log1p, 0.0),
        tl.where(breaks, -tl.where(most, odds, 0.0) - log1p, 0.0),
        rest,
    )


@triton.jit
def parts_of(at, raw_rows, first, BLOCK: tl.constexpr):
    """What each element of x gets of the stick that is left: the last one all."""
    k = first + tl.arange(0, BLOCK)[None, :, None]
    return tl.where(k == raw_rows.size, 1.0, at.taken)


@triton.jit
def stick_breaking_forward_kernel(
    x,
    log_det,
    raw,
    outer,
    size,
    inner,
    WITH_LOG_DET: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    STORAGE: tl.constexpr = raw.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    raw_rows = raw_rows_of(rows, outer, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    smallest = next_above(tl.zeros((1, 1, 1), COMPUTE), STORAGE)
    carry = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    value = carry
    for first in range(0, end, BLOCK):
        at = broken(raw, raw_rows, first, BLOCK)
        sums = sum_before(at.log_left, carry)
        carry = sums.total
        remaining = exp_nonpositive(sums.before).exp
        store(x, rows, first, BLOCK, kept_positive(parts_of(at, raw_rows, first, BLOCK) * remaining, smallest))
        if WITH_LOG_DET:
            value += tl.sum(at.log_taken + at.rest * at.log_left, 1, keep_dims=True)
    if WITH_LOG_DET:
        store_number(log_det, rows, row_numbers(rows, outer, inner, OUTERS, INNERS), value)


@triton.jit
def stick_breaking_backward_kernel(
    for_grad_x,
    for_grad_log_det,
    grad_raw,
    along,
    grad_x,
    grad_log_det,
    raw,
    carries,  # two for each block of each row, where rows have more than one
    outer,
    size,
    inner,
    WITH_ALONG: tl.constexpr,  # double backward
    WITH_G: tl.constexpr,
    WITH_H: tl.constexpr,
    FOR_G: tl.constexpr,
    FOR_H: tl.constexpr,
    FOR_RAW: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if raw.dtype.element_ty == tl.float64 else tl.float32
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    raw_rows = raw_rows_of(rows, outer, inner, OUTERS, INNERS, WIDE)
    numbers = row_numbers(rows, outer, inner, OUTERS, INNERS)
    blocks = 1 if ONE_BLOCK else tl.cdiv(size, BLOCK)
    zero = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    carry, carry_along = zero, zero
    if not ONE_BLOCK:
        for block in range(0, blocks):
            slot = carries + (numbers * blocks + block) * 2
            tl.store(slot, carry, rows.inside)
            at = broken(raw, raw_rows, block * BLOCK, BLOCK)
            carry += tl.sum(at.log_left, 1, keep_dims=True)
            if WITH_ALONG:
                tl.store(slot + 1, carry_along, rows.inside)
                a = load_raw(along, raw_rows, block * BLOCK, BLOCK)
                carry_along += tl.sum(at.taken * a, 1, keep_dims=True)
        tl.debug_barrier()  # what was stored is read by other threads
    last_g, h = zero, zero
    if WITH_G:
        last = rows.start + (rows.lanes + raw_rows.size * rows.inner)
        last_g = to_compute(tl.load(grad_x + last, rows.inside, 0.0))
    if WITH_H:
        h = load_number(grad_log_det, rows, numbers)
    after_u, after_e, value = zero, zero, zero
    for step in range(0, blocks):
        block = blocks - 1 - step
        first = block * BLOCK
        carry, carry_along = zero, zero
        if not ONE_BLOCK:
            slot = carries + (numbers * blocks + block) * 2
            carry = tl.load(slot, rows.inside, 0.0)
            if WITH_ALONG:
                carry_along = tl.load(slot + 1, rows.inside, 0.0)
        at = broken(raw, raw_rows, first, BLOCK)
        x = parts_of(at, raw_rows, first, BLOCK) * exp_nonpositive(sum_before(at.log_left, carry).before).exp
        k = first + tl.arange(0, BLOCK)[None, :, None]
        breaks = k < raw_rows.size
        e = x * 0.0  # the gradient from x
        if WITH_G:
            u = tl.where(breaks, x * (load(grad_x, rows, first, BLOCK, 0.0) - last_g), 0.0)
            e = at.left * u - at.taken * (after_u + (tl.cumsum(u, 1, reverse=True) - u))
            after_u += tl.sum(u, 1, keep_dims=True)
        of_log_det = at.left - at.rest * at.taken
        if WITH_ALONG:
            a = load_raw(along, raw_rows, first, BLOCK)
            before = sum_before(at.taken * a, carry_along).before
            if FOR_G:
                store(for_grad_x, rows, first, BLOCK, x * (tl.where(breaks, at.left, 0.0) * a - before))
            if FOR_H:
                value += tl.sum(tl.where(breaks, a * of_log_det, 0.0), 1, keep_dims=True)
            if FOR_RAW:
                v = a * e
                later = after_e + (tl.cumsum(v, 1, reverse=True) - v)
                after_e += tl.sum(v, 1, keep_dims=True)
                second = e * (a * (at.left - at.taken) - before) - at.taken * later
                second -= h * a * (at.rest + 1.0) * at.taken * at.left
                store_raw(grad_raw, raw_rows, first, BLOCK, second)
        else:
            store_raw(grad_raw, raw_rows, first, BLOCK, e + h * of_log_det)
    if FOR_H:
        store_number(for_grad_log_det, rows, numbers, value)
