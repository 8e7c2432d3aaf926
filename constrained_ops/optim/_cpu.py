"""The compiled step on the CPU: what ``csrc/cpu/step.h`` needs to know of the slots, once, and each step's pointers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _library
from .._checks import Bound
from .._constraints import Box, SimplexOf
from ._plans import Hyper, Slot, _compiled, named_step, register
from ._slots import alike, kind_of, pointer, rows_of


class CpuPlan:
    """A :class:`._plans.Plan`. Reads and writes memory in the layout of the state, once.

    A gradient in another layout is copied first, a parameter with gaps before and after.
    """

    in_graphs: list[Any]

    def __init__(self, slots: Sequence[Slot]) -> None:
        first = slots[0]
        self._plan = _compiled.StepPlan(_name(first.param.dtype), _name(first.exp_avg.dtype))
        self._run = named_step(self._plan.run)
        self._slots = slots
        self._params = [slot.param for slot in slots]
        # Memory stays in being where somebody puts other memory behind a tensor of the state.
        self._memory = [t.untyped_storage() for slot in slots for t in slot if isinstance(t, Tensor)]
        self._bounds: list[Tensor] = []
        self._gaps: list[tuple[Tensor, Tensor]] = []  # parameters, and what stands for them in memory
        self._copied = [i for i, slot in enumerate(slots) if not alike(slot.grad_stride, slot.exp_avg)]
        for slot in slots:
            self._add(slot)
        self._written = [slot.param for slot in slots if not any(slot.param is param for param, _ in self._gaps)]

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
        self._run(list(map(Tensor.data_ptr, grads)), hyper, 1.0 if grad_scale is None else grad_scale.item())
        increment_version(self._written)
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
        if not alike(param.stride(), slot.exp_avg):
            param = torch.empty_like(slot.exp_avg, dtype=param.dtype)
            self._gaps.append((slot.param, param))
        bounds = (record.lower, record.upper) if isinstance(record, Box) else (-math.inf, math.inf)
        (lower, lower_each), (upper, upper_each) = (self._bound(slot, bound) for bound in bounds)
        self._plan.add(
            kind=getattr(_compiled.StepKind, kind_of(slot, record)),
            group=slot.group,
            numel=param.numel(),
            rows=rows_of(slot.exp_avg, record.dim) if isinstance(record, SimplexOf) else (1, 1, 1),
            param=param.data_ptr(),
            exp_avg=slot.exp_avg.data_ptr(),
            exp_avg_sq=slot.exp_avg_sq.data_ptr(),
            max_exp_avg_sq=pointer(slot.max_exp_avg_sq),
            raw=pointer(slot.raw),
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
        if not alike(bound.stride(), slot.exp_avg):
            bound = torch.empty_like(slot.exp_avg, dtype=bound.dtype).copy_(bound)
        self._bounds.append(bound)
        return math.nan, bound.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if _library.has_cpu_library:
    register("cpu", "cpu", CpuPlan)
