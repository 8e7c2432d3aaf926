"""What the compiled plans, on whatever device, share: what to know of a slot (``csrc/step.h``), and its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import Bound
from .._constraints import Box, Record, SimplexOf
from ._plans import Slot


class DensePlan:
    """A :class:`._plans.Plan` whose kernels read and write memory in the layout of the state, once.

    Gradients in another layout are copied before a step, parameters with gaps before and after, and bounds by element
    in another layout once for all; nothing else is allocated that grows with the parameters.
    """

    in_graphs: list[Any]

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._bounds: list[Tensor] = []  # by element; kept because kernels have their addresses
        self._copied = [i for i, slot in enumerate(slots) if not alike(slot.grad_stride, slot.exp_avg)]
        self._params = [_dense_param(slot) for slot in slots]  # or what stands for them in memory
        pairs = [(slot.param, dense) for slot, dense in zip(slots, self._params, strict=True)]
        self._gaps = [(param, dense) for param, dense in pairs if dense is not param]
        self._written = [param for param, dense in pairs if dense is param]

    @torch.no_grad()
    def _dense_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        dense = list(grads)
        for i in self._copied:
            dense[i] = torch.empty_like(self.slots[i].exp_avg, dtype=grads[i].dtype).copy_(grads[i])
        return dense

    @torch.no_grad()
    def _fill_gaps(self) -> None:
        for param, dense in self._gaps:
            dense.copy_(param)

    @torch.no_grad()
    def _write_back(self) -> None:
        for param, dense in self._gaps:
            param.copy_(dense)

    def _by_element(self, slot: Slot, bound: Bound) -> Tensor | None:
        """A bound for each element, in the layout of the state; None if one holds for all."""
        if not isinstance(bound, Tensor) or not any(bound.stride()):
            return None
        if not alike(bound.stride(), slot.exp_avg):
            bound = torch.empty_like(slot.exp_avg, dtype=bound.dtype).copy_(bound)
        self._bounds.append(bound)
        return bound


def _dense_param(slot: Slot) -> Tensor:
    if alike(slot.param.stride(), slot.exp_avg):
        return slot.param
    return torch.empty_like(slot.exp_avg, dtype=slot.param.dtype)


def bounds_of(record: Record | None) -> tuple[Bound, Bound]:
    return (record.lower, record.upper) if isinstance(record, Box) else (-math.inf, math.inf)


def for_all(bound: Bound) -> float:
    """The bound of all elements, if they share one."""
    if not isinstance(bound, Tensor):
        return bound
    return bound[(0,) * bound.dim()].item() if bound.numel() else math.nan


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
