"""What every elementwise transform has, the programs made of it, and their launcher: ``csrc/math/elementwise.h``.

A transform is a function ``(raw, bounds) -> Point``; a program reads what it needs and the compiler drops the rest.
"""

# ruff: noqa: N803, N806, RET505, RUF005, SIM300  (Triton: constants in capitals, static branches)

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ABSENT, LINEAR, UNIFORM, Walk, device_of, empty_results
from .numeric import bits_of, clamp, divide, from_bits, log, next_above, next_below, to_compute, to_storage


class Bounds(NamedTuple):
    """The bounds of one element, and the storage format's innermost neighbours of them."""

    lower: Any
    upper: Any
    width: Any
    inverse_width: Any
    log_width: Any
    smallest: Any
    largest: Any


@triton.jit
def bounds_of_element(lower, upper, STORAGE: tl.constexpr):
    width = upper - lower
    smallest, largest = next_above(lower, STORAGE), next_below(upper, STORAGE)
    return Bounds(lower, upper, width, divide(1.0, width), log(width), smallest, largest)


@triton.jit
def bounds_of_scalars(lower, upper, width, inverse_width, log_width, STORAGE: tl.constexpr):
    """Bounds given once for all elements: what double precision computed of them is rounded to T by the launcher."""
    lower, upper = from_bits(lower, STORAGE), from_bits(upper, STORAGE)
    width, inverse_width = from_bits(width, STORAGE), from_bits(inverse_width, STORAGE)
    smallest, largest = next_above(lower, STORAGE), next_below(upper, STORAGE)
    return Bounds(lower, upper, width, inverse_width, from_bits(log_width, STORAGE), smallest, largest)


class Point(NamedTuple):
    """Value, log-derivative and all derivatives up to the second at one raw.

    Derivatives to the two bounds of an interval differ by sign only, so one number to the width w = upper - lower
    stands for both: d/dlower = -d/dw.
    """

    x: Any
    x_raw: Any
    x_raw_raw: Any
    x_lower: Any
    x_upper: Any
    x_raw_width: Any
    log_det: Any
    log_det_raw: Any
    log_det_raw_raw: Any
    log_det_width: Any
    log_det_width_width: Any


# --- Programs: from the point and the operands besides raw and bounds (inp, from 1 on) to the results ----------------


@triton.jit
def forward_program(at, bounds, inp, LAYOUTS: tl.constexpr):
    return clamp(at.x, bounds.smallest, bounds.largest), at.log_det


@triton.jit
def backward_program(at, bounds, inp, LAYOUTS: tl.constexpr):
    """inp: grad_x, grad_log_det; results: grad_raw, grad_lower, grad_upper."""
    grad_x, grad_log_det = inp[1], inp[2]
    grad_raw, grad_lower, grad_upper = grad_x * at.x_raw, grad_x * at.x_lower, grad_x * at.x_upper
    if LAYOUTS[2] != ABSENT:
        grad_raw += grad_log_det * at.log_det_raw
        grad_width = grad_log_det * at.log_det_width
        grad_lower -= grad_width
        grad_upper += grad_width
    return grad_raw, grad_lower, grad_upper


@triton.jit
def double_backward_program(at, bounds, inp, LAYOUTS: tl.constexpr):
    """The derivative of backward along the cotangents of its results.

    inp: cotangent of grad_raw, grad_x, grad_log_det, cotangents of grad_lower, grad_upper;
    results: for grad_x, for grad_log_det, for raw, for lower, for upper.
    """
    along_raw, grad_x, grad_log_det = inp[1], inp[2], inp[3]
    for_grad_x = along_raw * at.x_raw
    for_grad_log_det = along_raw * at.log_det_raw
    for_raw = along_raw * (grad_x * at.x_raw_raw + grad_log_det * at.log_det_raw_raw)
    for_width = along_raw * grad_x * at.x_raw_width
    if LAYOUTS[4] != ABSENT or LAYOUTS[5] != ABSENT:
        along_lower, along_upper = inp[4], inp[5]
        along_width = along_upper - along_lower
        for_grad_x += along_lower * at.x_lower + along_upper * at.x_upper
        for_grad_log_det += along_width * at.log_det_width
        for_raw += along_width * grad_x * at.x_raw_width
        for_width += along_width * grad_log_det * at.log_det_width_width
    return for_grad_x, for_grad_log_det, for_raw, -for_width, for_width


# --- The kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def load(
    pointer,
    LAYOUT: tl.constexpr,
    strides,
    sizes,
    start,
    lanes,
    inside,
    COMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):
    if LAYOUT == ABSENT:
        return tl.zeros(lanes.shape, COMPUTE)
    elif LAYOUT == UNIFORM:
        return tl.load(pointer)
    elif LAYOUT == LINEAR:
        return tl.load(pointer + start + lanes, inside)
    else:
        rest = start + lanes if WIDE else start.to(tl.int32) + lanes
        offset = tl.zeros_like(rest)
        for i in tl.static_range(len(sizes) - 1, -1, -1):
            offset += rest % sizes[i] * strides[i]
            rest = rest // sizes[i]
        return tl.load(pointer + offset, inside)


@triton.jit(do_not_specialize=["lower", "upper", "width", "inverse_width", "log_width"])
def elementwise_kernel(
    results,  # pointers; not written where NEEDED has no bit
    operands,  # pointers: raw, the program's, and lower and upper where WITH_TENSORS
    strides,  # [operand][dim], see Walk
    sizes,  # [dim]
    lower: tl.int64,  # numbers as bits
    upper: tl.int64,
    width: tl.int64,
    inverse_width: tl.int64,
    log_width: tl.int64,
    count,
    TRANSFORM: tl.constexpr,
    PROGRAM: tl.constexpr,
    RESULTS: tl.constexpr,
    NEEDED: tl.constexpr,
    LAYOUTS: tl.constexpr,
    WITH_TENSORS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    STORAGE: tl.constexpr = operands[0].dtype.element_ty
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    OPERANDS: tl.constexpr = len(LAYOUTS)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = start + lanes < count
    inp = ()
    for i in tl.static_range(OPERANDS):
        value = load(operands[i], LAYOUTS[i], strides[i], sizes, start, lanes, inside, COMPUTE, WIDE)
        inp = inp + (to_compute(value),)
    if WITH_TENSORS:
        bounds = bounds_of_element(inp[OPERANDS - 2], inp[OPERANDS - 1], STORAGE)
    else:
        bounds = bounds_of_scalars(lower, upper, width, inverse_width, log_width, STORAGE)
    out = PROGRAM(TRANSFORM(inp[0], bounds), bounds, inp, LAYOUTS)
    for i in tl.static_range(RESULTS):
        if NEEDED >> i & 1:
            value = tl.where(inside, out[i], out[i]).to(COMPUTE)  # some are one number for all
            tl.store(results[i] + start + lanes, to_storage(value, results[i].dtype.element_ty), inside)


# --- The launcher ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _bits_of_scalars(lower: float, upper: float, double: bool) -> tuple[int, ...]:
    """lower, upper, width, 1 / width and log(width), computed in double, as bits of the compute dtype."""
    width = upper - lower
    inverse_width, log_width = (1 / width, math.log(width)) if width > 0 else (math.nan, math.nan)
    return tuple(bits_of(x, double) for x in (lower, upper, width, inverse_width, log_width))


def kernels(transform_between: Callable[[Any, Any], Any]) -> dict[str, Callable[..., Any]]:
    """The kernels of _library.ELEMENTWISE, given what chooses the transform between two bounds, floats or tensors."""

    def run(
        program: Any,
        inputs: Sequence[Tensor | None],
        raw: Tensor,
        bounds: tuple[Any, Any],
        dtypes: Sequence[torch.dtype],
        needed: int = -1,
    ) -> tuple[Tensor, ...]:
        results = empty_results(raw, dtypes, needed)
        dense = next((result for result in results if result.numel()), None)
        if dense is None:
            return results
        with_tensors, double = isinstance(bounds[0], Tensor), raw.dtype == torch.float64
        expanded = [bound.expand(raw.shape) for bound in bounds] if with_tensors else []
        walk = Walk.over(dense, (raw, *inputs, *expanded))
        count, block = raw.numel(), 2048 // raw.element_size()  # 16 bytes of raw for each of 128 threads
        with device_of(raw):
            elementwise_kernel[(triton.cdiv(count, block),)](
                results,
                walk.operands,
                walk.strides,
                walk.sizes,
                *((0,) * 5 if with_tensors else _bits_of_scalars(*bounds, double)),
                count,
                TRANSFORM=transform_between(*bounds),
                PROGRAM=program,
                RESULTS=len(results),
                NEEDED=sum(1 << i for i, result in enumerate(results) if result.numel()),
                LAYOUTS=walk.layouts,
                WITH_TENSORS=with_tensors,
                WIDE=walk.wide,
                BLOCK=block,
                num_warps=4,
            )
        return results

    def forward(raw: Tensor, lower: Any, upper: Any) -> Tensor:
        return run(forward_program, (), raw, (lower, upper), [raw.dtype])[0]

    def forward_log_det(raw: Tensor, lower: Any, upper: Any) -> tuple[Tensor, ...]:
        return run(forward_program, (), raw, (lower, upper), [raw.dtype] * 2)

    def backward(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: float, upper: float) -> Tensor:
        return run(backward_program, (grad_x, grad_log_det), raw, (lower, upper), [raw.dtype])[0]

    def double_backward(
        along_raw: Tensor,
        grad_x: Tensor | None,
        grad_log_det: Tensor | None,
        raw: Tensor,
        lower: float,
        upper: float,
        needed: int,
    ) -> tuple[Tensor, ...]:
        inputs = (along_raw, grad_x, grad_log_det, None, None)
        return run(double_backward_program, inputs, raw, (lower, upper), [raw.dtype] * 3, needed)

    def backward_tensor(
        grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: Tensor, upper: Tensor, needed: int
    ) -> tuple[Tensor, ...]:
        dtypes = [raw.dtype] + [lower.dtype] * 2
        return run(backward_program, (grad_x, grad_log_det), raw, (lower, upper), dtypes, needed)

    def double_backward_tensor(
        along_raw: Tensor | None,
        along_lower: Tensor | None,
        along_upper: Tensor | None,
        grad_x: Tensor | None,
        grad_log_det: Tensor | None,
        raw: Tensor,
        lower: Tensor,
        upper: Tensor,
        needed: int,
    ) -> tuple[Tensor, ...]:
        inputs = (along_raw, grad_x, grad_log_det, along_lower, along_upper)
        dtypes = [raw.dtype] * 3 + [lower.dtype] * 2
        return run(double_backward_program, inputs, raw, (lower, upper), dtypes, needed)

    return {
        "forward": forward,
        "forward_log_det": forward_log_det,
        "backward": backward,
        "double_backward": double_backward,
        "forward.tensor": forward,
        "forward_log_det.tensor": forward_log_det,
        "backward.tensor": backward_tensor,
        "double_backward.tensor": double_backward_tensor,
    }
