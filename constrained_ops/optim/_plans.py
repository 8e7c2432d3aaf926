"""What an optimizer hands to an implementation, and which implementation that is.

A plan is made once from everything that stays as it is from step to step, and then run with what changes. It is made
anew when anything else changed: a plan may keep pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _library
from .._constraints import Record
from ._sharding import is_sharded, local, local_grad

Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int | None]  # with shape, stride, and address or any


class Slot(NamedTuple):
    """One parameter of a plan: tensors of one shape, on one device. Local shards in place of DTensors.

    State lies in memory as ``torch.empty_like(param)`` does: like the parameter, where that has no gaps or overlaps.
    """

    param: Tensor
    exp_avg: Tensor  # state dtype: that of the parameter, or float32 for 16 bits
    exp_avg_sq: Tensor  # state dtype
    max_exp_avg_sq: Tensor | None  # state dtype; there with amsgrad
    step: Tensor  # 0-dim float32, on the CPU unless capturable
    raw: Tensor | None  # compute dtype; there if the step is one on raw, and param the transform of it
    constraint: Record | None  # bounds as floats, or as tensors of the parameter's shape in its compute dtype
    group: int  # index into the hyperparameters
    grad_stride: tuple[int, ...]


class Hyper(NamedTuple):
    """The numbers of one parameter group in one step."""

    lr: float | Tensor  # a 0-dim Tensor with capturable only
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    amsgrad: bool
    metric: str  # "adam" or "euclidean"


class Plan(Protocol):
    """One launch: all parameters of an optimizer on one device, of one dtype and one state dtype."""

    in_graphs: list[Any]  # what captured graphs read of this plan: to be set to a list that outlives them

    def __init__(self, slots: Sequence[Slot]) -> None: ...

    def run(
        self,
        grads: Sequence[Tensor],
        hyper: Sequence[Hyper],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take one step: parameters, state and step counters in place, and one up for every parameter's version.

        Args:
            grads: one per slot, in the parameter's dtype, with strides of the slot's ``grad_stride``. Not written.
            hyper: one per parameter group.
            grad_scale: 0-dim float32 on the plan's device, by which gradients are to be divided.
            found_inf: 0-dim float32 on the plan's device. If it is not 0 then nothing is to change. Given only where
                the step counters are on the device; elsewhere the optimizer looks at it.
        """
        ...


def named_step(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the name that the step has in profiles where it is an operator."""
    return _library.named(f"{_library.NAMESPACE}::step", run)


_plans: dict[tuple[str, str], Callable[[Sequence[Slot]], Plan]] = {}


def register(backend: str, device_type: str, plan: Callable[[Sequence[Slot]], Plan]) -> None:
    """Let ``plan`` serve tensors on ``device_type`` in the name of ``backend``, one of ``_library.BACKENDS``."""
    _plans[backend, device_type] = plan


def plan_class(device_type: str, backend: str | None = None) -> Callable[[Sequence[Slot]], Plan]:
    """The implementation for a device, by default the one that serves operators there; without it the reference.

    Raises:
        RuntimeError: if ``backend`` is asked for by name and has no optimizers there.
    """
    from ._reference import ReferencePlan

    if backend == "reference":
        return ReferencePlan
    plan = _plans.get((backend or _library.backend_of(device_type), device_type))
    if plan is None and backend is not None:
        raise RuntimeError(f"backend {backend!r} was asked for, and has no optimizers for tensors on {device_type!r}")
    return plan or ReferencePlan


class Launch(NamedTuple):
    plan: Plan
    device: torch.device
    indices: list[int]  # of its slots among all


def launches(slots: Sequence[Slot]) -> list[Launch]:
    """One plan per device, dtype and state dtype."""
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, slot in enumerate(slots):
        kinds.setdefault((slot.param.device, slot.param.dtype, slot.exp_avg.dtype), []).append(index)
    return [
        Launch(plan_class(device.type, _library._backend)([slots[i] for i in indices]), device, indices)
        for (device, _, _), indices in kinds.items()
    ]


_structure = itemgetter("constraint", "amsgrad", "capturable", "state_dtype")
_params = itemgetter("params")
_grad = attrgetter("grad")
_version = attrgetter("_version")


class Prepared:
    """The launches of an optimizer, and a picture of all that they were made from, to tell whether it still holds.

    What is asked of every parameter in every step is asked by ``map`` over C functions: with hundreds of small
    parameters a line of Python for each would cost more than the step itself.
    """

    def __init__(self, optimizer: Any, params: list[Tensor], slots: list[Slot]) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        self.slots = slots
        self.launches = launches(slots)
        for launch in self.launches:
            launch.plan.in_graphs = optimizer._in_graphs
        self.backend = _library._backend
        self.has_accelerator = torch.accelerator.is_available()
        self.structure = list(map(_structure, groups))
        self.options: Any = None  # the optimizer's list of options with which the structure was last compared
        self.params = params  # those that have a slot
        self.sharded = any(map(is_sharded, params))
        all_params = list(chain.from_iterable(map(_params, groups)))
        states = [state[p] for p in params]
        self.expected = (
            all_params,
            list(map(type, map(_grad, all_params))),
            None if len(params) == len(all_params) else [p.grad is not None for p in all_params],
            list(state.values()),
            states,
            list(chain.from_iterable(map(dict.values, states))),
        )
        self.raws = [known.get("raw") for known in states]
        self.parts = [slot.param for slot in slots]
        self.layouts = list(map(_layout, self.parts))
        self.grad_layouts: list[Layout] = [
            (slot.param.dtype, slot.param.shape, slot.grad_stride, None) for slot in slots
        ]
        self.with_raw = [index for index, slot in enumerate(slots) if slot.raw is not None]
        self.transformed = [slots[index].param for index in self.with_raw]
        self.accept()

    def gradients(self, optimizer: Any) -> list[Tensor] | None:
        """The gradients of this step, one per slot; ``None`` if something is no longer what it was.

        The optimizer has compared the groups' options with its list of them in this step.
        """
        groups = optimizer.param_groups
        if self.options is not optimizer._looked_at:
            if list(map(_structure, groups)) != self.structure:
                return None
            self.options = optimizer._looked_at
        grads = gradients(groups, optimizer.state, *self.expected)
        if grads is None or _library._backend is not self.backend:
            return None
        parts = self.parts
        if self.sharded:
            with torch.no_grad():
                parts, grads = list(map(local, self.params)), list(map(local_grad, self.params, grads))
        return grads if same_layouts(parts, self.layouts) and same_layouts(grads, self.grad_layouts) else None

    def any_written_by_others(self) -> bool:
        """Whether a parameter that is the transform of a raw was written to since the last step or :meth:`accept`."""
        return sum(map(_version, self.transformed)) != self.versions  # they only ever grow: one sum tells

    def written_by_others(self) -> list[int]:
        """The indices of their slots."""
        found = zip(self.transformed, self.accepted, self.with_raw, strict=True)
        return [index for p, version, index in found if p._version != version + self.steps]

    def raws_in_force(self) -> dict[Tensor, tuple[Record | None, Tensor]]:
        """Constraint and raw, as the state has it, of parameters whose raw is known to lead to them."""
        if self.any_written_by_others() or not same_layouts(list(map(local, self.params)), self.layouts):
            return {}
        known = zip(self.params, self.slots, self.raws, strict=True)
        return {p: (slot.constraint, raw) for p, slot, raw in known if raw is not None}

    def accept(self) -> None:
        self.accepted = list(map(_version, self.transformed))
        self.versions = sum(self.accepted)
        self.steps = 0  # since then

    def run(self, grads: list[Tensor], hyper: list[Hyper], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for plan, device, indices in self.launches:
            own = grads if len(indices) == len(grads) else [grads[i] for i in indices]
            if grad_scale is not None:
                grad_scale = grad_scale.to(device)
            if found_inf is not None:
                found_inf = found_inf.to(device)
            plan.run(own, hyper, grad_scale, found_inf)
        if found_inf is None:
            self.versions += len(self.transformed)
            self.steps += 1
        else:  # a plan that skipped the step wrote nothing
            self.accept()


def _same_objects(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _same_values(dicts: list[dict[Any, Any]], objects: list[Any]) -> bool:
    return _same_objects(list(chain.from_iterable(map(dict.values, dicts))), objects)


def _gradients(
    groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    params: list[Tensor],
    types: list[type],
    with_grad: list[bool] | None,
    all_states: list[Any],
    states: list[dict[str, Any]],
    state_values: list[Any],
) -> list[Tensor] | None:
    """The gradients of ``params``, of those ``with_grad``; ``None`` if one of the others is not what it was."""
    if not (
        _same_objects(list(chain.from_iterable(map(_params, groups))), params)
        and _same_values([state], all_states)
        and _same_values(states, state_values)
    ):
        return None
    grads = list(map(_grad, params))
    if list(map(type, grads)) != types:
        return None
    return grads if with_grad is None else list(compress(grads, with_grad))


def _layout(t: Tensor) -> Layout:
    return t.dtype, t.shape, t.stride(), t.data_ptr()


def _same_layouts(tensors: list[Tensor], layouts: list[Layout]) -> bool:
    if len(tensors) != len(layouts):
        return False
    places = (3 if layout[3] is None else 4 for layout in layouts)
    return all(_layout(t)[:n] == layout[:n] for t, layout, n in zip(tensors, layouts, places, strict=True))


_compiled: Any = import_module("constrained_ops._C") if _library.has_cpu_library else None
same_values: Callable[[list[dict[Any, Any]], list[Any]], bool] = getattr(_compiled, "same_values", _same_values)
gradients: Callable[..., list[Tensor] | None] = getattr(_compiled, "gradients", _gradients)
same_layouts: Callable[[list[Tensor], list[Layout]], bool] = getattr(_compiled, "same_layouts", _same_layouts)
