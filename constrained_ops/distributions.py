"""The transforms of ``torch.distributions`` on the fused operators, and :func:`installed`, which hands them out.

Each is the map that PyTorch has for the constraint, so that unconstrained values, the starts and checkpoints made of
them, and densities over them mean the same with either:

===================================  ==========================  ==================================================
constraint                           transform                   y
===================================  ==========================  ==================================================
interval, half_open_interval         IntervalTransform           lower + (upper - lower) sigmoid(x)
greater_than, greater_than_eq        GreaterThanTransform        lower + exp(x)
less_than                            LessThanTransform           upper - exp(x), which decreases
simplex, where ``transform_to``      SoftmaxTransform            softmax(x)
simplex, where ``biject_to``         StickBreakingTransform      stick-breaking, K - 1 numbers to K
===================================  ==========================  ==================================================

``unit_interval``, ``positive`` and ``nonnegative`` are among them; those for ``independent``, ``stack`` and ``cat``
PyTorch composes of what the registry hands out for the parts. Unlike PyTorch's, y is strictly inside in every dtype, a
value on the boundary has a finite inverse and one outside the inverse NaN, and y has the dtype of x whatever that of
the bounds.

A bijection computes y and the log-determinant in one pass. With ``with_cache()`` both are kept, also for
``log_abs_det_jacobian``; without, it computes them again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to, transforms
from torch.distributions.constraint_registry import ConstraintRegistry

from . import _checks
from ._checks import Bound
from .bounded import bounded, bounded_inverse
from .positive import positive, positive_inverse
from .simplex import simplex, simplex_inverse

__all__ = [
    "GreaterThanTransform",
    "IntervalTransform",
    "LessThanTransform",
    "SoftmaxTransform",
    "StickBreakingTransform",
    "install",
    "installed",
    "uninstall",
]


class _Uncached(transforms.Transform):
    """What was cached stays behind when a transform is pickled or copied: it may be part of a graph."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cached_log_det", None)
        if self._cache_size:
            state["_cached_x_y"] = None, None
        return state


class _Bijection(_Uncached):
    """Subclasses say y, and y with the log-determinant."""

    bijective = True
    _cached_log_det: tuple[Tensor | None, Tensor | None] = None, None

    def _value(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        if self._cache_size == 0:
            return self._value(x)
        y, log_det = self._value_and_log_det(x)
        self._cached_log_det = x, log_det
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |dy/dx|, from x alone."""
        cached_x, log_det = self._cached_log_det
        # What was computed under no_grad has no gradient to give.
        if cached_x is x and log_det is not None and (log_det.requires_grad or not torch.is_grad_enabled()):
            return log_det
        return self._value_and_log_det(x)[1]


class _Elementwise(_Bijection):
    """Between bounds, floats or tensors, with which x broadcasts."""

    domain = constraints.real
    _names: ClassVar[tuple[str, ...]]

    def with_cache(self, cache_size: int = 1) -> transforms.Transform:
        if self._cache_size == cache_size:
            return self
        cls: Any = type(self)
        return cls(*self._bounds(), cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Elementwise) or type(self) is not type(other):
            return False
        return all(map(_equal, self._bounds(), other._bounds()))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{name}={_checks.show(getattr(self, name))}' for name in self._names)})"
        )

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(shape, *(b.shape for b in self._bounds() if isinstance(b, Tensor)))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self.forward_shape(shape)

    def _bounds(self) -> tuple[Bound, ...]:
        return tuple(getattr(self, name) for name in self._names)

    def _fitted(self, x: Tensor) -> tuple[Any, ...]:
        """x in the shape that it has with the bounds, and the bounds, those of one element on the device of x."""
        bounds = self._bounds()
        moved = (b.to(x.device) if isinstance(b, Tensor) and b.dim() == 0 else b for b in bounds)
        return _checks.spread(x, *bounds), *moved


class IntervalTransform(_Elementwise):
    """:func:`constrained_ops.bounded` as a transform: onto (lower, upper).

    Args:
        lower, upper: floats or tensors, also infinite; with gradients, where they require any.
        cache_size: 0, or 1 to keep the latest x, y and log-determinant.
    """

    _names = "lower", "upper"
    sign = +1

    def __init__(self, lower: Bound, upper: Bound, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.lower, self.upper = lower, upper

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(self.lower, self.upper)

    def _value(self, x: Tensor) -> Tensor:
        return bounded(*self._fitted(x))

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return bounded(*self._fitted(x), return_log_det=True)

    def _inverse(self, y: Tensor) -> Tensor:
        return bounded_inverse(*self._fitted(y))


class GreaterThanTransform(_Elementwise):
    """:func:`constrained_ops.positive` of kind "exp" as a transform: onto (lower, infinity).

    Args:
        lower: a float or a tensor; with gradients, where it requires any.
        cache_size: 0, or 1 to keep the latest x and y.
    """

    _names = ("lower",)
    sign = +1

    def __init__(self, lower: Bound = 0.0, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.lower = lower

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.greater_than(self.lower)

    def _value(self, x: Tensor) -> Tensor:
        return positive(*self._fitted(x), kind="exp")

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._value(x), self._fitted(x)[0]  # the logarithm of exp, without a kernel

    def _inverse(self, y: Tensor) -> Tensor:
        return positive_inverse(*self._fitted(y), kind="exp")


class LessThanTransform(_Elementwise):
    """The mirror image of :class:`GreaterThanTransform`: onto (-infinity, upper), decreasing.

    Args:
        upper: a float or a tensor; with gradients, where it requires any.
        cache_size: 0, or 1 to keep the latest x and y.
    """

    _names = ("upper",)
    sign = -1

    def __init__(self, upper: Bound, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        self.upper = upper

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.less_than(self.upper)

    def _value(self, x: Tensor) -> Tensor:
        x, upper = self._fitted(x)
        return -positive(x, -upper, kind="exp")

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._value(x), self._fitted(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        y, upper = self._fitted(y)
        return positive_inverse(-y, -upper, kind="exp")


class SoftmaxTransform(_Uncached, transforms.SoftmaxTransform):
    """:func:`constrained_ops.simplex` as a transform: along the last dimension. No bijection, and no log-determinant.

    Args:
        cache_size: 0, or 1 to keep the latest x and y.
    """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def _call(self, x: Tensor) -> Tensor:
        return simplex(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return simplex_inverse(y)


class StickBreakingTransform(_Bijection, transforms.StickBreakingTransform):
    """:func:`constrained_ops.simplex` of kind "stick_breaking" as a transform: along the last dimension, K - 1 to K.

    Args:
        cache_size: 0, or 1 to keep the latest x, y and log-determinant.
    """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def _value(self, x: Tensor) -> Tensor:
        return simplex(x, kind="stick_breaking")

    def _value_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return simplex(x, kind="stick_breaking", return_log_det=True)

    def _inverse(self, y: Tensor) -> Tensor:
        return simplex_inverse(y, kind="stick_breaking")


def _equal(a: Bound, b: Bound) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


# --- The registries ------------------------------------------------------------------------------------------------

Factory = Callable[[Any], transforms.Transform]

_ELEMENTWISE: dict[type, Factory] = {
    constraints.interval: lambda constraint: IntervalTransform(constraint.lower_bound, constraint.upper_bound),
    constraints.half_open_interval: lambda constraint: IntervalTransform(
        constraint.lower_bound, constraint.upper_bound
    ),
    constraints.greater_than: lambda constraint: GreaterThanTransform(constraint.lower_bound),
    constraints.greater_than_eq: lambda constraint: GreaterThanTransform(constraint.lower_bound),
    constraints.less_than: lambda constraint: LessThanTransform(constraint.upper_bound),
}
_FACTORIES: list[tuple[ConstraintRegistry, dict[type, Factory]]] = [
    (biject_to, {**_ELEMENTWISE, type(constraints.simplex): lambda _: StickBreakingTransform()}),
    (transform_to, {**_ELEMENTWISE, type(constraints.simplex): lambda _: SoftmaxTransform()}),
]

Entries = list[tuple[ConstraintRegistry, type, Factory | None]]

_lock = threading.RLock()
_before: list[Entries] = []  # one element for each install() that has not been taken back


def install() -> None:
    """Let ``torch.distributions.biject_to`` and ``transform_to`` hand out the transforms of this module.

    Pyro's inference, guides and ``pyro.param`` ask these two, and so does all else that speaks of constraints.
    :func:`uninstall` takes it back; may be called several times, and is then taken back as often.

    The registries belong to the process: all threads see the change, and processes that are spawned, unlike those that
    are forked, do not.
    """
    with _lock:
        _before.append(_entries())
        for registry, factories in _FACTORIES:
            registry._registry.update(factories)


def uninstall() -> None:
    """Give both registries the entries back that they had before the last :func:`install`.

    Raises:
        RuntimeError: nothing is installed.
    """
    with _lock:
        if not _before:
            raise RuntimeError("uninstall: the transforms are not installed")
        _restore(_before.pop())


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for a block, after which both registries have the entries from before it, whatever happened.

    All threads see the change while the block runs. Blocks of several threads that overlap end with the entries of the
    one that is left last: there, call :func:`install` once instead.
    """
    with _lock:
        before, depth = _entries(), len(_before)
        install()
    try:
        yield
    finally:
        with _lock:
            del _before[depth:]
            _restore(before)


def _entries() -> Entries:
    """What the registries have for the constraints that this module has a transform for."""
    return [(registry, kind, registry._registry.get(kind)) for registry, ours in _FACTORIES for kind in ours]


def _restore(entries: Entries) -> None:
    for registry, kind, factory in entries:
        if factory is None:
            registry._registry.pop(kind, None)
        else:
            registry._registry[kind] = factory
