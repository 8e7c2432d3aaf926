"""Transforms onto (lower, infinity): softplus, which is :mod:`.bounded` without an upper bound, and the exponential.

==============  ======================  ===========  ==================  =================
kind            value                   derivative   second derivative   log |dx/draw|
==============  ======================  ===========  ==================  =================
softplus        lower + softplus(raw)   s            s (1 - s)           log s
exp             lower + exp(raw)        exp(raw)     exp(raw)            raw
==============  ======================  ===========  ==================  =================
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks, _library
from ._checks import Bound
from ._elementwise import Point, references, transform
from .bounded import _kernels as _softplus_kernels
from .bounded import inverse

KINDS = ("softplus", "exp")


class Exponential(Point):
    x_lower = 1.0
    log_det_raw = 1.0
    log_det_raw_raw = 0.0

    @property
    def x(self) -> Tensor:
        return self.lower + torch.exp(self.raw)

    @property
    def x_raw(self) -> Tensor:
        return torch.exp(self.raw)

    @property
    def x_raw_raw(self) -> Tensor:
        return torch.exp(self.raw)

    @property
    def log_det(self) -> Tensor:
        return self.raw


_kernels = _library.define("exponential", references(Exponential))


@overload
def positive(
    raw: Tensor, lower: Bound = 0.0, *, kind: str = "softplus", return_log_det: Literal[False] = False
) -> Tensor: ...
@overload
def positive(
    raw: Tensor, lower: Bound = 0.0, *, kind: str = "softplus", return_log_det: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def positive(
    raw: Tensor, lower: Bound = 0.0, *, kind: str = "softplus", return_log_det: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Map ``raw`` to values strictly greater than ``lower``, increasing in ``raw``.

    In place of ``lower + F.softplus(raw)`` or ``lower + torch.exp(raw)``: one kernel each way, strictly above the bound
    and finite in every dtype, and exact second derivatives where PyTorch's softplus loses all digits (|raw| > 16).

    Args:
        raw: any shape; float16, bfloat16, float32 or float64.
        lower: a float, or a tensor that broadcasts to the shape of raw; see :func:`constrained_ops.bounded`.
        kind: "softplus", which becomes the identity far out, or "exp", which is positive on a log scale.
        return_log_det: also return log |dx/draw|, per element.

    Returns:
        x, or (x, log_det): shape, dtype and layout of raw.

    Raises:
        TypeError, ValueError: as :func:`constrained_ops.bounded`; ValueError for an unknown kind, and for exp without a
            finite lower bound.
    """
    if kind == "softplus":
        return transform("positive", raw, lower, math.inf, _softplus_kernels, return_log_det)
    _checks.kind("positive", kind, KINDS)
    if not isinstance(lower, Tensor) and lower == -math.inf:
        raise ValueError('positive: kind "exp" needs a finite lower bound, got lower=-inf')
    return transform("positive", raw, lower, math.inf, _kernels, return_log_det)


def positive_inverse(x: Tensor, lower: Bound = 0.0, *, kind: str = "softplus") -> Tensor:
    """The raw that :func:`positive` maps to ``x``.

    Values on the bound and beyond are treated as in :func:`constrained_ops.bounded_inverse`.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        lower, kind: as for :func:`positive`.

    Returns:
        raw: shape and dtype of x.
    """
    if kind == "softplus":
        return inverse("positive_inverse", x, lower, math.inf)
    _checks.kind("positive_inverse", kind, KINDS)
    lower_t, upper_t = _checks.inverse_bounds("positive_inverse", x, lower, math.inf)
    return torch.log(_checks.into(x, lower_t, upper_t) - lower_t).to(x.dtype)
