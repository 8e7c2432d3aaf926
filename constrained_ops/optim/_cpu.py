"""The compiled step on the CPU: what ``csrc/cpu/step.h`` needs to know of the slots, once, and each step's pointers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _library
from .._constraints import SimplexOf
from ._plans import Hyper, Slot, _compiled, named_step, register
from ._slots import DensePlan, bounds_of, for_all, kind_of, pointer, rows_of


def cache_bytes() -> int:
    """Steps that pass over more than half of this write what they do not read past the caches."""
    return _compiled.cache_bytes()


class CpuPlan(DensePlan):
    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots)
        self._plan = _compiled.StepPlan(_name(slots[0].param.dtype), _name(slots[0].exp_avg.dtype), cache_bytes())
        self._run = named_step(self._plan.run)
        # Memory stays in being where somebody puts other memory behind a tensor of the state.
        self._memory = [t.untyped_storage() for slot in slots for t in slot if isinstance(t, Tensor)]
        for slot, param in zip(slots, self._params, strict=True):
            self._add(slot, param)

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
            grads = self._dense_grads(grads)
        if self._gaps:
            self._fill_gaps()
        self._run(list(map(Tensor.data_ptr, grads)), hyper, 1.0 if grad_scale is None else grad_scale.item())
        increment_version(self._written)
        if self._gaps:
            self._write_back()

    def _add(self, slot: Slot, param: Tensor) -> None:
        record = slot.constraint
        lower, upper = bounds_of(record)
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
            lower=for_all(lower),
            upper=for_all(upper),
            lower_each=pointer(self._by_element(slot, lower)),
            upper_each=pointer(self._by_element(slot, upper)),
            total=record.total if isinstance(record, SimplexOf) else 0.0,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if _library.has_cpu_library:
    register("cpu", "cpu", CpuPlan)
