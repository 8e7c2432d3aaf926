"""The protocol of ``torch.optim.Adam``, shared by both optimizers: arguments, state, checks, and the cached plans."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from numbers import Real
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks, _library
from .._constraints import Record, SimplexOf, interpret
from .._library import compute_dtype
from . import _many
from ._memory import laid_out, zeros_like
from ._plans import Hyper, Prepared, Slot, plan_class, same_values
from ._sharding import is_sharded, like, local, local_grad, shard

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# These belong to an optimizer and not to its state: never in a state_dict, and kept when one is loaded.
OWN = ("constraint", "metric", "state_dtype")
_NUMBER: Any = (float, int, Real)  # Real alone would say it all, in eight times the time
_NOT_OURS = ("foreach", "fused", "differentiable")  # left by torch.optim.Adam in its state_dict
_options = itemgetter(
    "lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "amsgrad", "capturable"
)

# Its name before torch 2.12 is the second. It warns of a capture without capturable.
_health_check: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or getattr(Optimizer, "_cuda_graph_capture_health_check", None)
    or (lambda optimizer: None)
)

# What the wrapper that torch.optim.Optimizer puts around step looks at, by names that are not public, beside profilers.
# With no hooks and no profiler it does nothing, and takes as long as a small step itself. A torch without these names
# gets its wrapper.
_torch = sys.modules[Optimizer.__module__]
_global_pre_hooks: Mapping[int, Any] = getattr(_torch, "_global_optimizer_pre_hooks", {0: "unknown"})
_global_post_hooks: Mapping[int, Any] = getattr(_torch, "_global_optimizer_post_hooks", {0: "unknown"})


class Binding(NamedTuple):
    """A constraint fitted to a parameter, and what it was made from."""

    given: Any
    fitted_to: tuple[Any, ...]  # dtype, device and shape; of a DTensor mesh and placements as well
    record: Record | None


class ConstrainedAdam(Optimizer):
    """``torch.optim.Adam`` with a ``constraint`` per group. Subclasses say whether steps are taken on raw."""

    _step_supports_amp_scaling = True  # GradScaler: leave unscaling, and skipping a step, to step()
    _reparametrized: bool

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._prepared: Prepared | None = None
        self._hypers: list[Hyper] = []
        self._looked_at: list[Any] = []  # for _hypers: the groups' values, or none if one may change in itself
        self._bindings: dict[Tensor, Binding] = {}
        self._loading: dict[str, Any] | None = None
        self._in_graphs: list[Any] = []  # see Plan
        self._positions: list[tuple[int, int]] = []  # (group, parameter) of each slot
        super().__init__(params, defaults)

    # --- One step ------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return what ``closure``, which computes the loss anew, returns.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter overlaps itself or has no memory.
            TypeError: a gradient is not of its parameter's dtype, or an option or state not of its type.
            ValueError: an option is out of range, a parameter was moved out of its constraint
                (``ReparametrizedAdam``), or its gradient or state has another shape. All of this before anything is
                written.
        """
        if (
            _library.profiler_enabled()
            or getattr(self, "_optimizer_step_pre_hooks", True)
            or getattr(self, "_optimizer_step_post_hooks", True)
            or _global_pre_hooks
            or _global_post_hooks
        ) and not _is_watched(type(self).step):
            return self._watched_step(*([] if closure is None else [closure]))
        return self._unwatched_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # tells torch.optim.Optimizer that step looks after its hooks

    def _unwatched_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._prepared is None or self._prepared.has_accelerator:
            _health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyper = self._hypers if same_values(self.param_groups, self._looked_at) else self._look_at_options()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not all(group["capturable"] for group in self.param_groups):
            if found_inf.item():
                return loss
            found_inf = None
        prepared = self._prepared
        grads = None if prepared is None else prepared.gradients(self)
        if prepared is None or grads is None:
            prepared, grads = self._prepare()
        elif prepared.any_written_by_others():
            self._reconcile(prepared)
        prepared.run(grads, hyper, getattr(self, "grad_scale", None), found_inf)
        return loss

    _watched_step = Optimizer.profile_hook_step(_unwatched_step)

    def _look_at_options(self) -> list[Hyper]:
        """Check the options of all groups, which are not those of the step before, or may not be."""
        op, groups = type(self).__name__, self.param_groups
        hypers = []
        lasting = True
        for i, group in enumerate(groups):
            hypers.append(_hyper(op, i, group))
            lasting = lasting and hypers[i].lr is group["lr"] and isinstance(group["betas"], tuple)
        self._hypers = hypers
        self._looked_at = list(chain.from_iterable(map(dict.values, groups))) if lasting else []
        return hypers

    @torch.no_grad()
    def _prepare(self) -> tuple[Prepared, list[Tensor]]:
        """Look at everything, and make plans for what has a gradient. State is written only if all is well."""
        if self._capturing():
            raise RuntimeError(
                f"{type(self).__name__}: the first step, and one after which anything but values has changed, cannot "
                "be captured in a CUDA graph; take a step like it before"
            )
        bindings: dict[Tensor, Binding] = {}
        places: list[tuple[int, int]] = []
        dtypes: list[torch.dtype] = []
        for i, group in enumerate(self.param_groups):
            fitted = self._bind(i)
            bindings.update(zip(group["params"], fitted, strict=True))
            for j, p in enumerate(group["params"]):
                if p.grad is not None:
                    plan_class(p.device.type, _library._backend)
                    self._check_memory(i, j)
                    self._check_grad(i, j)
                    self._check_state(i, j)
                    places.append((i, j))
                    dtypes.append(self._state_dtype(i, j))
        params = [self._param(i, j) for i, j in places]
        records = [bindings[p].record for p in params]
        in_force = {} if self._prepared is None else self._prepared.raws_in_force()
        doubtful = []
        for index, (p, record) in enumerate(zip(params, records, strict=True)):
            constraint, raw = in_force.get(p, (None, None))
            if raw is None or constraint is not record or self.state.get(p, {}).get("raw") is not raw:
                doubtful.append(index)
        renewed = self._renewed_raws([places[index] for index in doubtful], [records[index] for index in doubtful])
        raws = {doubtful[index]: raw for index, raw in renewed.items()}

        self._bindings = bindings
        slots = [
            self._slot(*place, record, dtype, raws.get(index))
            for index, (place, record, dtype) in enumerate(zip(places, records, dtypes, strict=True))
        ]
        self._positions = places
        self._prepared = Prepared(self, params, slots)
        return self._prepared, [local_grad(p, p.grad) for p in params]

    def _capturing(self) -> bool:
        on_cuda = any(p.is_cuda for group in self.param_groups for p in group["params"])
        return on_cuda and torch.cuda.is_current_stream_capturing()

    @torch.no_grad()
    def _reconcile(self, prepared: Prepared) -> None:
        """Somebody wrote to a parameter: derive anew what its raw can no longer say."""
        written = prepared.written_by_others()
        slots = [prepared.slots[index] for index in written]
        renewed = self._renewed_raws([self._positions[index] for index in written], [s.constraint for s in slots])
        for index, raw in renewed.items():
            kept = slots[index].raw
            assert kept is not None
            kept.copy_(raw)
        prepared.accept()

    def _renewed_raws(self, places: list[tuple[int, int]], records: list[Record | None]) -> dict[int, Tensor]:
        """Of those parameters whose raw is to be derived anew, by index. Loading in whatever order loses no digit."""
        if not self._reparametrized:
            return {}
        params = [self._param(i, j) for i, j in places]
        raws = [self.state.get(p, {}).get("raw") for p in params]
        return _many.renewed(
            lambda index: self._where(*places[index]),
            records,
            [None if raw is None else local(raw) for raw in raws],
            list(map(local, params)),
        )

    def _slot(self, i: int, j: int, record: Record | None, dtype: torch.dtype, raw: Tensor | None) -> Slot:
        group = self.param_groups[i]
        p = group["params"][j]
        state = self.state[p]
        state["step"] = _step_counter(group, p, state.get("step"))
        for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
            there = name in state
            state[name] = laid_out(name, p, state[name], dtype) if there else zeros_like(name, p, dtype)
        if raw is not None:
            state["raw"] = like(p, laid_out("raw", local(p), raw, compute_dtype(p.dtype)))
        elif record is None or not self._reparametrized:
            state.pop("raw", None)
        else:
            state["raw"] = laid_out("raw", p, state["raw"], compute_dtype(p.dtype))
        parts = {name: local(state[name]) for name in (*MOMENTS, "raw") if name in state}
        return Slot(
            param=local(p),
            exp_avg=parts["exp_avg"],
            exp_avg_sq=parts["exp_avg_sq"],
            max_exp_avg_sq=parts["max_exp_avg_sq"] if group["amsgrad"] else None,
            step=state["step"],
            raw=parts.get("raw"),
            constraint=record,
            group=i,
            grad_stride=local_grad(p, p.grad).stride(),
        )

    # --- Parameter groups ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``. Nothing changes if it is not accepted."""
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        self._prepared = None

    @torch.no_grad()
    def _check_group(self, i: int) -> None:
        op, group = type(self).__name__, self.param_groups[i]
        _hyper(op, i, {**group, "capturable": False})  # here lr is read wherever it is
        params = group["params"]
        first_of: dict[torch.dtype, int] = {}
        for j, p in enumerate(params):
            first_of.setdefault(p.dtype, j)
        for j in first_of.values():
            _checks.floating(op, params[j], self._label(i, j))
            self._state_dtype(i, j)
        bindings = self._bind(i)
        records = [None if p.is_meta else binding.record for p, binding in zip(params, bindings, strict=True)]
        _many.check(lambda j: self._where(i, j), records, list(map(local, params)))
        self._bindings.update(zip(params, bindings, strict=True))

    def _bind(self, i: int) -> list[Binding]:
        """The constraint of a group, fitted to each of its parameters. Those that are alike share it."""
        group = self.param_groups[i]
        given = group["constraint"]
        alike: dict[tuple[Any, ...], Binding] = {}
        bindings = []
        for j, p in enumerate(group["params"]):
            kind = (p.dtype, p.device, p.shape, *((p.device_mesh, p.placements) if is_sharded(p) else ()))
            binding = self._bindings.get(p)
            if binding is None or binding.given is not given or binding.fitted_to != kind:
                binding = alike.get(kind)
            if binding is None:
                binding = alike[kind] = Binding(given, kind, self._fitted(given, i, j))
            bindings.append(binding)
        return bindings

    def _fitted(self, given: Any, i: int, j: int) -> Record | None:
        op, p = type(self).__name__, self._param(i, j)
        record = interpret(op, given)
        if record is None:
            return None
        if self._reparametrized and isinstance(record, SimplexOf) and record.kind != "softmax":
            raise NotImplementedError(
                f'{self._where(i, j)}: only the simplex of kind "softmax" is supported, got kind "{record.kind}"'
            )
        record = record.on(op, p, self._label(i, j))
        record = record if self._reparametrized else record.closed(p.dtype)
        return shard(self._where(i, j), p, record)

    def _check_memory(self, i: int, j: int) -> None:
        part = local(self._param(i, j))
        if any(size > 1 and not stride for size, stride in zip(part.shape, part.stride(), strict=True)):
            raise RuntimeError(f"{self._where(i, j)}, of shape {tuple(part.shape)}, overlaps itself in memory")
        if part.numel() and not part.data_ptr() and not part.is_meta:
            raise RuntimeError(f"{self._where(i, j)}, a {type(part).__name__}, has no memory for a step to write to")

    def _check_grad(self, i: int, j: int) -> None:
        p = self._param(i, j)
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"{self._where(i, j)} has a gradient of layout {p.grad.layout}; it must be dense")
        if p.grad.dtype != p.dtype or is_sharded(p.grad) != is_sharded(p):
            kinds = [f"{'sharded ' if is_sharded(t) else ''}{t.dtype}" for t in (p, p.grad)]
            raise TypeError(f"{self._where(i, j)} is {kinds[0]}, its gradient {kinds[1]}")
        if p.grad.shape != p.shape:
            shapes = f"{tuple(p.shape)}, its gradient {tuple(p.grad.shape)}"
            raise ValueError(f"{self._where(i, j)} has shape {shapes}")

    def _check_state(self, i: int, j: int) -> None:
        p = self._param(i, j)
        for name, value in self.state.get(p, {}).items():
            if name in (*MOMENTS, "raw"):
                if not isinstance(value, Tensor):
                    raise TypeError(f"{self._where(i, j)}: its state {name} must be a Tensor, got {value!r}")
                if value.shape != p.shape:
                    shapes = f"{tuple(value.shape)}, the parameter {tuple(p.shape)}"
                    raise ValueError(f"{self._where(i, j)}: its state {name} has shape {shapes}")
            elif name == "step" and not _is_step(value):
                raise TypeError(f"{self._where(i, j)}: its state step must be one number, got {value!r}")

    def _state_dtype(self, i: int, j: int) -> torch.dtype:
        """Of the moments. raw is kept in the compute dtype in any case."""
        group = self.param_groups[i]
        p = group["params"][j]
        compute = compute_dtype(p.dtype)
        dtype: torch.dtype = group["state_dtype"] or compute
        if dtype not in (p.dtype, compute):
            allowed = " or ".join(dict.fromkeys(map(str, (compute, p.dtype))))
            raise ValueError(f"{self._where(i, j)} is {p.dtype}: state_dtype must be {allowed}, got {dtype}")
        return dtype

    def _param(self, i: int, j: int) -> Any:
        return self.param_groups[i]["params"][j]

    def _label(self, i: int, j: int) -> str:
        names = self.param_groups[i].get("param_names")
        return f"parameter {j}{f' ({names[j]!r})' if names else ''} of group {i}"

    def _where(self, i: int, j: int) -> str:
        return f"{type(self).__name__}: {self._label(i, j)}"

    # --- Saving and loading --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Adam``'s, which loads it. Without the constraints, metric and state_dtype of the groups."""
        packed = super().state_dict()
        packed["param_groups"] = [{k: v for k, v in group.items() if k not in OWN} for group in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer like this one, or of ``torch.optim.Adam``.

        Constraints, metric and state_dtype stay as they are; moments are converted to this optimizer's state_dtype and
        never rounded to the parameters' dtype on the way.

        Raises:
            ValueError: a group's state_dtype has become one that its parameters cannot have. Nothing is loaded then.
        """
        for i, group in enumerate(self.param_groups):
            for j in range(len(group["params"])):
                self._state_dtype(i, j)

        def remember(_: Optimizer, given: dict[str, Any]) -> None:
            self._loading = given

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = [{key: group[key] for key in OWN if key in group} for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        self._prepared, self._bindings = None, {}
        self._hypers, self._looked_at = [], []
        self.__dict__.setdefault("_in_graphs", [])
        loading = self.__dict__.setdefault("_loading", None)
        if loading is None:
            return
        for group, kept in zip(self.param_groups, own, strict=True):
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            for key in _NOT_OURS:
                group.pop(key, None)
            group.update(kept)
        ids = chain.from_iterable(group["params"] for group in loading["param_groups"])
        places = ((i, j) for i, group in enumerate(self.param_groups) for j in range(len(group["params"])))
        for saved_id, (i, j) in zip(ids, places, strict=True):
            saved = loading["state"].get(saved_id)
            if saved:
                self._take(i, j, saved)

    def _take(self, i: int, j: int, saved: dict[str, Any]) -> None:
        """Replace what ``torch.optim.Optimizer`` rounded to the parameter's dtype."""
        group = self.param_groups[i]
        p = group["params"][j]
        state = self.state[p]
        if "step" in saved:
            state["step"] = _step_counter(group, p, saved["step"]).clone()
        for name in (*MOMENTS, "raw"):
            if name in saved:
                dtype = compute_dtype(p.dtype) if name == "raw" else self._state_dtype(i, j)
                state[name] = saved[name].detach().to(device=p.device, dtype=dtype, copy=True)


def _is_watched(step: Any) -> bool:
    """Whether torch.optim.Optimizer's wrapper, as it puts one around the step of a subclass, is around this one."""
    while step is not None:
        if getattr(step, "__code__", None) is ConstrainedAdam._watched_step.__code__:
            return True
        step = getattr(step, "__wrapped__", None)
    return False


def _hyper(op: str, i: int, group: dict[str, Any]) -> Hyper:
    """The options of group ``i`` as a step takes them, checked.

    A learning rate that steps read on an accelerator (``capturable``) is not: to look at it is to wait for the device.
    """
    lr, betas, eps, weight_decay, decoupled, maximize, amsgrad, capturable = _options(group)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{op}: lr of group {i} must be a float or one element, got a {_checks.show(lr)}")
        if lr.is_cpu or not capturable:
            lr = lr.item()
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, _NUMBER):
            if value is lr and isinstance(lr, Tensor):
                continue
            raise TypeError(f"{op}: {name} of group {i} must be a float, got {value!r}")
        if not value >= 0:  # a NaN is caught here as well
            raise ValueError(f"{op}: {name} of group {i} must not be negative, got {value}")
    try:
        beta1, beta2 = betas
    except (TypeError, ValueError):  # not two
        beta1 = beta2 = None
    if not (isinstance(beta1, _NUMBER) and isinstance(beta2, _NUMBER) and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"{op}: betas of group {i} must be two floats in [0, 1), got {betas}")
    metric = group.get("metric", "adam")
    if metric not in ("adam", "euclidean"):
        raise ValueError(f"{op}: metric of group {i} must be 'adam' or 'euclidean', got {metric!r}")
    return Hyper(lr, beta1, beta2, eps, weight_decay, decoupled, maximize, amsgrad, metric)


def _is_step(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else value is None or isinstance(value, _NUMBER)


def _step_counter(group: dict[str, Any], p: Tensor, value: Any) -> Tensor:
    device = p.device if group["capturable"] else torch.device("cpu")
    if value is None:
        return torch.zeros((), dtype=torch.float32, device=device)
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.device == device:
        return value
    return torch.as_tensor(value, dtype=torch.float32, device=device)
