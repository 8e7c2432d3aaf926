"""What the transforms should give: mpmath at 50 digits, rounded once to float64, and what a dtype can hold of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

from constrained_ops._library import compute_dtype

DIGITS = 50
INF = math.inf


@dataclass
class Truth:
    """Names as in ``csrc/math/elementwise.h``; every field a float64 tensor of raw's shape.

    ``distance`` is that of x from the nearer finite bound, infinite without one.
    """

    x: Tensor
    distance: Tensor
    x_raw: Tensor
    x_raw_raw: Tensor
    x_lower: Tensor
    x_upper: Tensor
    x_raw_lower: Tensor
    x_raw_upper: Tensor
    log_det: Tensor
    log_det_raw: Tensor
    log_det_raw_raw: Tensor
    log_det_width: Tensor
    log_det_width_width: Tensor

    def scale(self) -> Tensor:
        """The larger of |x| and the distance to the nearer bound: what value errors are relative to."""
        return torch.where(self.distance.isfinite(), torch.maximum(self.x.abs(), self.distance), self.x.abs())


FIELDS = tuple(Truth.__annotations__)


@dataclass
class _Sigmoid:
    """Of one raw; by e = exp(-|raw|), so that 50 digits do not cancel away."""

    below: mpf  # sigmoid(raw)
    above: mpf  # 1 - sigmoid(raw)
    tanh_half: mpf
    softplus: mpf  # log(1 + exp(raw))
    softplus_minus: mpf  # log(1 + exp(-raw))


@functools.cache
def _sigmoid(raw: float) -> _Sigmoid:
    r = mpf(raw)
    e = mpmath.exp(-abs(r))
    near, far, log1p = e / (1 + e), 1 / (1 + e), mpmath.log1p(e)
    below, above = (near, far) if r < 0 else (far, near)
    return _Sigmoid(below, above, mpmath.tanh(r / 2), max(r, mpf(0)) + log1p, max(-r, mpf(0)) + log1p)


def _bounded(raw: float, lower: float, upper: float) -> tuple[mpf, ...]:
    s = _sigmoid(raw)
    slope, zero, one = s.below * s.above, mpf(0), mpf(1)
    if lower == -INF and upper == INF:
        return mpf(raw), mpf(INF), one, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    if upper == INF:
        x, log_det = mpf(lower) + s.softplus, -s.softplus_minus
        return x, s.softplus, s.below, slope, one, zero, zero, zero, log_det, s.above, -slope, zero, zero
    if lower == -INF:
        x, log_det = mpf(upper) - s.softplus_minus, -s.softplus
        return x, s.softplus_minus, s.above, -slope, zero, one, zero, zero, log_det, -s.below, -slope, zero, zero
    w = mpf(upper) - mpf(lower)
    distance = w * min(s.below, s.above)
    x = mpf(lower) + distance if raw < 0 else mpf(upper) - distance
    derivatives = w * slope, -w * slope * s.tanh_half, s.above, s.below, -slope, slope
    log_det = mpmath.log(w) - s.softplus - s.softplus_minus
    return x, distance, *derivatives, log_det, -s.tanh_half, -2 * slope, 1 / w, -1 / w**2


def _exponential(raw: float, lower: float, upper: float) -> tuple[mpf, ...]:
    e, zero, one = mpmath.exp(mpf(raw)), mpf(0), mpf(1)
    return mpf(lower) + e, e, e, e, one, zero, zero, zero, mpf(raw), one, zero, zero, zero


def _truth(formula: Callable[..., tuple[mpf, ...]], raw: Tensor, lower: float | Tensor, upper: float | Tensor) -> Truth:
    lower, upper = (torch.as_tensor(bound, dtype=torch.float64).expand(raw.shape) for bound in (lower, upper))
    with mpmath.workdps(DIGITS):
        points = [
            [float(value) for value in formula(*operands)]
            for operands in zip(*(t.double().reshape(-1).tolist() for t in (raw, lower, upper)), strict=True)
        ]
    columns = torch.tensor(points, dtype=torch.float64).reshape(-1, len(FIELDS)).T
    return Truth(*(column.reshape(raw.shape) for column in columns))


def bounded(raw: Tensor, lower: float | Tensor, upper: float | Tensor) -> Truth:
    return _truth(_bounded, raw, lower, upper)


def exponential(raw: Tensor, lower: float | Tensor) -> Truth:
    return _truth(_exponential, raw, lower, INF)


@dataclass
class SimplexTruth:
    """Of one row: x, backward along g, and both results of its derivative along a, with what rounding is relative to.

    Each ``*_scale`` sums the magnitudes of the terms that a result is a sum of, taken from differences g - g* to the
    value at the row's largest x.
    """

    x: Tensor
    grad_raw: Tensor
    grad_raw_scale: Tensor
    for_grad: Tensor
    for_grad_scale: Tensor
    for_raw: Tensor
    for_raw_scale: Tensor


def simplex(raw: Tensor, g: Tensor, along: Tensor) -> SimplexTruth:
    with mpmath.workdps(DIGITS):
        r, g_mp, a_mp = ([mpf(v) for v in t.double().tolist()] for t in (raw, g, along))
        top = max(range(len(r)), key=r.__getitem__)
        weights = [mpmath.exp(v - r[top]) for v in r]
        total = mpmath.fsum(weights)
        x = [w / total for w in weights]

        def mean(v: list[mpf]) -> mpf:
            return mpmath.fdot(x, v)

        def centered(v: list[mpf]) -> tuple[list[mpf], list[mpf]]:
            shifted = [u - v[top] for u in v]
            m, m_abs = mean(shifted), mean([abs(u) for u in shifted])
            return [u - m for u in shifted], [abs(u) + m_abs for u in shifted]

        (g_c, g_abs), (a_c, a_abs) = centered(g_mp), centered(a_mp)
        c, c_abs = [p * q for p, q in zip(a_c, g_c, strict=True)], [p * q for p, q in zip(a_abs, g_abs, strict=True)]
        mean_c, mean_c_abs = mean(c), mean(c_abs)
        columns = (
            x,
            [p * q for p, q in zip(x, g_c, strict=True)],
            [p * q for p, q in zip(x, g_abs, strict=True)],
            [p * q for p, q in zip(x, a_c, strict=True)],
            [p * q for p, q in zip(x, a_abs, strict=True)],
            [p * (q - mean_c) for p, q in zip(x, c, strict=True)],
            [p * (q + mean_c_abs) for p, q in zip(x, c_abs, strict=True)],
        )
        return SimplexTruth(*(torch.tensor([float(v) for v in col], dtype=torch.float64) for col in columns))


@dataclass
class BijectionTruth:
    """Of one row: x, log_det, backward along (g, h), and the results of its derivative along a.

    By the Jacobian of log x as a matrix. Each ``*_scale`` sums the magnitudes of the terms that a result is a sum of.
    """

    x: Tensor
    log_x: Tensor
    log_det: Tensor
    grad_raw: Tensor
    grad_raw_scale: Tensor
    for_grad_x: Tensor
    for_grad_x_scale: Tensor
    for_grad_log_det: Tensor
    for_grad_log_det_scale: Tensor
    for_raw: Tensor
    for_raw_scale: Tensor


def helmert(size: int) -> list[list[mpf]]:
    """The orthonormal basis of the plane of ``size`` numbers that sum to 0 on which ILR rests, as [size][size - 1]."""

    def entry(k: int, n: int) -> mpf:
        return mpf(k <= n) / mpmath.sqrt(n * (n + 1)) if k <= n else mpf(-n * (k == n + 1)) / mpmath.sqrt(n * (n + 1))

    return [[entry(k, n) for n in range(1, size)] for k in range(1, size + 1)]


def log_simplex(kind: str, raw: Tensor) -> list[mpf]:
    """log x of a row, in as many steps as it has numbers."""
    r, size = [mpf(v) for v in raw.double().tolist()], len(raw) + 1
    if kind == "ilr":
        w = [v / mpmath.sqrt(n * (n + 1)) for n, v in enumerate(r, 1)]
        tails = [mpf(0)]
        for v in reversed(w):
            tails.append(tails[-1] + v)
        z = [tail - k * (w[k - 1] if k else 0) for k, tail in enumerate(reversed(tails))]
        log_sum = mpmath.log(mpmath.fsum(map(mpmath.exp, z)))
        return [v - log_sum for v in z]
    log_x, left = [], mpf(0)
    for n, v in enumerate(r, 1):
        odds = v - mpmath.log(size - n)
        log_x.append(left - mpmath.log1p(mpmath.exp(-odds)))
        left -= mpmath.log1p(mpmath.exp(odds))
    return [*log_x, left]


def bijection(kind: str, raw: Tensor, g: Tensor, h: float, along: Tensor) -> BijectionTruth:
    with mpmath.workdps(DIGITS):
        log_x, size = log_simplex(kind, raw), len(raw) + 1
        x, ks, ns = [mpmath.exp(v) for v in log_x], range(size), range(size - 1)
        g_mp, a = ([mpf(v) for v in t.double().tolist()] for t in (g, along))
        constant = mpmath.log(size) / 2 if kind == "ilr" else mpf(0)
        if kind == "ilr":
            basis = helmert(size)
            means = [mpmath.fsum(x[k] * basis[k][n] for k in ks) for n in ns]
            jacobian = [[basis[k][n] - means[n] for n in ns] for k in ks]
            magnitudes = [[abs(basis[k][n]) + sum(x[j] * abs(basis[j][n]) for j in ks) for n in ns] for k in ks]
        else:
            taken = [x[n] / mpmath.fsum(x[n:]) for n in ns]
            jacobian = [[(1 - taken[n] if k == n else -taken[n] * (k > n)) for n in ns] for k in ks]
            magnitudes = [[abs(v) for v in row] for row in jacobian]
        u = [gk * xk + h for gk, xk in zip(g_mp, x, strict=True)]
        u_abs = [abs(gk) * xk + abs(h) for gk, xk in zip(g_mp, x, strict=True)]
        log_t = [mpmath.fdot(row, a) for row in jacobian]  # log x along a
        log_t_abs = [mpmath.fdot(row, [abs(v) for v in a]) for row in magnitudes]

        def second(m: int, k: int) -> mpf:
            """The derivative of log_t[k] to raw[m]."""
            if kind == "ilr":
                return -mpmath.fsum(x[j] * jacobian[j][m] * mpmath.fdot(basis[j], a) for j in ks)
            return -a[m] * taken[m] * (1 - taken[m]) * (k >= m)

        of_second = [[second(m, 0)] * size if kind == "ilr" else [second(m, k) for k in ks] for m in ns]
        columns = (
            x,
            log_x,
            [constant + mpmath.fsum(log_x)],
            [mpmath.fsum(u[k] * jacobian[k][n] for k in ks) for n in ns],
            [mpmath.fsum(u_abs[k] * magnitudes[k][n] for k in ks) for n in ns],
            [p * q for p, q in zip(x, log_t, strict=True)],
            [p * q for p, q in zip(x, log_t_abs, strict=True)],
            [mpmath.fsum(log_t)],
            [mpmath.fsum(log_t_abs)],
            [mpmath.fsum(g_mp[k] * x[k] * jacobian[k][m] * log_t[k] + u[k] * of_second[m][k] for k in ks) for m in ns],
            [
                mpmath.fsum(
                    abs(g_mp[k]) * x[k] * magnitudes[k][m] * log_t_abs[k] + u_abs[k] * abs(of_second[m][k]) for k in ks
                )
                for m in ns
            ],
        )
        return BijectionTruth(*(torch.tensor([float(v) for v in col], dtype=torch.float64) for col in columns))


# --- What a dtype can hold --------------------------------------------------------------------------------------------


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at |x|, in float64: at least its smallest subnormal number."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.double().abs())[1] - 1
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent).clamp(min=smallest_subnormal(dtype))


def held(bound: float, dtype: torch.dtype) -> float:
    """A bound as operators on ``dtype`` see it."""
    return torch.tensor(bound, dtype=compute_dtype(dtype)).item()


def smallest_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def next_above(x: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` greater than the float64 number ``x``; infinite if there is none."""
    nearest = torch.tensor(x, dtype=torch.float64).to(dtype)
    while nearest.double() <= x:
        nearest = torch.nextafter(nearest, torch.full_like(nearest, INF))
    return nearest.item()


def next_below(x: float, dtype: torch.dtype) -> float:
    return -next_above(-x, dtype)


def assert_within(got: Tensor, want: Tensor, tolerance: Tensor | float, where: Tensor) -> None:
    """``got`` is no further than ``tolerance`` from ``want``, and never NaN; says at which ``where`` it is worst."""
    got = got.detach().cpu().double()
    ratio = torch.where(got == want, 0.0, (got - want).abs() / tolerance).nan_to_num(nan=INF)
    worst = int(ratio.argmax()) if ratio.numel() else 0
    assert (ratio <= 1).all(), (
        f"{int((ratio > 1).sum())} of {ratio.numel()} wrong; worst at {where.reshape(-1)[worst]!r}: "
        f"got {got.reshape(-1)[worst].item()!r}, want {want.reshape(-1)[worst].item()!r}, "
        f"{ratio.max():.4g} times what is allowed"
    )
