"""GPyTorch's constraints on the fused operators: the same maps, arguments, checks and state_dicts.

``from constrained_ops.integrations.gpytorch import Positive`` in place of ``from gpytorch.constraints import Positive``
is all there is to change. Values are strictly inside, a start on a bound has a finite raw, and derivatives keep their
digits. Each class is a subclass of GPyTorch's of its name, to which it leaves a ``transform`` that is not the default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

try:
    from gpytorch import constraints
    from gpytorch.constraints.constraints import softplus
    from gpytorch.utils.transforms import inv_sigmoid, inv_softplus
except ModuleNotFoundError as error:
    if error.name != "gpytorch":
        raise
    raise ModuleNotFoundError(
        'constrained_ops.integrations.gpytorch needs GPyTorch: pip install "constrained_ops[gpytorch]"', name="gpytorch"
    ) from error

from .. import _checks
from .._checks import Bound
from ..bounded import bounded, bounded_inverse

__all__ = ["GreaterThan", "Interval", "LessThan", "Positive"]


class _Fused(constraints.Interval):
    """Goes before one of GPyTorch's classes: its default transform, from bounds that may be infinite."""

    _fused: bool
    _read: tuple[Any, ...] | None = None  # both bounds as they were when read, their versions, and as floats

    def transform(self, tensor: Tensor) -> Tensor:
        """The value of the raw ``tensor``."""
        return bounded(*self._with_bounds(tensor)) if self._fused else super().transform(tensor)

    def inverse_transform(self, transformed_tensor: Tensor) -> Tensor:
        """The raw of a value; of one outside NaN, which ``initialize`` rejects."""
        if not self._fused:
            return super().inverse_transform(transformed_tensor)
        return bounded_inverse(*self._with_bounds(transformed_tensor))

    def _with_bounds(self, tensor: Tensor) -> tuple[Tensor, Bound, Bound]:
        """Bounds of one element as floats, which are twice as fast for small tensors; read again when written to."""
        lower, upper = self.lower_bound, self.upper_bound
        if not is_compiling() and not torch._C._are_functorch_transforms_active():
            read = self._read
            if read and read[0] is lower and read[1] is upper and read[2:4] == (lower._version, upper._version):
                return tensor, read[4], read[5]
            if not (lower.dim() or upper.dim() or lower.is_meta or lower.is_inference() or upper.is_inference()):
                self._read = lower, upper, lower._version, upper._version, lower.item(), upper.item()
                return tensor, *self._read[4:]
        return _checks.spread(tensor, lower, upper), lower, upper


class Interval(_Fused, constraints.Interval):
    """:func:`constrained_ops.bounded` in place of ``gpytorch.constraints.Interval``: the same map onto (lower, upper).

    Args:
        lower_bound, upper_bound: finite floats or tensors.
        transform, inv_transform: of GPyTorch; its own class does the work where the first is given. ``None`` enforces
            nothing.
        initial_value: a value, not a raw, for ``register_constraint`` to start with.

    Raises:
        ValueError: bounds out of order, or infinite.
    """

    def __init__(
        self,
        lower_bound: Bound,
        upper_bound: Bound,
        transform: Any = torch.sigmoid,
        inv_transform: Any = inv_sigmoid,
        initial_value: Bound | None = None,
    ) -> None:
        if any(torch.as_tensor(bound).isinf().any() for bound in (lower_bound, upper_bound)):
            got = f"lower_bound={_checks.show(lower_bound)} and upper_bound={_checks.show(upper_bound)}"
            raise ValueError(f"Interval: bounds must be finite, got {got}; GreaterThan and LessThan have one bound")
        self._fused = transform is torch.sigmoid
        super().__init__(lower_bound, upper_bound, transform, inv_transform, initial_value)


class GreaterThan(_Fused, constraints.GreaterThan):
    """:func:`constrained_ops.positive` in place of ``gpytorch.constraints.GreaterThan``: softplus onto (lower, inf).

    Args:
        lower_bound: a float or a tensor.
        transform, inv_transform, initial_value: as for :class:`Interval`.
    """

    def __init__(
        self,
        lower_bound: Bound,
        transform: Any = softplus,
        inv_transform: Any = inv_softplus,
        initial_value: Bound | None = None,
    ) -> None:
        self._fused = transform is softplus
        super().__init__(lower_bound, transform, inv_transform, initial_value)


class Positive(_Fused, constraints.Positive):
    """:class:`GreaterThan` 0, in place of ``gpytorch.constraints.Positive``.

    Args:
        transform, inv_transform, initial_value: as for :class:`Interval`.
    """

    def __init__(
        self, transform: Any = softplus, inv_transform: Any = inv_softplus, initial_value: Bound | None = None
    ) -> None:
        self._fused = transform is softplus
        super().__init__(transform, inv_transform, initial_value)


class LessThan(_Fused, constraints.LessThan):
    """The mirror image of :class:`GreaterThan`, in place of ``gpytorch.constraints.LessThan``: increasing, below upper.

    Args:
        upper_bound: a float or a tensor.
        transform, inv_transform, initial_value: as for :class:`Interval`.
    """

    def __init__(
        self,
        upper_bound: Bound,
        transform: Any = softplus,
        inv_transform: Any = inv_softplus,
        initial_value: Bound | None = None,
    ) -> None:
        self._fused = transform is softplus
        super().__init__(upper_bound, transform, inv_transform, initial_value)

    def __repr__(self) -> str:
        """GPyTorch's, which knows bounds of one element only."""
        return super().__repr__() if self.upper_bound.numel() == 1 else torch.nn.Module.__repr__(self)
