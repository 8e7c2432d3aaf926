"""The transforms as modules, for ``torch.nn.utils.parametrize`` and wherever a constraint is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import _checks
from ._checks import Bound
from ._constraints import Box, ConstraintModule, Record, SimplexOf, interpret
from .bounded import bounded, bounded_inverse
from .positive import KINDS as POSITIVE_KINDS
from .positive import positive, positive_inverse
from .simplex import KINDS as SIMPLEX_KINDS
from .simplex import simplex, simplex_inverse


class _Between(ConstraintModule):
    """Bounds that are tensors are buffers, or parameters where they were some: they move and are saved with it.

    Buffers are copies, and loading never writes to them: what a raw means must not change unseen.
    """

    lower: Bound
    upper: Bound

    def _bounds(self) -> tuple[Bound, Bound]:
        buffers = self._buffers  # a module's __getattr__ takes far longer
        lower, upper = buffers.get("lower"), buffers.get("upper")
        return self.lower if lower is None else lower, self.upper if upper is None else upper

    def _set(self, name: str, bound: Bound) -> None:
        if isinstance(bound, Tensor) and not isinstance(bound, nn.Parameter):
            self.register_buffer(name, bound if bound.requires_grad else bound.clone())
        else:
            setattr(self, name, bound)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        for name, own in self.named_buffers():
            key = prefix + name
            saved = state_dict.get(key)
            if own.requires_grad or not isinstance(saved, Tensor) or saved.shape != own.shape or own.is_meta:
                continue  # a bound to be learned, or nothing to compare
            if (difference := _first_difference(own, saved)) is not None:
                errors.append(
                    f"{key} is {difference[1]} in the state_dict and {difference[0]} in the module, whose bounds are "
                    "not loaded: set the module's bound before, or leave the key out (strict=False)"
                )
            state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Bounded(_Between):
    """:func:`constrained_ops.bounded` as a module: onto the open interval (lower, upper).

    ``parametrize.register_parametrization(module, "weight", Bounded(0.0, 1.0))`` keeps ``module.weight`` inside.

    Args:
        lower, upper: floats, or tensors that broadcast to what is constrained. Elements may be infinite. Tensors are
            copied, unless they are parameters or require gradients, and are part of the state_dict. Loading one whose
            bounds differ is an error, since its raw would mean another value; bounds to be learned are loaded.

    Raises:
        TypeError: a bound is not a real number or Tensor.
        ValueError: lower >= upper, or a NaN.
    """

    def __init__(self, lower: Bound, upper: Bound) -> None:
        super().__init__()
        _checks.ordered("Bounded", lower, upper)
        self._set("lower", lower)
        self._set("upper", upper)

    def record(self) -> Box:
        return Box(self.lower, self.upper)

    def forward(self, raw: Tensor) -> Tensor:
        lower, upper = self._bounds()
        return bounded(raw, lower, upper)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The raw of ``x``, a value on a bound included. ValueError if one lies outside, with bounds and value."""
        _check(type(self).__name__, "value", self, x)
        return bounded_inverse(x, self.lower, self.upper)

    def extra_repr(self) -> str:
        return f"lower={_checks.show(self.lower)}, upper={_checks.show(self.upper)}"


class Positive(_Between):
    """:func:`constrained_ops.positive` as a module: onto (lower, infinity).

    Args:
        lower: a float, or a tensor that broadcasts to what is constrained; see :class:`Bounded`.
        kind: "softplus" or "exp".

    Raises:
        TypeError: lower is not a real number or Tensor.
        ValueError: an unknown kind, or lower is NaN or infinite.
    """

    upper = math.inf

    def __init__(self, lower: Bound = 0.0, kind: str = "softplus") -> None:
        super().__init__()
        _checks.kind("Positive", kind, POSITIVE_KINDS)
        _checks.ordered("Positive", lower, math.inf)
        if _has_infinity(lower):
            raise ValueError(f"Positive: lower must be finite, got lower={_checks.show(lower)}")
        self._set("lower", lower)
        self.kind = kind

    def record(self) -> Box:
        return Box(self.lower, math.inf, "exponential" if self.kind == "exp" else "bounded")

    def forward(self, raw: Tensor) -> Tensor:
        return positive(raw, self._bounds()[0], kind=self.kind)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The raw of ``x``, a value on the bound included. ValueError if one lies below, with bounds and value."""
        _check(type(self).__name__, "value", self, x)
        return positive_inverse(x, self.lower, kind=self.kind)

    def extra_repr(self) -> str:
        return f"lower={_checks.show(self.lower)}, kind={self.kind!r}"


class Simplex(ConstraintModule):
    """:func:`constrained_ops.simplex` as a module: positive numbers that sum to 1 along ``dim``.

    Args:
        dim: the dimension that sums to 1.
        kind: "softmax", or "ilr" or "stick_breaking", whose raw has one element less along ``dim``.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, dim: int = -1, kind: str = "softmax") -> None:
        super().__init__()
        _checks.kind("Simplex", kind, SIMPLEX_KINDS)
        self.dim = dim
        self.kind = kind

    def record(self) -> SimplexOf:
        return SimplexOf(self.dim, kind=self.kind)

    def forward(self, raw: Tensor) -> Tensor:
        return simplex(raw, self.dim, kind=self.kind)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The raw of ``x``, zeros included. ValueError for negative values and for sums that are not 1."""
        _check(type(self).__name__, "value", self, x)
        return simplex_inverse(x, self.dim, kind=self.kind)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kind={self.kind!r}"


def register_constraint(module: nn.Module, name: str, constraint: Any) -> nn.Module:
    """Keep ``module.name`` in a set: reading it gives a value inside, and what is trained is its raw.

    In place of choosing a transform and calling ``torch.nn.utils.parametrize.register_parametrization``, whose other
    functions (``cached``, ``is_parametrized``, ``remove_parametrizations``) then apply. The value stays what it is, one
    on the boundary moves inside; the parameter itself becomes ``module.parametrizations.name.original`` and holds the
    raw, so that an optimizer may be made before or after. On top of other parametrizations, which need a
    ``right_inverse``, the constraint acts last.

    Args:
        module: owner of the parameter or buffer.
        name: its attribute, floating-point.
        constraint: as for :class:`constrained_ops.optim.ProjectedAdam`: an object of
            ``torch.distributions.constraints``, or a :class:`Bounded`, :class:`Positive` or :class:`Simplex`, which is
            registered itself. Two bounds mean :class:`Bounded`, one bound :class:`Positive` or its mirror image. Where
            every value is allowed (``real``, ``None``), nothing is registered.

    Returns:
        module.

    Raises:
        ValueError: the value lies outside the constraint, which names the worst one; there is nothing of that name; it
            has a constraint already; or the constraint's bounds are out of order or do not broadcast to it.
        NotImplementedError: the constraint is not supported.
        TypeError: it is none, or what it is for is not floating-point.

        The module is unchanged then.
    """
    op = "register_constraint"
    chain: Any = module.parametrizations[name] if parametrize.is_parametrized(module, name) else None  # type: ignore
    if chain is None and module._parameters.get(name, module._buffers.get(name)) is None:
        raise ValueError(f"{op}: {type(module).__name__} has no parameter or buffer {name!r}")
    record = interpret(op, constraint)
    if isinstance(constraint, ConstraintModule):
        transform = constraint
    elif record is None:
        return module
    else:
        transform = _module_of(record)
    if present := next((each for each in chain or () if isinstance(each, ConstraintModule)), None):
        raise ValueError(f"{op}: {name} is constrained already, by {present}; call remove_parametrizations first")
    with torch.no_grad():
        value = getattr(module, name)
        _check(op, name, transform, value)
        if chain is not None:  # register_parametrization would keep the raw, and so change the value
            chain.right_inverse(transform.right_inverse(value))
    return parametrize.register_parametrization(module, name, transform)


def _module_of(record: Record) -> ConstraintModule:
    if isinstance(record, SimplexOf):
        return Simplex(record.dim)
    if not isinstance(record.lower, Tensor) and not isinstance(record.upper, Tensor) and record.upper == math.inf:
        return Positive(record.lower)
    return Bounded(record.lower, record.upper)


def _check(op: str, name: str, module: ConstraintModule, x: Tensor) -> None:
    record = module.record().on(op, x, name)
    if not x.is_meta:
        record.check(f"{op}: {name}", x.detach())


def _first_difference(own: Tensor, saved: Tensor) -> tuple[float, float] | None:
    """The first elements that differ by more than the conversion of either dtype to the other."""
    saved = saved.to(own.device)
    unequal = (own != saved.to(own.dtype)) & (own.to(saved.dtype) != saved)
    return (own[unequal][0].item(), saved[unequal][0].item()) if unequal.any() else None


def _has_infinity(bound: Bound) -> bool:
    if isinstance(bound, Tensor):
        return not bound.is_meta and bool(bound.isinf().any())
    return math.isinf(bound)
