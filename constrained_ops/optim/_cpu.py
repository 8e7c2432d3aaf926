"""The compiled step on the CPU: what ``csrc/cpu/step.h`` needs to know of the slots, once, and each step's pointers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _library
from .._checks import Bound
from .._constraints import Box, Record, SimplexOf
from ._plans import Hyper, Slot, _compiled, register


class CpuPlan:
    """A :class:`._plans.Plan`. Reads and writes memory in the layout of the state, once.

    A gradient in another layout is copied first, a parameter with gaps before and after.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        first = slots[0]
        self._plan = _compiled.StepPlan(_name(first.param.dtype), _name(first.exp_avg.dtype))
        self._slots = slots
        self._params = [slot.param for slot in slots]
        # Memory stays in being where somebody puts other memory behind a tensor of the state.
        self._memory = [t.untyped_storage() for slot in slots for t in slot if isinstance(t, Tensor)]
        self._bounds: list[Tensor] = []
        self._gaps: list[tuple[Tensor, Tensor]] = []  # parameters, and what stands for them in memory
        self._copied = [i for i, slot in enumerate(slots) if not _alike(slot.grad_stride, slot.exp_avg)]
        for slot in slots:
            if any(
                size > 1 and stride == 0 for size, stride in zip(slot.param.shape, slot.param.stride(), strict=True)
            ):
                raise RuntimeError(f"a parameter of shape {tuple(slot.param.shape)} overlaps itself in memory")
            self._add(slot)

    def run(
        self,
        grads: Sequence[Tensor],
        hyper: Sequence[Hyper],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if found_inf is not None and found_inf.item():
            return
        if self._copied:
            grads = list(grads)
            for i in self._copied:
                grads[i] = torch.empty_like(self._slots[i].exp_avg, dtype=grads[i].dtype).copy_(grads[i].detach())
        if self._gaps:
            self._fill(from_params=True)
        self._plan.run(list(map(Tensor.data_ptr, grads)), hyper, 1.0 if grad_scale is None else grad_scale.item())
        increment_version(self._params)
        if self._gaps:
            self._fill(from_params=False)

    @torch.no_grad()
    def _fill(self, from_params: bool) -> None:
        for param, dense in self._gaps:
            if from_params:
                dense.copy_(param)
            else:
                param.copy_(dense)

    def _add(self, slot: Slot) -> None:
        param, record = slot.param, slot.constraint
        if not _alike(param.stride(), slot.exp_avg):
            param = torch.empty_like(slot.exp_avg, dtype=param.dtype)
            self._gaps.append((slot.param, param))
        bounds = (record.lower, record.upper) if isinstance(record, Box) else (-math.inf, math.inf)
        (lower, lower_each), (upper, upper_each) = (self._bound(slot, bound) for bound in bounds)
        self._plan.add(
            kind=getattr(_compiled.StepKind, _kind(slot, record)),
            group=slot.group,
            numel=param.numel(),
            rows=_rows(slot.exp_avg, record.dim) if isinstance(record, SimplexOf) else (1, 1, 1),
            param=param.data_ptr(),
            exp_avg=slot.exp_avg.data_ptr(),
            exp_avg_sq=slot.exp_avg_sq.data_ptr(),
            max_exp_avg_sq=_pointer(slot.max_exp_avg_sq),
            raw=_pointer(slot.raw),
            step=slot.step.data_ptr(),
            lower=lower,
            upper=upper,
            lower_each=lower_each,
            upper_each=upper_each,
            total=record.total if isinstance(record, SimplexOf) else 0.0,
        )

    def _bound(self, slot: Slot, bound: Bound) -> tuple[float, int]:
        """A bound for all elements, and the address of one for each in the layout of the state; 0 if all share one."""
        if not isinstance(bound, Tensor):
            return bound, 0
        if not any(bound.stride()):
            return (bound.reshape(-1)[0].item() if bound.numel() else 0.0), 0
        if not _alike(bound.stride(), slot.exp_avg):
            bound = torch.empty_like(slot.exp_avg, dtype=bound.dtype).copy_(bound)
        self._bounds.append(bound)
        return math.nan, bound.data_ptr()


def _kind(slot: Slot, record: Record | None) -> str:
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


def _alike(stride: tuple[int, ...], like: Tensor) -> bool:
    """Whether a tensor of ``like``'s shape and that stride lies in memory as ``like`` does."""
    if like.numel() < 2 or stride == like.stride():
        return True
    return all(a == b for a, b, size in zip(stride, like.stride(), like.shape, strict=True) if size > 1)


def _rows(dense: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, length, inner): how rows along ``dim`` lie in a dense tensor's memory."""
    if dense.dim() == 0:
        return 1, 1, 1
    length, stride = dense.shape[dim], dense.stride(dim)
    if length == 1:
        return dense.numel(), 1, 1
    inner = math.prod(size for size, other in zip(dense.shape, dense.stride(), strict=True) if other < stride)
    return dense.numel() // max(1, length * inner), length, inner


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if _library.has_cpu_library:
    register("cpu", "cpu", CpuPlan)
