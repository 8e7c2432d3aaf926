"""raw -> the simplex by softmax along a row: ``csrc/math/simplex.h``, which has the formulas.

A dense tensor is [outer, size, inner] in memory, a row being the size elements of one (outer, inner). A program holds a
tile [OUTERS, BLOCK, INNERS] of it and walks the row block by block; where one block holds the row, the loops fold into
straight code and the loads into one.
"""

# ruff: noqa: N803, N806, SIM300  (Triton: constants in capitals)

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import NARROW, device_of, empty_results, with_layout_of
from .numeric import INFINITY, divide, exp_nonpositive, next_above, to_compute, to_storage


@triton.jit
def softmax_weight(raw, largest_raw):
    """x_i before the division by the row's sum."""
    return exp_nonpositive(raw - largest_raw).exp


@triton.jit
def softmax_value(raw, weight, inverse_sum, smallest):
    """A finite raw never gives an exact 0, so that the logarithm of the result is finite; raw = -inf does."""
    x = weight * inverse_sum
    underflow = (x < smallest) & (raw > -INFINITY)
    return tl.where(underflow, smallest, x)


@triton.jit
def softmax_backward(x, shifted_g, mean_g):
    """g shifted by its value at the row's largest x, and its mean <g>."""
    return x * (shifted_g - mean_g)


@triton.jit
def softmax_covariance(shifted_along, mean_along, shifted_g, mean_g):
    """The derivative of sum along_i x_i (g_i - <g>) to raw is x_i (c_i - <c>) with this c; to g it is the map above."""
    return (shifted_along - mean_along) * (shifted_g - mean_g)


class Rows(NamedTuple):
    """The rows of one program."""

    start: Any  # offset of the first
    lanes: Any  # [OUTERS, 1, INNERS] offsets from there
    inside: Any  # [OUTERS, 1, INNERS] whether there is such a row
    size: Any
    inner: Any


@triton.jit
def rows_of_program(outer, size, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr, WIDE: tl.constexpr):
    inner_blocks = tl.cdiv(inner, INNERS)
    first_outer = (tl.program_id(0) // inner_blocks).to(tl.int64) * OUTERS
    first_inner = (tl.program_id(0) % inner_blocks) * INNERS
    o = tl.arange(0, OUTERS)[:, None, None]
    i = tl.arange(0, INNERS)[None, None, :]
    inside = (first_outer + o < outer) & (first_inner + i < inner)
    start = first_outer * size * inner + first_inner
    lanes = o.to(tl.int64) * size * inner + i if WIDE else o * size * inner + i
    return Rows(start, lanes, inside, size, inner)


@triton.jit
def load(pointer, rows, first, BLOCK: tl.constexpr, fill):
    """The tile of the row elements from `first` on, in the compute dtype."""
    k = first + tl.arange(0, BLOCK)[None, :, None]
    tile = tl.load(pointer + rows.start + (rows.lanes + k * rows.inner), rows.inside & (k < rows.size), fill)
    return to_compute(tile)


@triton.jit
def store(pointer, rows, first, BLOCK: tl.constexpr, tile):
    k = first + tl.arange(0, BLOCK)[None, :, None]
    stored = to_storage(tile, pointer.dtype.element_ty)
    tl.store(pointer + rows.start + (rows.lanes + k * rows.inner), stored, rows.inside & (k < rows.size))


# --- Passes over the rows of a program. END is the constant BLOCK where one block holds a row. -----------------------


@triton.jit
def largest_and_inverse_sum(raw, rows, END, OUTERS: tl.constexpr, BLOCK: tl.constexpr, INNERS: tl.constexpr):
    STORAGE: tl.constexpr = raw.dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    largest = tl.full((OUTERS, 1, INNERS), -INFINITY, COMPUTE)
    sum = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    for first in range(0, END, BLOCK):
        tile = load(raw, rows, first, BLOCK, -INFINITY)
        candidate = tl.max(tile, 1, keep_dims=True)
        before = largest
        largest = tl.where(candidate > largest, candidate, largest)
        # As long as all is -inf, any finite number keeps the sum at 0.
        relative_to = tl.where(largest == -INFINITY, 0.0, largest)
        weights = tl.sum(softmax_weight(tile, relative_to), 1, keep_dims=True)
        sum = sum * softmax_weight(before, relative_to) + weights
    return largest, divide(1.0, sum)


@triton.jit
def x_of(raw, rows, first, BLOCK: tl.constexpr, largest, inverse_sum):
    return softmax_weight(load(raw, rows, first, BLOCK, -INFINITY), largest) * inverse_sum


@triton.jit
def at_largest(g, raw, rows, END, BLOCK: tl.constexpr, largest):
    """g where raw is largest; of several such places, the largest g."""
    found = tl.full(largest.shape, -INFINITY, largest.dtype)
    for first in range(0, END, BLOCK):
        is_largest = load(raw, rows, first, BLOCK, -INFINITY) == largest
        candidate = tl.max(tl.where(is_largest, load(g, rows, first, BLOCK, 0.0), -INFINITY), 1, keep_dims=True)
        found = tl.where(candidate > found, candidate, found)
    return found


@triton.jit
def mean_shifted(g, shift, raw, rows, END, BLOCK: tl.constexpr, largest, inverse_sum):
    """<g - shift>"""
    mean = tl.zeros(largest.shape, largest.dtype)
    for first in range(0, END, BLOCK):
        x = x_of(raw, rows, first, BLOCK, largest, inverse_sum)
        mean += tl.sum(x * (load(g, rows, first, BLOCK, 0.0) - shift), 1, keep_dims=True)
    return mean


# --- The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def softmax_forward_kernel(
    x,
    raw,
    outer,
    size,
    inner,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    largest, inverse_sum = largest_and_inverse_sum(raw, rows, end, OUTERS, BLOCK, INNERS)
    smallest = next_above(tl.zeros((1, 1, 1), largest.dtype), raw.dtype.element_ty)
    for first in range(0, end, BLOCK):
        tile = load(raw, rows, first, BLOCK, -INFINITY)
        store(x, rows, first, BLOCK, softmax_value(tile, softmax_weight(tile, largest), inverse_sum, smallest))


@triton.jit
def softmax_backward_kernel(
    grad_raw,
    grad_x,
    raw,
    outer,
    size,
    inner,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    largest, inverse_sum = largest_and_inverse_sum(raw, rows, end, OUTERS, BLOCK, INNERS)
    shift = at_largest(grad_x, raw, rows, end, BLOCK, largest)
    mean = mean_shifted(grad_x, shift, raw, rows, end, BLOCK, largest, inverse_sum)
    for first in range(0, end, BLOCK):
        x = x_of(raw, rows, first, BLOCK, largest, inverse_sum)
        store(grad_raw, rows, first, BLOCK, softmax_backward(x, load(grad_x, rows, first, BLOCK, 0.0) - shift, mean))


@triton.jit
def softmax_double_backward_kernel(
    for_grad_x,
    for_raw,
    along_raw,
    grad_x,
    raw,
    outer,
    size,
    inner,
    WITH_FOR_GRAD_X: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows = rows_of_program(outer, size, inner, OUTERS, INNERS, WIDE)
    end = BLOCK if ONE_BLOCK else size
    largest, inverse_sum = largest_and_inverse_sum(raw, rows, end, OUTERS, BLOCK, INNERS)
    shift_g = at_largest(grad_x, raw, rows, end, BLOCK, largest)
    shift_a = at_largest(along_raw, raw, rows, end, BLOCK, largest)
    mean_g = mean_shifted(grad_x, shift_g, raw, rows, end, BLOCK, largest, inverse_sum)
    mean_a = mean_shifted(along_raw, shift_a, raw, rows, end, BLOCK, largest, inverse_sum)
    mean_c = tl.zeros(largest.shape, largest.dtype)
    for first in range(0, end, BLOCK):
        x = x_of(raw, rows, first, BLOCK, largest, inverse_sum)
        g = load(grad_x, rows, first, BLOCK, 0.0) - shift_g
        a = load(along_raw, rows, first, BLOCK, 0.0) - shift_a
        mean_c += tl.sum(x * softmax_covariance(a, mean_a, g, mean_g), 1, keep_dims=True)
    for first in range(0, end, BLOCK):
        x = x_of(raw, rows, first, BLOCK, largest, inverse_sum)
        g = load(grad_x, rows, first, BLOCK, 0.0) - shift_g
        a = load(along_raw, rows, first, BLOCK, 0.0) - shift_a
        c = softmax_covariance(a, mean_a, g, mean_g)
        if WITH_FOR_GRAD_X:
            store(for_grad_x, rows, first, BLOCK, softmax_backward(x, a, mean_a))
        store(for_raw, rows, first, BLOCK, softmax_backward(x, c, mean_c))


# --- The launcher ----------------------------------------------------------------------------------------------------


def _most_warps(kernel: Any) -> int:
    """A block has at most 1024 threads; some devices have 64 of them in a warp."""
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        return 32
    return 1024 // triton.runtime.driver.active.get_current_target().warp_size


def launch_rows(
    kernel: Any,
    results: Sequence[Tensor],
    operands: Sequence[Tensor],
    dense: Tensor,
    dim: int,
    heavy: bool = False,
    tile: int = 8192,
    **options: Any,
) -> None:
    """Run a kernel on tensors of the layout of `dense`, empty ones excepted; a heavy one with twice the registers.

    `tile`: at most so many elements at a time.
    """
    size = dense.size(dim) if dense.dim() else 1
    inner = dense.stride(dim) if size > 1 else 1
    outer = dense.numel() // (size * inner)
    double = dense.dtype == torch.float64
    # Elements in a tile: at least what keeps four warps busy, at most what they hold in registers.
    least, most = (512, 2048) if double else (2048, 8192 if inner == 1 else 4096)
    most = min(most, tile)
    inners = min(triton.next_power_of_2(inner), 32)
    block = min(triton.next_power_of_2(size), most // inners)
    inners = max(inners, min(triton.next_power_of_2(inner), least // block))
    outers = max(1, least // (block * inners))
    warps = outers * block * inners // (128 if double else 512)
    kernel[(triton.cdiv(outer, outers) * triton.cdiv(inner, inners),)](
        *results,
        *operands,
        outer,
        size,
        inner,
        OUTERS=outers,
        BLOCK=block,
        INNERS=inners,
        ONE_BLOCK=size <= block,
        WIDE=max(outers * size, size + block) * inner > NARROW,
        num_warps=min(warps * 2, _most_warps(kernel)) if heavy else warps,
        **options,
    )


def _forward(raw: Tensor, dim: int) -> Tensor:
    (x,) = empty_results(raw, [raw.dtype], 1)
    if x.numel():
        with device_of(raw):
            launch_rows(softmax_forward_kernel, [x], [with_layout_of(x, raw)], x, dim)
    return x


def _backward(grad_x: Tensor, raw: Tensor, dim: int, _: Tensor | None = None) -> Tensor:
    (grad_raw,) = empty_results(raw, [raw.dtype], 1)
    if grad_raw.numel():
        operands = [with_layout_of(grad_raw, t) for t in (grad_x, raw)]
        with device_of(raw):
            launch_rows(softmax_backward_kernel, [grad_raw], operands, grad_raw, dim)
    return grad_raw


def _double_backward(along_raw: Tensor, grad_x: Tensor, raw: Tensor, dim: int, needed: int) -> tuple[Tensor, ...]:
    """Results: for grad_x, for raw."""
    for_grad_x, for_raw = empty_results(raw, [raw.dtype] * 2, needed)
    if for_raw.numel():
        operands = [with_layout_of(for_raw, t) for t in (along_raw, grad_x, raw)]
        results, with_for_grad_x = [for_grad_x, for_raw], for_grad_x.numel() > 0
        with device_of(raw):
            launch_rows(
                softmax_double_backward_kernel, results, operands, for_raw, dim, WITH_FOR_GRAD_X=with_for_grad_x
            )
    elif for_grad_x.numel():
        for_grad_x = _backward(along_raw, raw, dim)
    return for_grad_x, for_raw


KERNELS = {"forward": _forward, "backward": _backward, "double_backward": _double_backward}
