"""What every launcher needs: the tensor's device, results, and how operands lie in memory."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device and stream: make them the tensor's. The CPU has the interpreter."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def empty_results(raw: Tensor, dtypes: Sequence[torch.dtype], needed: int) -> tuple[Tensor, ...]:
    """Results of raw's layout, empty tensors where ``needed`` has no bit."""
    return tuple(
        torch.empty_like(raw, dtype=dtype) if needed >> i & 1 else raw.new_empty(0, dtype=dtype)
        for i, dtype in enumerate(dtypes)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold their elements in the same places, counted from their first."""
    if a.stride() == b.stride():
        return True
    return all(s == t or n == 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def with_layout_of(dense: Tensor, tensor: Tensor) -> Tensor:
    return tensor if same_layout(tensor, dense) else torch.empty_like(dense, dtype=tensor.dtype).copy_(tensor)


# How an operand lies relative to dense results.
LINEAR = tl.constexpr(0)  # as they do
UNIFORM = tl.constexpr(1)  # one element for all
STRIDED = tl.constexpr(2)
ABSENT = tl.constexpr(3)  # nowhere: it is zero

_MAX_DIMS = 5
NARROW = 2**31 - 2**16  # what 32-bit offsets reach, a block to spare


class Walk(NamedTuple):
    """How a kernel reaches its operands in the order in which dense results lie in memory."""

    operands: tuple[Tensor, ...]  # any tensor where ABSENT
    layouts: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # of the operands that are STRIDED
    sizes: tuple[int, ...]  # of the dimensions that strides belong to, the slowest first
    wide: bool  # whether an offset needs 64 bits

    @classmethod
    def over(cls, dense: Tensor, operands: Sequence[Tensor | None]) -> "Walk":
        present = [operand for operand in operands if operand is not None]
        if all(same_layout(operand, dense) for operand in present):
            sizes, strides, layouts = (), [()] * len(present), [LINEAR.value] * len(present)
        else:
            sizes, strides = _collapse(dense, present)
            if len(sizes) > _MAX_DIMS:
                return cls.over(
                    dense, [operand if operand is None else with_layout_of(dense, operand) for operand in operands]
                )
            layouts = [_layout(sizes, of) for of in strides]
        reach = max(sum((size - 1) * step for size, step in zip(sizes, of, strict=True)) for of in strides)
        found = zip(present, layouts, strides, strict=True)
        walks = [(dense, ABSENT.value, ()) if operand is None else next(found) for operand in operands]
        return cls(
            operands=tuple(operand for operand, _, _ in walks),
            layouts=tuple(layout for _, layout, _ in walks),
            strides=tuple(of if layout == STRIDED.value else () for _, layout, of in walks),
            sizes=sizes if STRIDED.value in layouts else (),
            wide=STRIDED.value in layouts and max(dense.numel(), reach) > NARROW,
        )


def _collapse(dense: Tensor, operands: Sequence[Tensor]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes, and every operand's strides, with neighbouring dimensions merged where all operands walk them as one."""
    dims: list[tuple[int, list[int]]] = []
    for dim in sorted(range(dense.dim()), key=dense.stride, reverse=True):
        size, steps = dense.size(dim), [operand.stride(dim) for operand in operands]
        if size == 1:
            continue
        if dims and all(slower == step * size for slower, step in zip(dims[-1][1], steps, strict=True)):
            size *= dims.pop()[0]
        dims.append((size, steps))
    return tuple(size for size, _ in dims), [tuple(steps[i] for _, steps in dims) for i in range(len(operands))]


def _layout(sizes: Sequence[int], strides: Sequence[int]) -> int:
    if not any(strides):
        return UNIFORM.value
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != step:
            return STRIDED.value
        step *= size
    return LINEAR.value
