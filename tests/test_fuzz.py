"""Hypothesis over shapes, layouts, dtypes, bounds and magnitudes up to the edges of each dtype, NaN and infinities.

The compiled CPU library against the reference, and what holds whatever the numbers. What needs no comparison and no odd
layouts is in test_properties.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import (
    INF,
    agree,
    both_bounds,
    dtypes,
    failed,
    fuzz,
    layouts,
    numbers,
    on_both,
    ordinary,
    row_shapes,
    seeds,
    shapes,
    stays,
)
from hypothesis import given
from hypothesis import strategies as st
from oracle import smallest_subnormal
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co
from constrained_ops import _library
from constrained_ops._checks import inside
from constrained_ops._library import compute_dtype

pytestmark = pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")


# --- Elementwise ------------------------------------------------------------------------------------------------------

floats = st.one_of(
    st.sampled_from([0.0, 1.0, -1e-3, 100.0, INF, -INF, 1e-45, 1e38, -3e38, 1e300]), st.floats(-5, 5), st.floats()
)


@st.composite
def tensor_bound(draw: st.DrawFn, shape: tuple[int, ...], side: int) -> Tensor:
    """Broadcastable to ``shape``, on one side of 0 so that bounds are in order; tiny, huge and infinite elements."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    kept = tuple(size if draw(st.booleans()) else 1 for size in kept)
    g = torch.Generator().manual_seed(draw(seeds))
    exponent = draw(st.sampled_from([0, 0, 0, -6, 3, 30, -30]))
    bound = (torch.rand(kept, generator=g, dtype=torch.float64) + 0.5) * 10.0**exponent
    if draw(st.booleans()):
        bound = torch.where(torch.rand(kept, generator=g) < 0.3, INF, bound)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return draw(layouts)((side * bound).to(dtype))


@st.composite
def elementwise(draw: st.DrawFn) -> tuple[str, Tensor, Any, Any, bool]:
    """(transform, raw, lower, upper, log_det)."""
    transform = draw(st.sampled_from(["bounded", "bounded", "softplus", "exp"]))
    shape = draw(shapes)
    g = torch.Generator().manual_seed(draw(seeds))
    raw = draw(layouts)(draw(numbers)(shape, g).to(draw(dtypes)))
    lower, upper = (draw(tensor_bound(shape, side) if draw(st.booleans()) else floats) for side in (-1, 1))
    if transform == "exp" and isinstance(lower, Tensor):
        lower = lower.clamp(min=-1e30)  # there is nothing above an infinitely low one
    return transform, raw, lower, upper if transform == "bounded" else INF, draw(st.booleans())


def apply(transform: str, raw: Tensor, lower: Any, upper: Any, log_det: bool) -> Any:
    if transform == "bounded":
        return co.bounded(raw, lower, upper, return_log_det=log_det)
    return co.positive(raw, lower, kind=transform, return_log_det=log_det)


@fuzz
@given(elementwise(), seeds, layouts)
def test_elementwise(case: tuple[str, Tensor, Any, Any, bool], seed: int, grad_layout: Any) -> None:
    transform, raw, lower, upper, log_det = case
    tensors = [t for t in (raw, lower, upper) if isinstance(t, Tensor)]
    untouched = [stays(t) for t in tensors]
    grad_x = grad_layout(torch.randn(raw.shape, generator=torch.Generator().manual_seed(seed)).to(raw.dtype))

    def call() -> Any:
        leaves = {id(t): t.detach().requires_grad_() for t in tensors}
        arguments = [leaves.get(id(a), a) for a in (raw, lower, upper)]
        results = apply(transform, *arguments, log_det)
        results = results if log_det else (results,)
        return *results, *grad(results, list(leaves.values()), [grad_x] * len(results))

    got, want = on_both(call)
    if failed(got) or failed(want):
        assert got == want
        scalars = [b for b in (lower, upper) if not isinstance(b, Tensor)]
        assert got[0] is ValueError and scalars, got
        return
    assert all(check() for check in untouched)

    compute = compute_dtype(raw.dtype)
    low, high = both_bounds(raw, lower, upper)
    width = torch.where(low.isfinite() & high.isfinite(), high - low, 1.0)
    r, low_d, high_d, width = (t.detach().double() for t in (raw, low, high, width))
    x = got[0]
    for result in got[: 1 + log_det]:
        assert result.shape == raw.shape and result.dtype == raw.dtype
        assert result.stride() == torch.empty_like(raw).stride()
    assert torch.equal(x.isnan(), raw.isnan() | low.isnan() | high.isnan())
    smallest, largest = inside(low, high, raw.dtype)
    room = (smallest <= largest) & width.isfinite() & ~raw.isnan()
    assert ((low_d < x.double()) & (x.double() < high_d))[room].all()
    # A line's value is raw itself, infinities included.
    line = (low == -INF) & (high == INF)
    assert x[room & ~line].isfinite().all()

    eps = torch.finfo(compute).eps
    ends = torch.where(low.isfinite(), low_d.abs(), 0.0).maximum(torch.where(high.isfinite(), high_d.abs(), 0.0))
    usable = room & raw.isfinite()
    names = ["x", "log_det"][: 1 + log_det] + ["grad"] * len(tensors)
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if name == "grad" and (a.shape != raw.shape or a.dtype != raw.dtype or a is not got[1 + log_det]):
            continue  # to bounds, sums in either order: test_backends
        slope = {"x": 0.0, "log_det": 1.0}.get(name, 1.0)
        if name == "x":
            tolerance = 8 * eps * (ends + b.double().abs())
        elif name == "log_det":
            tolerance = 8 * eps * (1 + r.abs() + width.log().abs())
        else:
            scale = b.double().abs() + grad_x.double().abs() * slope
            tolerance = 32 * eps * (scale if log_det else b.double().abs())
            tolerance = tolerance + 4 * torch.finfo(compute).smallest_normal * grad_x.double().abs() * (1 + width)
        agree(a[usable], b[usable], torch.as_tensor(tolerance).expand(raw.shape)[usable], f"{transform} {name}")


# --- Inverses ---------------------------------------------------------------------------------------------------------


@fuzz
@given(elementwise())
def test_inverses_are_finite_inside_and_nan_outside(case: tuple[str, Tensor, Any, Any, bool]) -> None:
    transform, x, lower, upper, _ = case
    untouched = stays(x)

    def call() -> Tensor:
        if transform == "bounded":
            return co.bounded_inverse(x, lower, upper)
        return co.positive_inverse(x, lower, kind=transform)

    got, want = on_both(call)
    if failed(got):
        assert got == want and got[0] is ValueError
        return
    assert untouched()
    assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5))
    assert got.shape == x.shape and got.dtype == x.dtype
    low, high = both_bounds(x, lower, upper)
    finite = [torch.where(b.isfinite(), b, 0.0).abs() for b in (low, high)]
    slack = torch.finfo(x.dtype).eps * finite[0].maximum(finite[1])
    outside = (x < low - slack) | (x > high + slack)
    smallest, largest = inside(low, high, x.dtype)
    room = (smallest <= largest) & (high - low).isnan().logical_not()
    room &= (high - low).isfinite() | low.isinf() | high.isinf()
    assert torch.equal(got.isnan()[room], (x.isnan() | outside)[room])
    assert got[room & ~outside & ~x.isnan()].isfinite().all()


@fuzz
@given(shapes.filter(lambda s: 0 not in s), seeds, dtypes, layouts, numbers, st.integers(0, 3))
def test_inverse_of_the_simplex(shape: Any, seed: int, dtype: torch.dtype, layout: Any, number: Any, dim: int) -> None:
    x = layout(number(shape, torch.Generator().manual_seed(seed)).to(dtype))
    raw = co.simplex_inverse(x, dim % max(1, x.dim()))
    slack = torch.finfo(dtype).eps
    outside = (x < -slack) | (x > 1 + slack) | x.isnan()
    assert raw.shape == x.shape and raw.dtype == dtype
    assert torch.equal(raw.isnan(), outside)
    assert raw[~outside].isfinite().all()


# --- Rows -------------------------------------------------------------------------------------------------------------


@fuzz
@given(row_shapes, st.integers(0, 3), seeds, dtypes, layouts, layouts, numbers)
def test_simplex(
    shape: Any, dim: int, seed: int, dtype: torch.dtype, layout: Any, grad_layout: Any, number: Any
) -> None:
    g = torch.Generator().manual_seed(seed)
    raw, grad_x = layout(number(shape, g).to(dtype)), grad_layout(ordinary(shape, g).to(dtype))
    dim = dim % len(shape) if shape else 0
    untouched = stays(raw), stays(grad_x)

    def call() -> Any:
        leaf = raw.detach().requires_grad_()
        x = co.simplex(leaf, dim)
        (grad_raw,) = grad(x, leaf, grad_x, create_graph=True)
        (second,) = grad(grad_raw, leaf, grad_x)
        return x, grad_raw, second

    got, want = on_both(call)
    assert not failed(got) and not failed(want) and all(check() for check in untouched)
    assert all(t.shape == raw.shape and t.dtype == dtype and t.stride() == torch.empty_like(raw).stride() for t in got)
    x = got[0].detach().double()
    # As in softmax: a NaN or +inf, or nothing but -inf, makes NaN of the row, and of that row alone.
    largest = raw.amax(dim, keepdim=True)
    broken = (largest.isnan() | largest.isinf()).expand(raw.shape)
    assert torch.equal(x.isnan(), broken)
    assert ((x > 0) | (raw == -INF))[~broken].all() and (x <= 1)[~broken].all()
    error = (x.sum(dim) if shape else x) - 1
    rounded = smallest_subnormal(dtype) * x.numel()
    assert (error.abs() <= 8 * torch.finfo(dtype).eps + rounded)[~(broken.any(dim) if shape else broken)].all()
    eps = torch.finfo(compute_dtype(dtype)).eps
    far = grad_x.double().abs().amax()
    underflow = torch.finfo(compute_dtype(dtype)).smallest_normal
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        tolerance = 64 * eps * x * far**k + 4 * underflow * (1 + far**k)
        agree(a[~broken], b[~broken], tolerance[~broken], f"simplex, order {k}")


@st.composite
def projections(draw: st.DrawFn) -> tuple[Tensor, int, float, Tensor | None]:
    shape = draw(row_shapes)
    g = torch.Generator().manual_seed(draw(seeds))
    dtype = draw(dtypes)
    x = draw(layouts)(draw(numbers)(shape, g).to(dtype))
    total = draw(st.sampled_from([1.0, 1.0, 0.5, 7.0, 1e-4, 1e4]))
    weight = None
    if draw(st.booleans()):
        spread = draw(st.sampled_from([0.0, 0.5, 1.5]))
        kept = tuple(size if draw(st.integers(0, 3)) else 1 for size in shape)
        weight = 10 ** (spread * torch.randn(kept, generator=g, dtype=torch.float64))
        weight = draw(layouts)(weight.to(draw(st.sampled_from([torch.float32, torch.float64]))))
    return x, draw(st.integers(0, 3)) % len(shape) if shape else 0, total, weight


@fuzz
@given(projections(), seeds, layouts)
def test_project_simplex(case: tuple[Tensor, int, float, Tensor | None], seed: int, grad_layout: Any) -> None:
    x, dim, total, weight = case
    grad_y = grad_layout(ordinary(tuple(x.shape), torch.Generator().manual_seed(seed)).to(x.dtype))
    untouched = [stays(t) for t in (x, grad_y, weight) if t is not None]

    def call() -> Any:
        leaf = x.detach().requires_grad_()
        y = co.project_simplex(leaf, dim, total=total, weight=weight)
        return y, *grad(y, leaf, grad_y)

    got, want = on_both(call)
    assert not failed(got) and not failed(want) and all(check() for check in untouched)
    assert all(t.shape == x.shape and t.dtype == x.dtype and t.stride() == torch.empty_like(x).stride() for t in got)
    y, y_want = (t[0].detach().double() for t in (got, want))
    rows = (lambda t: t.sum(dim, keepdim=True).expand(x.shape)) if x.dim() else (lambda t: t)
    largest = (x.amax(dim, keepdim=True) if x.dim() else x).expand(x.shape)
    broken = largest.isnan() | largest.isinf()
    # Differences within a row must not overflow; with weights, two numbers have to say where lambda is.
    compute = compute_dtype(x.dtype)
    far = torch.where(x.isinf(), 0.0, x.double()).nan_to_num().abs().amax()
    held = torch.finfo(compute)
    if far > 0.1 * held.max or (weight is not None and far > 1e-2 * total / held.eps**2):
        return
    assert torch.equal(y.isnan(), broken)
    whole = ~broken
    assert (y >= 0)[whole].all() and (y[whole & (x == -INF)] == 0).all()
    eps, stored = torch.finfo(compute).eps, torch.finfo(x.dtype).eps
    # With weights x counts by its magnitude, which its product with a weight is rounded to.
    reach = torch.where(x.isinf(), 0.0, x.double().abs())
    reach = torch.where(y + y_want > 0, reach, 0.0) if weight is not None else torch.zeros_like(reach)
    reach = (reach.amax(dim, keepdim=True) if x.dim() else reach).expand(x.shape)
    tolerance = 64 * eps * (total + reach)
    rounded = 1e-6 * total + (stored * total if stored > eps else 0.0) + x.numel() * smallest_subnormal(x.dtype)
    assert ((rows(y) - total).abs() <= rounded)[whole].all()
    agree(got[0][whole], want[0][whole], tolerance[whole], "projection")
    supports = rows(((y > 0) != (y_want > 0)).double()) == 0
    g = (grad_y.double().abs().amax(dim, keepdim=True) if x.dim() else grad_y.double().abs()).expand(x.shape)
    agree(got[1][whole & supports], want[1][whole & supports], (32 * eps * g)[whole & supports], "projection, backward")
