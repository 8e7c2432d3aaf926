"""raw -> the simplex by isometric log-ratios; the formulas are in ``csrc/math/bijection.h``."""

# ruff: noqa: N803, N806, SIM300  (Triton: constants in capitals, static branches)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bijection_rows import (
    Ends,
    kept_positive,
    load_number,
    load_raw,
    raw_rows_of,
    row_numbers,
    store_number,
    store_raw,
    sum_before,
)
from .numeric import INFINITY, divide, log, next_above, square_root
from .simplex import load, rows_of_program, softmax_weight, store


@triton.jit
def counted(first, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    return (first + tl.arange(0, BLOCK)[None, :, None]).to(COMPUTE)


@triton.jit
def ilr_scale(n):
    """w_n / raw_n, 0 for n = 0."""
    return tl.where(n > 0.0, divide(1.0, square_root(tl.where(n > 0.0, n * (n + 1.0), 1.0))), 0.0).to(n.dtype)


@triton.jit
def logits(raw, rows, raw_rows, first, BLOCK: tl.constexpr, carry, fill):
    """z from ``first`` on, and the sum of w up to the end of the block."""
    n = counted(first, BLOCK, carry.dtype)
    w = load_raw(raw, raw_rows, first - 1, BLOCK) * ilr_scale(n)
    sums = sum_before(w, carry)
    k = first + tl.arange(0, BLOCK)[None, :, None]
    return Ends(tl.where(k < rows.size, -(sums.before + (n + 1.0) * w), fill), sums.total)


class Peak(NamedTuple):
    largest: Any
    sum: Any  # of exp(z - largest)
    w: Any  # the sum of w


@triton.jit
def find_peak(
    raw, rows, raw_rows, END, OUTERS: tl.constexpr, BLOCK: tl.constexpr, INNERS: tl.constexpr, COMPUTE: tl.constexpr
):
    zero = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    largest, sum, carry = zero - INFINITY, zero, zero
    for first in range(0, END, BLOCK):
        z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
        before = largest
        candidate = tl.max(z.before, 1, keep_dims=True)
        largest = tl.where(candidate > largest, candidate, largest)
        sum = sum * softmax_weight(before, largest) + tl.sum(softmax_weight(z.before, largest), 1, keep_dims=True)
        carry = z.total
    return Peak(largest, sum, carry)


class Means(NamedTuple):
    """Of g and of the logits along, less what they are at the largest x."""

    g_there: Any
    along_there: Any
    g: Any
    along: Any
    w_along: Any  # the sum of w along


@triton.jit
def means(
    raw,
    along,
    grad_x,
    rows,
    raw_rows,
    END,
    peak,
    WITH_G: tl.constexpr,
    WITH_ALONG: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
):
    zero = peak.sum - peak.sum
    g_there, along_there = zero - INFINITY, zero - INFINITY
    carry, carry_along = zero, zero
    for first in range(0, END, BLOCK):
        z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
        is_largest = z.before == peak.largest
        carry = z.total
        if WITH_G:
            g = tl.where(is_largest, load(grad_x, rows, first, BLOCK, 0.0), -INFINITY)
            candidate = tl.max(g, 1, keep_dims=True)
            g_there = tl.where(candidate > g_there, candidate, g_there)
        if WITH_ALONG:
            b = logits(along, rows, raw_rows, first, BLOCK, carry_along, 0.0)
            candidate = tl.max(tl.where(is_largest, b.before, -INFINITY), 1, keep_dims=True)
            along_there = tl.where(candidate > along_there, candidate, along_there)
            carry_along = b.total
    sum_g, sum_along = zero, zero
    carry, w_along, carry_along = zero, carry_along, zero
    for first in range(0, END, BLOCK):
        z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
        weight = softmax_weight(z.before, peak.largest)
        carry = z.total
        if WITH_G:
            sum_g += tl.sum(weight * (load(grad_x, rows, first, BLOCK, 0.0) - g_there), 1, keep_dims=True)
        if WITH_ALONG:
            b = logits(along, rows, raw_rows, first, BLOCK, carry_along, 0.0)
            sum_along += tl.sum(weight * (b.before - along_there), 1, keep_dims=True)
            carry_along = b.total
    return Means(g_there, along_there, divide(sum_g, peak.sum), divide(sum_along, peak.sum), w_along)


@triton.jit
def centered_g(grad_x, rows, first, BLOCK: tl.constexpr, z, of, mean_g, WITH_G: tl.constexpr):
    """g less its mean, finite outside of rows too."""
    g = load(grad_x, rows, first, BLOCK, 0.0) - of.g_there if WITH_G else z.before * 0.0
    return tl.where(z.before > -INFINITY, g, 0.0) - mean_g


@triton.jit
def ilr_forward_kernel(
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
    peak = find_peak(raw, rows, raw_rows, end, OUTERS, BLOCK, INNERS, COMPUTE)
    if WITH_LOG_DET:
        count = (tl.zeros((OUTERS, 1, INNERS), tl.int32) + size).to(COMPUTE)
        value = 0.5 * log(count) - count * (peak.w + peak.largest + log(peak.sum))
        store_number(log_det, rows, row_numbers(rows, outer, inner, OUTERS, INNERS), value)
    inverse_sum = divide(1.0, peak.sum)
    smallest = next_above(tl.zeros((1, 1, 1), COMPUTE), STORAGE)
    carry = peak.sum - peak.sum
    for first in range(0, end, BLOCK):
        z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
        carry = z.total
        store(x, rows, first, BLOCK, kept_positive(softmax_weight(z.before, peak.largest) * inverse_sum, smallest))


@triton.jit
def ilr_backward_kernel(
    for_grad_x,
    for_grad_log_det,
    grad_raw,
    along,
    grad_x,
    grad_log_det,
    raw,
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
    end = BLOCK if ONE_BLOCK else size
    peak = find_peak(raw, rows, raw_rows, end, OUTERS, BLOCK, INNERS, COMPUTE)
    of = means(raw, along, grad_x, rows, raw_rows, end, peak, WITH_G, WITH_ALONG, OUTERS, BLOCK, INNERS)
    zero = peak.sum - peak.sum
    count = (tl.zeros((OUTERS, 1, INNERS), tl.int32) + size).to(COMPUTE)
    if FOR_H:
        store_number(for_grad_log_det, rows, numbers, -count * (of.w_along + of.along_there + of.along))
    mean_g = of.g
    if WITH_H:  # as if the mean of g were larger
        mean_g += load_number(grad_log_det, rows, numbers) * count
    inverse_sum = divide(1.0, peak.sum)
    mean_c = zero
    carry, carry_along, carry_u = zero, zero, zero
    if WITH_ALONG:
        for first in range(0, end, BLOCK):
            z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
            b = logits(along, rows, raw_rows, first, BLOCK, carry_along, 0.0)
            carry, carry_along = z.total, b.total
            g = centered_g(grad_x, rows, first, BLOCK, z, of, mean_g, WITH_G)
            c = ((b.before - of.along_there) - of.along) * g
            mean_c += tl.sum(softmax_weight(z.before, peak.largest) * inverse_sum * c, 1, keep_dims=True)
        carry, carry_along = zero, zero
    for first in range(0, end, BLOCK):
        z = logits(raw, rows, raw_rows, first, BLOCK, carry, -INFINITY)
        carry = z.total
        x = softmax_weight(z.before, peak.largest) * inverse_sum
        u = x * centered_g(grad_x, rows, first, BLOCK, z, of, mean_g, WITH_G)
        if WITH_ALONG:
            b = logits(along, rows, raw_rows, first, BLOCK, carry_along, 0.0)
            carry_along = b.total
            a = (b.before - of.along_there) - of.along
            if FOR_G:
                store(for_grad_x, rows, first, BLOCK, x * a)
            u = u * a - x * mean_c
        if FOR_RAW:
            sums = sum_before(u, carry_u)
            carry_u = sums.total
            n = counted(first, BLOCK, COMPUTE)
            store_raw(grad_raw, raw_rows, first - 1, BLOCK, (sums.before - n * u) * ilr_scale(n))
