"""raw -> the simplex by the bijections of ``csrc/math/bijection.h``, which has the formulas.

Tiles are those of ``simplex.py``, over the rows of x; those of raw are one shorter. Sums along a row go on from block
to block. Stick-breaking's derivatives take sums from the end of a row on, for which a first walk from its beginning
leaves where it stood at each block.
"""

# ruff: noqa: N803, N806, SIM300  (Triton: constants in capitals, static branches)

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import BIJECTION_RESULTS, compute_dtype, empty_bijection
from .launch import device_of, with_layout_of
from .numeric import (
    INFINITY,
    divide,
    exp,
    exp_nonpositive,
    log,
    log1p_unit,
    next_above,
    square_root,
    to_compute,
    to_storage,
)
from .simplex import launch_rows, load, rows_of_program, softmax_weight, store


@triton.jit
def kept_positive(x, smallest):
    """A result strictly above 0, NaN if it was one."""
    return tl.where(x < smallest, smallest, x)


class Ends(NamedTuple):
    """A sum of what comes before each element of a block, and of all up to its end."""

    before: Any
    total: Any


@triton.jit
def sum_before(v, carry):
    """``carry``: the sum of all blocks before."""
    return Ends(carry + (tl.cumsum(v, 1) - v), carry + tl.sum(v, 1, keep_dims=True))


@triton.jit
def raw_rows_of(rows, outer, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr, WIDE: tl.constexpr):
    """The same rows of a tensor that is one shorter."""
    return rows_of_program(outer, rows.size - 1, inner, OUTERS, INNERS, WIDE)


@triton.jit
def load_raw(pointer, rows, first, BLOCK: tl.constexpr):
    """As ``load``, of elements that may come before the first."""
    k = first + tl.arange(0, BLOCK)[None, :, None]
    inside = rows.inside & (k >= 0) & (k < rows.size)
    return to_compute(tl.load(pointer + rows.start + (rows.lanes + k * rows.inner), inside, 0.0))


@triton.jit
def store_raw(pointer, rows, first, BLOCK: tl.constexpr, tile):
    k = first + tl.arange(0, BLOCK)[None, :, None]
    inside = rows.inside & (k >= 0) & (k < rows.size)
    tl.store(pointer + rows.start + (rows.lanes + k * rows.inner), to_storage(tile, pointer.dtype.element_ty), inside)


@triton.jit
def row_numbers(rows, outer, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr):
    """[OUTERS, 1, INNERS] the number of each row."""
    inner_blocks = tl.cdiv(inner, INNERS)
    o = (tl.program_id(0) // inner_blocks).to(tl.int64) * OUTERS + tl.arange(0, OUTERS)[:, None, None]
    i = (tl.program_id(0) % inner_blocks) * INNERS + tl.arange(0, INNERS)[None, None, :]
    return o * inner + i


@triton.jit
def load_number(pointer, rows, numbers):
    return to_compute(tl.load(pointer + numbers, rows.inside, 0.0))


@triton.jit
def store_number(pointer, rows, numbers, number):
    tl.store(pointer + numbers, to_storage(number, pointer.dtype.element_ty), rows.inside)


# --- Isometric log-ratios --------------------------------------------------------------------------------------------


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


# --- Stick-breaking --------------------------------------------------------------------------------------------------


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


# --- The launchers ---------------------------------------------------------------------------------------------------


def _tile(raw: Tensor) -> int:
    """Scans need more registers than sums."""
    return 512 if raw.dtype == torch.float64 else 2048


def _dense(raw: Tensor, dim: int) -> Tensor:
    """A tensor of x's layout, over which rows are walked."""
    return empty_bijection(raw, dim, ("x",))[0]


def _operand(tensor: Tensor | None, raw: Tensor, dim: int, kind: str) -> Tensor:
    """In the layout of a result of that kind; any tensor where there is none."""
    return raw if tensor is None else with_layout_of(empty_bijection(raw, dim, (kind,))[0], tensor)


def _forward(kernel: Any, raw: Tensor, dim: int, with_log_det: bool) -> tuple[Tensor, ...]:
    results = x, _ = empty_bijection(raw, dim, BIJECTION_RESULTS["forward_log_det"], 3 if with_log_det else 1)
    if x.numel():
        with device_of(raw):
            operand = _operand(raw, raw, dim, "raw")
            launch_rows(kernel, results, [operand], x, dim, heavy=True, tile=_tile(raw), WITH_LOG_DET=with_log_det)
    return results


def _backward(
    kernel: Any,
    along: Tensor | None,
    grad_x: Tensor | None,
    grad_log_det: Tensor | None,
    raw: Tensor,
    dim: int,
    needed: int,
) -> tuple[Tensor, ...]:
    results = empty_bijection(raw, dim, BIJECTION_RESULTS["double_backward"], needed)
    if not any(result.numel() for result in results):
        return results
    dense = _dense(raw, dim)
    with device_of(raw):
        operands = [
            _operand(tensor, raw, dim, kind)
            for tensor, kind in ((along, "raw"), (grad_x, "x"), (grad_log_det, "log_det"), (raw, "raw"))
        ]
        if kernel is stick_breaking_backward_kernel:
            operands.append(raw.new_empty(_most_carries(dense, dim), dtype=compute_dtype(raw.dtype)))
        launch_rows(
            kernel,
            results,
            operands,
            dense,
            dim,
            heavy=True,
            tile=_tile(raw),
            WITH_ALONG=along is not None,
            WITH_G=grad_x is not None,
            WITH_H=grad_log_det is not None,
            FOR_G=results[0].numel() > 0,
            FOR_H=results[1].numel() > 0,
            FOR_RAW=results[2].numel() > 0,
        )
    return results


def _most_carries(dense: Tensor, dim: int) -> int:
    """Two for each of the shortest blocks that ``launch_rows`` makes of a row."""
    shortest = 16
    return 2 * (dense.numel() // dense.shape[dim]) * triton.cdiv(dense.shape[dim], shortest)


def _kernels(forward: Any, backward: Any) -> dict[str, Callable[..., Any]]:
    return {
        "forward": lambda raw, dim: _forward(forward, raw, dim, False)[0],
        "forward_log_det": lambda raw, dim: _forward(forward, raw, dim, True),
        "backward": lambda g, h, raw, dim: _backward(backward, None, g, h, raw, dim, 4)[2],
        "double_backward": lambda along, g, h, raw, dim, needed: _backward(backward, along, g, h, raw, dim, needed),
    }


ILR = _kernels(ilr_forward_kernel, ilr_backward_kernel)
STICK_BREAKING = _kernels(stick_breaking_forward_kernel, stick_breaking_backward_kernel)
