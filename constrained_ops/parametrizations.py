"""The transforms as modules, for ``torch.nn.utils.parametrize`` and wherever a constraint is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._checks import Bound
from ._constraints import Box, ConstraintModule, SimplexOf
from .bounded import bounded, bounded_inverse
from .positive import KINDS as POSITIVE_KINDS
from .positive import positive, positive_inverse
from .simplex import KINDS as SIMPLEX_KINDS
from .simplex import simplex, simplex_inverse


class _Between(ConstraintModule):
    """Bounds that are tensors are buffers, or parameters where they were some: they move and are saved with it."""

    lower: Bound
    upper: Bound

    def _set(self, name: str, bound: Bound) -> None:
        if isinstance(bound, Tensor) and not isinstance(bound, nn.Parameter):
            self.register_buffer(name, bound)
        else:
            setattr(self, name, bound)


class Bounded(_Between):
    """:func:`constrained_ops.bounded` as a module: onto the open interval (lower, upper).

    ``parametrize.register_parametrization(module, "weight", Bounded(0.0, 1.0))`` keeps ``module.weight`` inside.

    Args:
        lower, upper: floats, or tensors that broadcast to what is constrained. Elements may be infinite.

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
        return bounded(raw, self.lower, self.upper)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The raw of ``x``, a value on a bound included. ValueError if one lies outside, with bounds and value."""
        _check(self, x)
        return bounded_inverse(x, self.lower, self.upper)

    def extra_repr(self) -> str:
        return f"lower={_show(self.lower)}, upper={_show(self.upper)}"


class Positive(_Between):
    """:func:`constrained_ops.positive` as a module: onto (lower, infinity).

    Args:
        lower: a float, or a tensor that broadcasts to what is constrained.
        kind: "softplus" or "exp".

    Raises:
        TypeError: lower is not a real number or Tensor.
        ValueError: an unknown kind, or lower is NaN or infinite.
    """

    def __init__(self, lower: Bound = 0.0, kind: str = "softplus") -> None:
        super().__init__()
        _checks.kind("Positive", kind, POSITIVE_KINDS)
        _checks.ordered("Positive", lower, math.inf)
        if torch.as_tensor(lower).isinf().any():
            raise ValueError(f"Positive: lower must be finite, got lower={_show(lower)}")
        self._set("lower", lower)
        self.kind = kind

    def record(self) -> Box:
        return Box(self.lower, math.inf, "exponential" if self.kind == "exp" else "bounded")

    def forward(self, raw: Tensor) -> Tensor:
        return positive(raw, self.lower, kind=self.kind)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The raw of ``x``, a value on the bound included. ValueError if one lies below, with bounds and value."""
        _check(self, x)
        return positive_inverse(x, self.lower, kind=self.kind)

    def extra_repr(self) -> str:
        return f"lower={_show(self.lower)}, kind={self.kind!r}"


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
        _check(self, x)
        return simplex_inverse(x, self.dim, kind=self.kind)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kind={self.kind!r}"


def _check(module: ConstraintModule, x: Tensor) -> None:
    op = type(module).__name__
    module.record().on(op, x, "value").check(f"{op}: value", x.detach())


def _show(bound: Any) -> str:
    return f"tensor of shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else str(bound)
