"""Transforms onto the simplex along one dimension: softmax here, the kinds that are bijections in ``bijection.py``.

With <v> = sum_i x_i v_i (``csrc/math/simplex.h`` has the numerics):

    x_i = exp(raw_i) / sum_j exp(raw_j)
    grad_raw_i = x_i (g_i - <g>)
    second order, along a:  for g: x_i (a_i - <a>);  for raw: x_i (c_i - <c>) with c = (a - <a>) (g - <g>)
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from . import _checks, _library, bijection
from ._autograd import applier, bits, implementation, needs_graph, only, save_for_forward
from ._library import compute_dtype
from ._rows import centered, shifted, smallest_positive

KINDS = ("softmax", *bijection.KERNELS)


# --- Reference -----------------------------------------------------------------------------------------------------


def _softmax(raw: Tensor, dim: int) -> Tensor:
    return torch.softmax(raw.to(compute_dtype(raw.dtype)), dim)


def _forward(raw: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """In ``dtype``, by default that of raw."""
    return stored(_softmax(raw, dim), raw, dtype or raw.dtype)


def stored(x: Tensor, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, no less than the smallest that this has, but where raw is minus infinity."""
    smallest = smallest_positive(x, dtype)
    return torch.where((x < smallest) & (raw > -torch.inf), smallest, x).to(dtype)


def _backward(grad_x: Tensor, raw: Tensor, dim: int, _: Tensor | None = None) -> Tensor:
    x = _softmax(raw, dim)
    return (x * _about_mean(x, grad_x, raw, dim)).to(raw.dtype)


def _about_mean(x: Tensor, v: Tensor, raw: Tensor, dim: int) -> Tensor:
    return centered(x, shifted(v, raw.to(x.dtype), dim), dim)


def _double_backward(
    along_raw: Tensor, grad_x: Tensor, raw: Tensor, dim: int, needed: int = 3
) -> tuple[Tensor, Tensor]:
    x = _softmax(raw, dim)
    along, g = (_about_mean(x, v, raw, dim) for v in (along_raw, grad_x))
    return (x * along).to(raw.dtype), (x * centered(x, along * g, dim)).to(raw.dtype)


_kernels = _library.define("simplex", {"forward": _forward, "backward": _backward, "double_backward": _double_backward})


# --- Autograd ------------------------------------------------------------------------------------------------------


def _softmax_jvp(ctx: Any, raw_t: Tensor, _: None) -> Tensor:
    return _backward(raw_t, ctx.saved_tensors[0], ctx.dim)  # the Jacobian of softmax is symmetric


class Softmax(Function):
    """raw -> x. Saves raw; and x where that holds all its digits and exponentials are dear, which is on CPUs."""

    @staticmethod
    def forward(raw: Tensor, dim: int) -> Tensor:
        return implementation(_kernels).forward(raw, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raw, ctx.dim = inputs
        exact = raw.is_cpu and raw.dtype in (torch.float32, torch.float64) and not is_compiling()
        ctx.save_for_backward(raw, output if exact else None)
        save_for_forward(ctx, raw)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> Any:
        raw, x = ctx.saved_tensors
        if needs_graph():
            return _softmax_backward(grad_x, raw, ctx.dim), None
        return implementation(_kernels).backward(grad_x, raw, ctx.dim, x), None


def _softmax_backward_jvp(ctx: Any, grad_x_t: Tensor | None, raw_t: Tensor | None, _: None) -> Tensor:
    grad_x, raw = ctx.saved_tensors
    by_grad = torch.zeros_like(raw) if grad_x_t is None else _backward(grad_x_t, raw, ctx.dim)
    return by_grad if raw_t is None else by_grad + _double_backward(raw_t, grad_x, raw, ctx.dim)[1]


class SoftmaxBackward(Function):
    """(grad_x, raw) -> grad_raw."""

    @staticmethod
    def forward(grad_x: Tensor, raw: Tensor, dim: int) -> Tensor:
        return implementation(_kernels).backward(grad_x, raw, dim, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.dim = inputs
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, along_raw: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:2]
        kernels = _kernels.reference if torch.is_grad_enabled() else _kernels
        return *only(wanted, kernels.double_backward(along_raw, *ctx.saved_tensors, ctx.dim, bits(wanted))), None


_softmax_transform = applier(Softmax, _softmax_jvp)
_softmax_backward = applier(SoftmaxBackward, _softmax_backward_jvp)


# --- Public --------------------------------------------------------------------------------------------------------


@overload
def simplex(raw: Tensor, dim: int = -1, *, kind: str = "softmax", return_log_det: Literal[False] = False) -> Tensor: ...
@overload
def simplex(
    raw: Tensor, dim: int = -1, *, kind: str = "softmax", return_log_det: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def simplex(
    raw: Tensor, dim: int = -1, *, kind: str = "softmax", return_log_det: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Map ``raw`` to the simplex along ``dim``: positive numbers that sum to 1.

    "softmax", from K numbers to K, in place of ``torch.softmax(raw, dim)``: differentiates twice in one kernel each,
    loses no digits of 16-bit gradients to the rounding of x, and never gives an exact 0 for a finite raw (an infinitely
    negative one gives 0: a mask). Like ``torch.softmax``, it keeps the result for backward on a CPU, except in 16 bits.

    The other kinds are bijections from K - 1 numbers to K and have a log-determinant, for densities. "ilr", isometric
    log-ratios, preserves distances: between raws those between the logarithms of x, centred. "stick_breaking" is the
    map of ``torch.distributions.StickBreakingTransform``, without its clipping. For both raw = 0 gives equal parts;
    they keep raw for backward, and never give an exact 0.

    Args:
        raw: any shape; float16, bfloat16, float32 or float64. At least one element along ``dim`` for "softmax"; at
            least one dimension for the other kinds, which make the one-element row 1 out of none.
        dim: the dimension that sums to 1.
        kind: "softmax", "ilr" or "stick_breaking".
        return_log_det: return log |det dx/draw| too, where x is taken without its last element along ``dim``; must be
            false for "softmax", which maps K numbers to a set of K - 1 dimensions.

    Returns:
        x: dtype and layout of raw; its shape, with one element more along ``dim`` for the bijections.
        log_det, if asked for: dtype of raw, and its shape without ``dim``.

    Raises:
        TypeError: raw is not a floating-point tensor.
        IndexError: dim is out of range.
        ValueError: no elements along dim, an unknown kind, or a log-det that does not exist.

    Source: for "ilr", Egozcue and others, "Isometric logratio transformations for compositional data analysis" (2003).
    """
    _checks.kind("simplex", kind, KINDS)
    if kind == "softmax":
        if return_log_det:
            raise ValueError(
                'simplex: kind "softmax" has no Jacobian determinant, since it maps K numbers onto K - 1 dimensions; '
                'the bijective kinds "ilr" and "stick_breaking" have one'
            )
        _checks.floating("simplex", raw)
        return _softmax_transform(raw, _checks.dimension("simplex", raw, dim))
    _checks.floating("simplex", raw)
    dim = _checks.dimension("simplex", raw, dim, least=0)
    _has_rows("simplex", raw, kind)
    return bijection.transform(raw, dim, kind, return_log_det)


def _has_rows(op: str, tensor: Tensor, kind: str, name: str = "raw") -> None:
    if tensor.dim() == 0:
        raise ValueError(f'{op}: {name} needs at least one dimension for kind "{kind}", got shape ()')


def simplex_inverse(x: Tensor, dim: int = -1, *, kind: str = "softmax") -> Tensor:
    """The raw that :func:`simplex` maps to ``x``; for "softmax" its logarithm, one of many, as it forgets a constant.

    A coordinate that is 0, or negative by a rounding error, counts as the smallest positive number of the dtype, so
    that raw is finite; one further below 0 or further above 1 gives NaN. Plain PyTorch, differentiable to any order.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        dim, kind: as for :func:`simplex`.

    Returns:
        raw: dtype of x and its shape, with one element less along ``dim`` for the bijections.
    """
    _checks.kind("simplex_inverse", kind, KINDS)
    _checks.floating("simplex_inverse", x, "x")
    dim = _checks.dimension("simplex_inverse", x, dim, "x")
    if kind == "softmax":
        return raw_at(x).to(x.dtype)
    _has_rows("simplex_inverse", x, kind, "x")
    return bijection.INVERSES[kind](raw_at(x), dim).to(x.dtype)


def raw_at(x: Tensor) -> Tensor:
    """log x in the compute dtype: :func:`simplex_inverse` for softmax, without its checks of arguments."""
    slack = torch.finfo(x.dtype).eps
    y = x.to(compute_dtype(x.dtype))
    smallest = smallest_positive(y, x.dtype)
    outside = (y < -slack) | (y > 1 + slack)
    return torch.where(outside, torch.nan, torch.maximum(y, smallest).clamp(max=1.0).log())
