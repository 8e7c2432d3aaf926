"""The projection onto the simplex along one dimension: Euclidean (sparsemax), or in a diagonal metric.

``weight`` d > 0 is 1 where there is none, u = 1 / d. Along a row (``csrc/math/projection.h`` has the numerics):

    minimise 1/2 sum_i d_i (x_i - y_i)^2  over  y >= 0, sum_i y_i = total
    y_i = max(0, x_i - lambda u_i),   lambda = (sum_S x_i - total) / sum_S u_i over the support S = {i: y_i > 0}

For every set T of indices (sum_T x_i - total) / sum_T u_i is a lower bound of lambda, and S attains it. The kernels
climb there by Newton's method; the reference takes the largest over all T that an order by d_i x_i can put first.

Derivatives are those of the support at hand, with m = sum_S g_i u_i / sum_S u_i:

    grad_x_i = g_i - m  on S, else 0         grad_weight_i = lambda u_i^2 grad_x_i
    second order, along a, without a weight: the same map, which is linear and its own adjoint
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks, _library
from ._autograd import applier, bits, implementation, needs_graph, only, operators, save_for_forward
from ._library import compute_dtype

# --- Reference -----------------------------------------------------------------------------------------------------


def _project(x: Tensor, u: Tensor, anchor: Tensor, dim: int, total: float) -> Tensor:
    """y in the dtype of x, by sorting. ``anchor`` is near lambda as seen from the largest x.

    lambda is a sum: the anchor, and two numbers for the distance from there, so that even a million small y keep their
    digits. Two Newton steps from what is left over set the sum right.
    """
    z = x - anchor * u
    order = (z / u).argsort(dim, descending=True)
    high = ((z.gather(dim, order).cumsum(dim) - total) / u.gather(dim, order).cumsum(dim)).amax(dim, keepdim=True)
    high = high - 4 * torch.finfo(x.dtype).eps * high.abs()  # not beyond lambda, where the support might be empty
    low = torch.zeros_like(high)
    for _ in range(2):
        rest = (z - high * u) - low * u
        inside = rest > 0
        excess = torch.where(inside, rest, 0.0).sum(dim, keepdim=True) - total
        high, low = _two_sum(high, low + excess / torch.where(inside, u, 0.0).sum(dim, keepdim=True))
    y = (z - high * u) - low * u
    return torch.where(y <= 0, 0.0, y)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what rounding took from it (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _forward_weighted(x: Tensor, weight: Tensor, dim: int, total: float) -> Tensor:
    if x.dim() == 0:
        return _forward_weighted(x[None], weight[None], 0, total)[0]
    compute = compute_dtype(x.dtype)
    u = weight.to(compute).reciprocal()
    v = torch.where((u > 0) & (u < torch.inf), x.to(compute), torch.nan)
    return _project(v, u, ((v - total) / u).amax(dim, keepdim=True), dim, total).to(x.dtype)


def _forward(x: Tensor, dim: int, total: float) -> Tensor:
    if x.dim() == 0:
        return _forward(x[None], 0, total)[0]
    v = x.to(compute_dtype(x.dtype))
    return _project(v, torch.ones_like(v), v.amax(dim, keepdim=True), dim, total).to(x.dtype)


def _on_support(v: Tensor, y: Tensor) -> Tensor:
    """v where y is not 0, in the compute dtype. A NaN counts as not 0, so that a row of it stays NaN."""
    return torch.where(y.detach() != 0, v.to(compute_dtype(y.dtype)), 0.0)


def _sum(v: Tensor, dim: int) -> Tensor:
    return v.sum(dim, keepdim=True) if v.dim() else v


def _backward_weighted(
    grad_y: Tensor, x: Tensor | None, y: Tensor, weight: Tensor, dim: int, needed: int = 3
) -> tuple[Tensor, Tensor]:
    g, u = _on_support(grad_y, y), _on_support(weight.to(compute_dtype(y.dtype)).reciprocal(), y)
    slope = _sum(u, dim)
    grad_x = _on_support(g - _sum(g * u, dim) / slope, y)
    if x is None:
        return grad_x.to(y.dtype), y.new_empty(0)
    # lambda, of which y is no part: sum_S y_i is the constant total.
    multiplier = _sum(_on_support(x.to(u.dtype) - y.detach(), y), dim) / slope
    return grad_x.to(y.dtype), (multiplier * u * u * grad_x).to(y.dtype)


def _backward(grad_y: Tensor, y: Tensor, dim: int) -> Tensor:
    return _backward_weighted(grad_y, None, y, torch.ones_like(y), dim)[0]


_kernels = _library.define(
    "projection",
    {
        "forward": _forward,
        "backward": _backward,
        "forward.weighted": _forward_weighted,
        "backward.weighted": _backward_weighted,
    },
)


# --- Autograd ------------------------------------------------------------------------------------------------------
#
# Functions save the result, whose zeros say all that a derivative without a weight has to know.


def _projection_jvp(ctx: Any, x_t: Tensor, *_: None) -> Tensor:
    (y,) = ctx.saved_tensors
    return _backward(x_t, y, ctx.dim)  # the Jacobian is symmetric


class Projection(Function):
    """x -> y."""

    @staticmethod
    def forward(x: Tensor, dim: int, total: float) -> Tensor:
        return operators(_kernels).forward(x, dim, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.dim, _ = inputs
        ctx.save_for_backward(output)
        save_for_forward(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        compute = _projection_backward if needs_graph() else ProjectionBackward.forward
        return compute(grad_y, y, ctx.dim), None, None


def _projection_backward_jvp(ctx: Any, grad_y_t: Tensor | None, *_: Any) -> Tensor:
    (y,) = ctx.saved_tensors
    return torch.zeros_like(y) if grad_y_t is None else _backward(grad_y_t, y, ctx.dim)


class ProjectionBackward(Function):
    """(grad_y, y) -> grad_x. Constant in y, linear in grad_y, and its own derivative."""

    @staticmethod
    def forward(grad_y: Tensor, y: Tensor, dim: int) -> Tensor:
        return implementation(_kernels).backward(grad_y, y, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, y, ctx.dim = inputs
        ctx.save_for_backward(y)
        save_for_forward(ctx, y)

    @staticmethod
    def backward(ctx: Any, along_x: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        compute = _projection_backward if needs_graph() else ProjectionBackward.forward
        return compute(along_x, y, ctx.dim), None, None


def _weighted_projection_jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, *_: None) -> Tensor:
    x, weight, y = ctx.saved_tensors
    along = torch.zeros_like(y) if x_t is None else x_t
    if weight_t is not None:
        along = along + weight_t * (x - y) / weight
    return _backward_weighted(along * weight, None, y, weight, ctx.dim)[0] / weight  # the adjoint of backward


class WeightedProjection(Function):
    """(x, weight) -> y. Saves x too where the weight wants a gradient; second order is the reference's own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dim: int, total: float) -> Tensor:
        return operators(_kernels).forward_weighted(x, weight, dim, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.dim, _ = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, output)
        save_for_forward(ctx, x, weight, output)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        kernels = _kernels.reference if needs_graph() else implementation(_kernels)
        results = kernels.backward_weighted(grad_y, x if wanted[1] else None, y, weight, ctx.dim, bits(wanted))
        return *only(wanted, results), None, None


_projection = applier(Projection, _projection_jvp)
_projection_backward = applier(ProjectionBackward, _projection_backward_jvp)
_weighted_projection = applier(WeightedProjection, _weighted_projection_jvp)


# --- Public --------------------------------------------------------------------------------------------------------


def project_simplex(x: Tensor, dim: int = -1, *, total: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """The point of the simplex {y >= 0, sum y = total} along ``dim`` that is nearest to ``x``.

    Without a weight, near in the Euclidean sense, which for ``total=1`` is sparsemax: a softmax with exact zeros. With
    one, in the metric sum_i weight_i (x_i - y_i)^2: what has to follow a step that was preconditioned by 1 / weight.

    Exact up to rounding, sums included. A point of the simplex comes back as it is, up to rounding. ``-inf`` is a mask
    and gives 0. As in softmax, a row with NaN or ``+inf``, or of nothing but ``-inf``, gives NaN.

    Differentiable twice and more in x and weight, where the support does not change; keeps the result for backward, and
    x only where the weight needs a gradient.

    Args:
        x: any shape with at least one element along ``dim``; float16, bfloat16, float32 or float64.
        dim: the dimension that sums to ``total``.
        total: a positive number; its product with the size of ``dim`` must not overflow.
        weight: a positive tensor that broadcasts to the shape of x, in any real dtype, on its device; only ratios
            within a row matter. A weight that is not positive, or whose reciprocal is 0 or infinite, makes its row NaN:
            a check would wait for the device. Rounding it moves y by as much as rounding x does.

    Returns:
        y: shape, dtype and layout of x. Sums are right to 1e-6 in float32, to the rounding of each element in 16 bits;
            with a weight as long as x is less than 1e7 times as large as total.

    Raises:
        TypeError: x is not a floating-point tensor, or weight not a real one.
        IndexError: dim is out of range.
        ValueError: no elements along dim; total is not positive and finite; or weight does not broadcast to x or is on
            another device.

    Source: Martins and Astudillo, "From softmax to sparsemax" (2016); for the metric, Duchi, Hazan and Singer,
    "Adaptive subgradient methods" (2011).
    """
    op = "project_simplex"
    _checks.floating(op, x, "x")
    dim = _checks.dimension(op, x, dim, "x")
    _checks.total(op, x, total)
    if weight is None:
        return _projection(x, dim, total)
    weight = _checks.weight(op, x, weight)
    # In 16 bits the weight would lose what a metric is for: x goes to the weight's dtype, not the weight to that of x.
    return _weighted_projection(x.to(weight.dtype), weight, dim, total).to(x.dtype)
