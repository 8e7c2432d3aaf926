"""What the compiled steps, on whatever device, have to know of a slot: see ``csrc/step.h``."""

from __future__ import annotations

import math

from torch import Tensor

from .._constraints import Record, SimplexOf
from ._plans import Slot


def kind_of(slot: Slot, record: Record | None) -> str:
    if record is None:
        return "plain"
    if isinstance(record, SimplexOf):
        return "simplex" if slot.raw is None else "softmax"
    each = isinstance(record.lower, Tensor)
    if slot.raw is None:
        return "box_by_element" if each else "box"
    if record.transform == "exponential":
        return "exponential_by_element" if each else "exponential"
    if each:
        return "bounded_by_element"
    names = {(True, True): "interval", (True, False): "lower_only", (False, True): "upper_only"}
    return names[math.isfinite(record.lower), math.isfinite(record.upper)]


def alike(stride: tuple[int, ...], like: Tensor) -> bool:
    """Whether a tensor of ``like``'s shape and that stride lies in memory as ``like`` does."""
    if like.numel() < 2 or stride == like.stride():
        return True
    return all(a == b for a, b, size in zip(stride, like.stride(), like.shape, strict=True) if size > 1)


def rows_of(dense: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, length, inner): how rows along ``dim`` lie in a dense tensor's memory."""
    if dense.dim() == 0:
        return 1, 1, 1
    length, stride = dense.shape[dim], dense.stride(dim)
    if length == 1:
        return dense.numel(), 1, 1
    inner = math.prod(size for size, other in zip(dense.shape, dense.stride(), strict=True) if other < stride)
    return dense.numel() // max(1, length * inner), length, inner


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
