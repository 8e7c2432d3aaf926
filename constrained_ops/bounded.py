"""Transforms onto an open interval, a half-line or the whole line, chosen by which bounds are finite.

With s = sigmoid(raw) and w = upper - lower (``csrc/math/bounded.h`` has the numerics):

==============  ==========================  ===========  =======================  ==============================
bounds          value                       derivative   second derivative        log |dx/draw|
==============  ==========================  ===========  =======================  ==============================
both finite     lower + w s                 w s (1 - s)  -w s (1 - s) tanh(raw/2)  log w + log s + log(1 - s)
lower only      lower + softplus(raw)       s            s (1 - s)                log s
upper only      upper - softplus(-raw)      1 - s        -s (1 - s)               log(1 - s)
neither         raw                         1            0                        0
==============  ==========================  ===========  =======================  ==============================
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _checks, _library
from ._checks import Bound
from ._elementwise import Point, references, transform


class Interval(Point):
    @property
    def width(self) -> Any:
        return self.upper - self.lower

    @property
    def x(self) -> Tensor:
        below, above = torch.sigmoid(self.raw), torch.sigmoid(-self.raw)
        return torch.where(self.raw < 0, self.lower + self.width * below, self.upper - self.width * above)

    @property
    def x_raw_width(self) -> Tensor:
        return torch.sigmoid(self.raw) * torch.sigmoid(-self.raw)

    @property
    def x_raw(self) -> Tensor:
        return self.width * self.x_raw_width

    @property
    def x_raw_raw(self) -> Tensor:
        return -self.x_raw * torch.tanh(self.raw / 2)

    @property
    def x_lower(self) -> Tensor:
        return torch.sigmoid(-self.raw)

    @property
    def x_upper(self) -> Tensor:
        return torch.sigmoid(self.raw)

    @property
    def log_det(self) -> Tensor:
        log_width = torch.log(self.width) if isinstance(self.width, Tensor) else math.log(self.width)
        return log_width + logsigmoid(self.raw) + logsigmoid(-self.raw)

    @property
    def log_det_raw(self) -> Tensor:
        return -torch.tanh(self.raw / 2)

    @property
    def log_det_raw_raw(self) -> Tensor:
        return -2 * self.x_raw_width

    @property
    def log_det_width(self) -> Any:
        return 1 / self.width

    @property
    def log_det_width_width(self) -> Any:
        return -(1 / self.width) * (1 / self.width)


class LowerOnly(Point):
    x_lower = 1.0

    @property
    def x(self) -> Tensor:
        return self.lower - logsigmoid(-self.raw)

    @property
    def x_raw(self) -> Tensor:
        return torch.sigmoid(self.raw)

    @property
    def x_raw_raw(self) -> Tensor:
        return torch.sigmoid(self.raw) * torch.sigmoid(-self.raw)

    @property
    def log_det(self) -> Tensor:
        return logsigmoid(self.raw)

    @property
    def log_det_raw(self) -> Tensor:
        return torch.sigmoid(-self.raw)

    @property
    def log_det_raw_raw(self) -> Tensor:
        return -self.x_raw_raw


class UpperOnly(Point):
    x_upper = 1.0

    @property
    def x(self) -> Tensor:
        return self.upper + logsigmoid(self.raw)

    @property
    def x_raw(self) -> Tensor:
        return torch.sigmoid(-self.raw)

    @property
    def x_raw_raw(self) -> Tensor:
        return -torch.sigmoid(self.raw) * torch.sigmoid(-self.raw)

    @property
    def log_det(self) -> Tensor:
        return logsigmoid(-self.raw)

    @property
    def log_det_raw(self) -> Tensor:
        return -torch.sigmoid(self.raw)

    @property
    def log_det_raw_raw(self) -> Tensor:
        return self.x_raw_raw


class Unbounded(Point):
    x_raw = 1.0
    x_raw_raw = log_det = log_det_raw = log_det_raw_raw = 0.0

    @property
    def x(self) -> Tensor:
        return self.raw


class ByElement(Point):
    """Tensor bounds: each element takes the map that its own bounds ask for."""

    def __init__(self, raw: Tensor, lower: Tensor, upper: Tensor) -> None:
        super().__init__(raw, lower, upper)
        self._no_lower, self._no_upper = lower == -math.inf, upper == math.inf
        # The maps that an element does not take see bounds of 0 and 1: an infinity there would turn into NaN gradients.
        only_lower = torch.where(self._no_lower, 0.0, lower)
        only_upper = torch.where(self._no_upper, 1.0, upper)
        neither_infinite = ~(self._no_lower | self._no_upper)
        both = torch.where(neither_infinite, lower, 0.0), torch.where(neither_infinite, upper, 1.0)
        self._interval = Interval(raw, *both)
        self._lower_only, self._upper_only = LowerOnly(raw, only_lower, None), UpperOnly(raw, None, only_upper)
        self._unbounded = Unbounded(raw, None, None)

    def _choose(self, name: str) -> Tensor:
        zero = torch.zeros_like(self.raw)
        interval, lower_only, upper_only, unbounded = (
            getattr(point, name) + zero
            for point in (self._interval, self._lower_only, self._upper_only, self._unbounded)
        )
        with_lower = torch.where(self._no_upper, lower_only, interval)
        return torch.where(self._no_lower, torch.where(self._no_upper, unbounded, upper_only), with_lower)


def _chosen(name: str) -> property:
    def read(self: ByElement) -> Tensor:
        return self._choose(name)

    return property(read)


for _name in Point.__annotations__:
    setattr(ByElement, _name, _chosen(_name))


def point(raw: Tensor, lower: Any, upper: Any) -> Point:
    if isinstance(lower, Tensor):
        return ByElement(raw, lower, upper)
    if lower == -math.inf:
        return (Unbounded if upper == math.inf else UpperOnly)(raw, lower, upper)
    return (LowerOnly if upper == math.inf else Interval)(raw, lower, upper)


_kernels = _library.define("bounded", references(point))


@overload
def bounded(raw: Tensor, lower: Bound, upper: Bound, *, return_log_det: Literal[False] = False) -> Tensor: ...
@overload
def bounded(raw: Tensor, lower: Bound, upper: Bound, *, return_log_det: Literal[True]) -> tuple[Tensor, Tensor]: ...
def bounded(raw: Tensor, lower: Bound, upper: Bound, *, return_log_det: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Map ``raw`` into the open interval (lower, upper), increasing in ``raw``.

    In place of ``lower + (upper - lower) * torch.sigmoid(raw)``: one kernel forward and one backward, the result
    strictly inside in every dtype, derivatives right to rounding however far ``raw`` is out. An infinite bound makes
    the interval a half-line (softplus), two make it the line (identity). NaN stays NaN.

    Differentiable twice and more in raw and in bounds that are tensors; keeps nothing for backward but its inputs.

    Args:
        raw: any shape; float16, bfloat16, float32 or float64.
        lower, upper: floats, or tensors that broadcast to the shape of raw, in any real dtype, on its device. Elements
            may be infinite. Lower bounds must be less than upper ones; for tensors this is not checked, because a check
            would wait for the device.
        return_log_det: also return log |dx/draw|, per element.

    Returns:
        x, or (x, log_det): shape, dtype and layout of raw.

    Raises:
        TypeError: raw is not a floating-point tensor, or a bound not a real number.
        ValueError: lower >= upper, a NaN, or no number of raw's dtype in between; or a tensor bound that does not
            broadcast to raw or is on another device.

    Source: the constraint of Stan's "lower and upper bounded scalar" (Stan Reference Manual, Constraint Transforms).
    """
    return transform("bounded", raw, lower, upper, _kernels, return_log_det)


def bounded_inverse(x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """The raw that :func:`bounded` maps to ``x``.

    A value on a bound, or beyond it by a rounding error (one unit in the last place of the larger bound), gives the
    largest finite raw on that side; further outside gives NaN. Plain PyTorch, differentiable to any order.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        lower, upper: as for :func:`bounded`.

    Returns:
        raw: shape and dtype of x.
    """
    return inverse("bounded_inverse", x, lower, upper)


def inverse(op: str, x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """:func:`bounded_inverse` in the name of ``op``."""
    lower, upper = _checks.inverse_bounds(op, x, lower, upper)
    largest = torch.finfo(x.dtype).max  # far from its only bound raw is as large as the distance
    return raw_at(_checks.into(x, lower, upper), lower, upper).clamp(-largest, largest).to(x.dtype)


def raw_at(y: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The raw of a ``y`` strictly between the bounds; all of one shape and dtype, as is the result."""
    no_lower, no_upper = lower == -math.inf, upper == math.inf
    # Each map sees bounds that it can use; where() drops what the others make of them.
    from_lower, to_upper = y - torch.where(no_lower, 0.0, lower), torch.where(no_upper, 0.0, upper) - y
    both = _log_ratio(from_lower, to_upper)
    lower_only, upper_only = _softplus_inverse(from_lower), -_softplus_inverse(to_upper)
    with_lower = torch.where(no_upper, lower_only, both)
    return torch.where(no_lower, torch.where(no_upper, y, upper_only), with_lower)


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b), where one logarithm keeps more digits than the difference of two, and also where a / b underflows."""
    ratio = a / b
    held = (ratio >= torch.finfo(ratio.dtype).tiny) & ratio.isfinite()
    return torch.where(held, torch.where(held, ratio, 1.0).log(), a.log() - b.log())


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
