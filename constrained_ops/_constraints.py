"""What a user gives as ``constraint=``, and the two kinds of sets that it comes down to.

A record describes a set once for all: how to tell what lies in it, how to project onto it, and how to transform onto
it. :func:`interpret` makes one of what a user gives, ``on`` fits it to a parameter.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from . import _checks, bounded, positive, projection, simplex
from ._checks import Bound
from ._library import Kernels, compute_dtype

_TRANSFORMS: dict[str, Kernels] = {"bounded": bounded._kernels, "exponential": positive._kernels}


@dataclass(frozen=True, eq=False)
class Box:
    """lower <= x <= upper, per element. ``transform``: "bounded" (softplus for one bound), or "exponential"."""

    lower: Bound = -math.inf
    upper: Bound = math.inf
    transform: str = "bounded"

    def on(self, op: str, param: Tensor, name: str = "parameter") -> Box:
        """This box with both bounds as floats, or both as tensors of param's shape and its compute dtype.

        Raises TypeError or ValueError, as :func:`constrained_ops.bounded` does and for elements out of order.
        """
        _checks.ordered(op, self.lower, self.upper)
        if isinstance(self.lower, Tensor) or isinstance(self.upper, Tensor):
            lower, upper = _checks.tensor_bounds(op, param, self.lower, self.upper, name)
            return replace(self, lower=lower.detach().expand(param.shape), upper=upper.detach().expand(param.shape))
        _checks.scalar_bounds(op, param, self.lower, self.upper, name)
        return replace(self, lower=float(self.lower), upper=float(self.upper))

    def closed(self, dtype: torch.dtype) -> Box:
        """The bounds rounded to the nearest numbers of ``dtype``, as ``torch.clamp_`` takes them."""

        def rounded(bound: Bound) -> Bound:
            return bound.to(dtype).to(bound.dtype) if isinstance(bound, Tensor) else _rounded(bound, dtype)

        return replace(self, lower=rounded(self.lower), upper=rounded(self.upper))

    def check(self, where: str, x: Tensor) -> None:
        """ValueError if an element is outside by more than a rounding error, or NaN."""
        if self.holds(x):
            return
        lower, upper = self._tensors(x)
        y = x.to(lower.dtype)
        beyond = torch.maximum(lower - y, y - upper).nan_to_num(nan=math.inf)
        worst = int(torch.where(_checks.into(x, lower, upper).isnan(), beyond, -math.inf).argmax())
        low, high, value = (t.reshape(-1)[worst].item() for t in (lower, upper, x))
        raise ValueError(f"{where} must lie in [{low}, {high}], got {value}")

    def holds(self, x: Tensor) -> bool:
        """Whether :meth:`check` has nothing to say."""
        if x.numel() == 0:
            return True
        if not isinstance(self.lower, Tensor) and not isinstance(self.upper, Tensor):
            smallest, largest = torch.aminmax(x)
            if self.lower <= smallest.item() and largest.item() <= self.upper:  # a NaN is neither
                return True
        return not _checks.into(x, *self._tensors(x)).isnan().any()

    def project(self, y: Tensor, weight: Tensor | None) -> Tensor:
        lower: Any = self.lower  # torch types its overloads, and either kind of bound will do
        return torch.clamp(y, lower, self.upper)

    def forward(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return self._kernels.forward(raw, self.lower, self.upper, dtype)

    def backward(self, grad_x: Tensor, raw: Tensor) -> Tensor:
        """In the dtype of raw."""
        return self._kernels.backward_tensor(grad_x, None, raw, self.lower, self.upper)[0]

    def inverse(self, x: Tensor) -> Tensor:
        """In the compute dtype of x; of a value on a bound the largest raw whose transform has room in x's dtype."""
        lower, upper = self._tensors(x)
        y = _checks.into(x, lower, upper)
        return bounded.raw_at(y, lower, upper) if self.transform == "bounded" else torch.log(y - lower)

    def made_by(self, raw: Tensor, x: Tensor) -> Tensor:
        """Where x is the transform of raw, whichever implementation computed it."""
        lower, upper = _checks.tensor_bounds("bounds", x, self.lower, self.upper)
        smallest, largest = _checks.inside(lower, upper, x.dtype)
        value = self.forward(raw, raw.dtype)
        held = torch.finfo(raw.dtype)
        slack = 16 * held.eps * (value.abs() + torch.minimum(value - lower, upper - value))
        slack = torch.where(slack.isfinite(), slack, 16 * held.eps * value.abs()) + held.smallest_normal
        least, most = (v.clamp(smallest, largest).to(x.dtype) for v in (value - slack, value + slack))
        return (least <= x) & (x <= most)

    @property
    def _kernels(self) -> Kernels:
        return _TRANSFORMS[self.transform].reference

    def _tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = _checks.tensor_bounds("bounds", x, self.lower, self.upper)
        return lower.expand(x.shape), upper.expand(x.shape)


@dataclass(frozen=True, eq=False)
class SimplexOf:
    """x >= 0 with sum x = total along dim. ``kind``: of the transform, "softmax" wherever one of this class is used."""

    dim: int = -1
    total: float = 1.0
    kind: str = "softmax"

    def on(self, op: str, param: Tensor, name: str = "parameter") -> SimplexOf:
        """This simplex with a dim that is not negative. Raises as :func:`constrained_ops.simplex`."""
        _checks.floating(op, param, name)
        return replace(self, dim=_checks.dimension(op, param, self.dim, name))

    def closed(self, dtype: torch.dtype) -> SimplexOf:
        return self

    def check(self, where: str, x: Tensor) -> None:
        """ValueError if an element is negative, or a sum not the total, by more than a rounding error, or NaN."""
        wrong = self._wrong(x)
        if wrong is not None:
            raise ValueError(f"{where} must be non-negative and sum to {self.total} along dim {self.dim}, got {wrong}")

    def holds(self, x: Tensor) -> bool:
        """Whether :meth:`check` has nothing to say."""
        return self._wrong(x) is None

    def _wrong(self, x: Tensor) -> str | None:
        if x.numel() == 0:
            return None
        eps = torch.finfo(x.dtype).eps
        y = x.to(compute_dtype(x.dtype))
        if not (smallest := y.amin().item()) >= -eps * self.total:
            return str(smallest)
        error = (y.sum(self.dim) if y.dim() else y) - self.total
        # Rounding moves a sum by at most eps/2; the rest is for sums that were taken carelessly.
        if error.abs().amax().item() <= max(1e-5, 8 * eps) * self.total:
            return None
        worst = error.reshape(-1)[error.abs().argmax()].item() + self.total
        return f"a sum of {worst:.6g}"

    def project(self, y: Tensor, weight: Tensor | None) -> Tensor:
        """The nearest point, in the metric of ``weight`` where there is one."""
        reference = projection._kernels.reference
        if weight is None:
            return reference.forward(y, self.dim, self.total)
        return reference.forward_weighted(y, weight, self.dim, self.total)

    def forward(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        return simplex._kernels.reference.forward(raw, self.dim, dtype)

    def backward(self, grad_x: Tensor, raw: Tensor) -> Tensor:
        return simplex._kernels.reference.backward(grad_x, raw, self.dim)

    def inverse(self, x: Tensor) -> Tensor:
        return simplex.raw_at(x)

    def made_by(self, raw: Tensor, x: Tensor) -> Tensor:
        """Where x is the softmax of raw, whichever implementation computed it; whole rows."""
        value = self.forward(raw, raw.dtype)
        held = torch.finfo(raw.dtype)
        slack = 64 * held.eps * value + held.smallest_normal  # some flush what is less than that to 0
        least, most = (simplex.stored(v, raw, x.dtype) for v in (value - slack, value + slack))
        same = (least <= x) & (x <= most)
        return same.all(self.dim, keepdim=True).expand(x.shape) if x.dim() else same


Record = Box | SimplexOf


@functools.lru_cache(maxsize=4096)
def _rounded(bound: float, dtype: torch.dtype) -> float:
    with _checks.real_tensors():
        return torch.tensor(bound, dtype=torch.float64).to(dtype).item()


class ConstraintModule(nn.Module):
    """A transform as a module, which says what set it maps onto."""

    def record(self) -> Record:
        raise NotImplementedError

    def right_inverse(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def interpret(op: str, given: Any) -> Record | None:
    """The record of a constraint; ``None`` where every value is allowed.

    Raises:
        NotImplementedError: for a constraint that is none of the supported ones.
        TypeError: for what is no constraint.
        ValueError: for bounds out of order.
    """
    record = _record(op, given)
    if isinstance(record, Box):
        _checks.ordered(op, record.lower, record.upper)
        bounds = (record.lower, record.upper)
        if not any(isinstance(bound, Tensor) for bound in bounds) and bounds == (-math.inf, math.inf):
            return None
    return record


def _record(op: str, given: Any) -> Record | None:
    while isinstance(given, constraints.independent):
        given = given.base_constraint
    if given is None or isinstance(given, type(constraints.real)):
        return None
    if isinstance(given, ConstraintModule):
        return given.record()
    if isinstance(given, (constraints.interval, constraints.half_open_interval)):
        return Box(_number(given.lower_bound), _number(given.upper_bound))
    if isinstance(given, (constraints.greater_than, constraints.greater_than_eq)):
        return Box(lower=_number(given.lower_bound))
    if isinstance(given, constraints.less_than):
        return Box(upper=_number(given.upper_bound))
    if isinstance(given, type(constraints.simplex)):
        return SimplexOf()
    if not isinstance(given, constraints.Constraint):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise TypeError(f"{op}: constraint must be an object of torch.distributions.constraints, got {kind}")
    raise NotImplementedError(
        f"{op}: constraint {given} is not supported; supported are interval, half_open_interval, unit_interval, "
        "positive, nonnegative, greater_than, greater_than_eq, less_than, simplex, real, independent around them, "
        "and constrained_ops.Bounded, Positive and Simplex"
    )


def _number(bound: Any) -> Any:
    """Bounds of one element as floats, which suit every shape and device."""
    return bound.item() if isinstance(bound, Tensor) and bound.dim() == 0 and not bound.is_meta else bound
