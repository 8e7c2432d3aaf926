"""The bijections from K - 1 numbers to the simplex of K: isometric log-ratios and stick-breaking.

n counts raw from 1 to K - 1, and k counts x from 1 to K (``csrc/math/bijection.h`` has the numerics). For both kinds
the determinant, of the Jacobian without x_K, is the product of all x but for a constant:

    log_det = sum_k log x_k + (log(K) / 2 for "ilr", 0 for "stick_breaking")

"ilr": coordinates in an orthonormal basis of the plane of logits that sum to 0 (Egozcue and others, 2003)

    w_n = raw_n / sqrt(n (n + 1)),  z_k = sum_{n >= k} w_n - (k - 1) w_{k-1},  x = softmax(z)
    backward: softmax's, and - h K x_k for the gradient h of log_det; then the transpose of raw -> z,
        grad_raw_n = (sum_{k <= n} u_k - n u_{n+1}) / sqrt(n (n + 1))
    second order, along a with b = A a for raw -> z = A raw: softmax's along b, of g - h K

"stick_breaking": each n takes a part of what is left of a stick of length 1; raw = 0 gives equal parts

    s_n = sigmoid(raw_n - log(K - n)),  x_n = s_n prod_{j < n} (1 - s_j),  x_K = prod_j (1 - s_j)
    backward: grad_raw_n = x_n (1 - s_n) (g_n - mean of g over x_{n+1}, ..., x_K) + h (1 - s_n - (K - n) s_n)
    second order, along a, where e is backward's first part:
        for g: x_k (a_k (1 - s_k) - sum_{j < k} s_j a_j)
        for raw: e_n (a_n (1 - 2 s_n) - sum_{j < n} s_j a_j) - s_n sum_{m > n} a_m e_m - h (K - n + 1) s_n (1 - s_n) a_n

Source: Stan reference manual, "Simplex transform"; torch.distributions.StickBreakingTransform, whose map this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import logsigmoid

from . import _library
from ._autograd import applier, bits, needs_graph, only, save_for_forward
from ._library import Kernels, compute_dtype
from ._rows import centered, shifted, smallest_positive


def _counted(length: int, like: Tensor, dim: int) -> Tensor:
    """1, 2, ..., ``length`` along ``dim``, in the compute dtype."""
    shape = [1] * like.dim()
    shape[dim] = length
    return torch.arange(1, length + 1, dtype=compute_dtype(like.dtype), device=like.device).view(shape)


def _before(v: Tensor, dim: int) -> Tensor:
    """Sums of what comes before each element, and of all: one element more than v."""
    return torch.cat([torch.zeros_like(v.sum(dim, keepdim=True)), v.cumsum(dim)], dim)


def _after(v: Tensor, dim: int) -> Tensor:
    """Sums of what comes after each element but the last: one element less than v."""
    return v.flip(dim).cumsum(dim).flip(dim).narrow(dim, 1, v.shape[dim] - 1)


def _into(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, strictly positive. NaN stays NaN."""
    smallest = smallest_positive(x, dtype)
    return torch.where(x < smallest, smallest, x).to(dtype)


def _grads(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both in the compute dtype and with raw's rank, zeros where there is none."""
    zero = raw.new_zeros((), dtype=compute_dtype(raw.dtype))
    sizes = list(raw.shape)
    sizes[dim] += 1
    g = zero.expand(sizes) if grad_x is None else grad_x.to(zero.dtype)
    sizes[dim] = 1
    h = zero.expand(sizes) if grad_log_det is None else grad_log_det.to(zero.dtype).unsqueeze(dim)
    return g, h


# --- Reference: isometric log-ratios -------------------------------------------------------------------------------


def _scaled(raw: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """n, 1 / sqrt(n (n + 1)), and w."""
    n = _counted(raw.shape[dim], raw, dim)
    scale = (n * (n + 1)).rsqrt()
    return n, scale, raw.to(scale.dtype) * scale


def _logits(raw: Tensor, dim: int) -> Tensor:
    """z less the sum of w, of which softmax sees nothing."""
    n, _, w = _scaled(raw, dim)
    before = _before(w, dim)
    return -before - torch.cat([torch.zeros_like(before.narrow(dim, 0, 1)), n * w], dim)


def _to_raw(u: Tensor, like: Tensor, dim: int) -> Tensor:
    """The transpose of raw -> z."""
    n, scale, _ = _scaled(like, dim)
    length = like.shape[dim]
    return (u.cumsum(dim).narrow(dim, 0, length) - n * u.narrow(dim, 1, length)) * scale


def _ilr_forward(raw: Tensor, dim: int) -> Tensor:
    return _into(torch.softmax(_logits(raw, dim), dim), raw.dtype)


def _ilr_forward_log_det(raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    z, size = _logits(raw, dim), raw.shape[dim] + 1
    log_sum = _scaled(raw, dim)[2].sum(dim) + z.logsumexp(dim)
    return _into(torch.softmax(z, dim), raw.dtype), (0.5 * math.log(size) - size * log_sum).to(raw.dtype)


def _ilr_backward(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int) -> Tensor:
    z = _logits(raw, dim)
    x = torch.softmax(z, dim)
    g, h = _grads(grad_x, grad_log_det, raw, dim)
    along_z = x * (centered(x, shifted(g, z, dim), dim) - h * z.shape[dim])
    return _to_raw(along_z, raw, dim).to(raw.dtype)


def _ilr_double_backward(
    along_raw: Tensor, grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int, needed: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    z, b = _logits(raw, dim), _logits(along_raw, dim)
    x, size = torch.softmax(z, dim), z.shape[dim]
    g, h = _grads(grad_x, grad_log_det, raw, dim)
    along = centered(x, shifted(b, z, dim), dim)
    c = along * (centered(x, shifted(g, z, dim), dim) - h * size)
    for_log_det = -size * (_scaled(along_raw, dim)[2].sum(dim) + (x * b).sum(dim))
    for_raw = _to_raw(x * centered(x, c, dim), raw, dim)
    return (x * along).to(raw.dtype), for_log_det.to(raw.dtype), for_raw.to(raw.dtype)


# --- Reference: stick-breaking -------------------------------------------------------------------------------------


class _Sticks:
    """What each n takes of the stick, and what it leaves; ``x`` not yet kept above 0."""

    def __init__(self, raw: Tensor, dim: int) -> None:
        self.rest = _counted(raw.shape[dim], raw, dim).flip(dim)  # K - n
        odds = raw.to(self.rest.dtype) - self.rest.log()
        self.taken, self.left = torch.sigmoid(odds), torch.sigmoid(-odds)
        self.log_taken, self.log_left = logsigmoid(odds), logsigmoid(-odds)
        remaining = _before(self.log_left, dim).exp()
        self.x = torch.cat([self.taken, torch.ones_like(remaining.narrow(dim, 0, 1))], dim) * remaining
        self.log_det_raw = self.left - self.rest * self.taken

    def backward(self, g: Tensor, dim: int) -> Tensor:
        """The gradient from x alone; g is taken from the last one on, so that equal ones give exactly 0."""
        length = g.shape[dim] - 1
        u = self.x * (g - g.narrow(dim, length, 1))
        return self.left * u.narrow(dim, 0, length) - self.taken * _after(u, dim)


def _stick_breaking_forward(raw: Tensor, dim: int) -> Tensor:
    return _into(_Sticks(raw, dim).x, raw.dtype)


def _stick_breaking_forward_log_det(raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    sticks = _Sticks(raw, dim)
    log_det = (sticks.log_taken + sticks.rest * sticks.log_left).sum(dim)
    return _into(sticks.x, raw.dtype), log_det.to(raw.dtype)


def _stick_breaking_backward(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int) -> Tensor:
    sticks = _Sticks(raw, dim)
    g, h = _grads(grad_x, grad_log_det, raw, dim)
    return (sticks.backward(g, dim) + h * sticks.log_det_raw).to(raw.dtype)


def _stick_breaking_double_backward(
    along_raw: Tensor, grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int, needed: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    sticks, length = _Sticks(raw, dim), raw.shape[dim]
    g, h = _grads(grad_x, grad_log_det, raw, dim)
    a = along_raw.to(sticks.taken.dtype)
    before = _before(sticks.taken * a, dim)
    along_log_x = torch.cat([sticks.left * a, torch.zeros_like(before.narrow(dim, 0, 1))], dim) - before
    from_x = sticks.backward(g, dim)
    after = _after(_pad(a * from_x, dim), dim)
    for_raw = from_x * (a * (sticks.left - sticks.taken) - before.narrow(dim, 0, length)) - sticks.taken * after
    for_raw = for_raw - h * (sticks.rest + 1) * sticks.taken * sticks.left * a
    for_log_det = (a * sticks.log_det_raw).sum(dim)
    return (sticks.x * along_log_x).to(raw.dtype), for_log_det.to(raw.dtype), for_raw.to(raw.dtype)


def _pad(v: Tensor, dim: int) -> Tensor:
    """v and a 0 after it."""
    return torch.cat([v, torch.zeros_like(v.sum(dim, keepdim=True))], dim)


_ilr = _library.define(
    "ilr",
    {
        "forward": _ilr_forward,
        "forward_log_det": _ilr_forward_log_det,
        "backward": _ilr_backward,
        "double_backward": _ilr_double_backward,
    },
)
_stick_breaking = _library.define(
    "stick_breaking",
    {
        "forward": _stick_breaking_forward,
        "forward_log_det": _stick_breaking_forward_log_det,
        "backward": _stick_breaking_backward,
        "double_backward": _stick_breaking_double_backward,
    },
)

# --- Autograd ------------------------------------------------------------------------------------------------------
#
# As for the elementwise family: Functions save raw, and their last arguments are the kernels and what is wanted.


def _bijection_jvp(ctx: Any, raw_t: Tensor, *_: Any) -> Any:
    (raw,) = ctx.saved_tensors
    x_t, log_det_t, _ = ctx.kernels.reference.double_backward(raw_t, None, None, raw, ctx.dim)
    return (x_t, log_det_t) if ctx.with_log_det else x_t


class Bijection(Function):
    """raw -> x, or (x, log_det)."""

    @staticmethod
    def forward(raw: Tensor, dim: int, kernels: Kernels, with_log_det: bool) -> Any:
        return (kernels.forward_log_det if with_log_det else kernels.forward)(raw, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raw, ctx.dim, ctx.kernels, ctx.with_log_det = inputs
        ctx.save_for_backward(raw)
        save_for_forward(ctx, raw)
        if ctx.with_log_det:
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None = None) -> Any:
        (raw,) = ctx.saved_tensors
        if needs_graph():
            grad = _bijection_backward(grad_x, grad_log_det, raw, ctx.dim, ctx.kernels)
        else:
            grad = ctx.kernels.backward(grad_x, grad_log_det, raw, ctx.dim)
        return grad, None, None, None


def _bijection_backward_jvp(
    ctx: Any, grad_x_t: Tensor | None, grad_log_det_t: Tensor | None, raw_t: Tensor | None, *_: Any
) -> Tensor:
    grad_x, grad_log_det, raw = ctx.saved_tensors
    reference = ctx.kernels.reference
    by_grads = reference.backward(grad_x_t, grad_log_det_t, raw, ctx.dim)
    if raw_t is None:
        return by_grads
    return by_grads + reference.double_backward(raw_t, grad_x, grad_log_det, raw, ctx.dim)[2]


class BijectionBackward(Function):
    """(grad_x, grad_log_det, raw) -> grad_raw."""

    @staticmethod
    def forward(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, dim: int, kernels: Kernels) -> Tensor:
        return kernels.backward(grad_x, grad_log_det, raw, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.dim, ctx.kernels = inputs
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, along_raw: Tensor) -> Any:
        kernels = ctx.kernels.reference if torch.is_grad_enabled() else ctx.kernels
        wanted = ctx.needs_input_grad[:3]
        results = kernels.double_backward(along_raw, *ctx.saved_tensors, ctx.dim, bits(wanted))
        return *only(wanted, results), None, None


_bijection = applier(Bijection, _bijection_jvp)
_bijection_backward = applier(BijectionBackward, _bijection_backward_jvp)


# --- What simplex.py calls -----------------------------------------------------------------------------------------


def _ilr_inverse(log_x: Tensor, dim: int) -> Tensor:
    log_x = log_x - log_x.detach().amax(dim, keepdim=True)  # changes nothing but the size of the sums
    return _to_raw(log_x, log_x.narrow(dim, 1, log_x.shape[dim] - 1), dim)


def _stick_breaking_inverse(log_x: Tensor, dim: int) -> Tensor:
    length = log_x.shape[dim] - 1
    left = _after(log_x.exp(), dim)
    return log_x.narrow(dim, 0, length) - left.log() + _counted(length, log_x, dim).flip(dim).log()


KERNELS = {"ilr": _ilr, "stick_breaking": _stick_breaking}
# From log x, in the compute dtype: any multiple of x has the same raw.
INVERSES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ilr": _ilr_inverse,
    "stick_breaking": _stick_breaking_inverse,
}


def transform(raw: Tensor, dim: int, kind: str, with_log_det: bool) -> Any:
    """x, or (x, log_det), of arguments that have been checked."""
    return _bijection(raw, dim, KERNELS[kind], with_log_det)
