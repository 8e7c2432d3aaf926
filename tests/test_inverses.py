"""Inverses give raw back, and x; on a bound they are finite, outside NaN."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import INF, held, ulp
from torch import Tensor

import constrained_ops as co

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN = math.nan
INVERTIBLE = [
    (0.0, 1.0),
    (-1e-3, 1e-3),
    (100.0, 101.0),
    (-2.0, 7.0),
    (-1e6, 1e6),
    (0.0, INF),
    (100.0, INF),
    (-INF, 0.0),
    (-INF, INF),
]


def for_dtype(lower: float, upper: float, dtype: torch.dtype) -> tuple[float, float]:
    """The bounds, where a 16-bit dtype has too few digits beside 100 and float16 no 1e6: others of their kind."""
    if dtype not in (torch.float16, torch.bfloat16):
        return lower, upper
    return {(100.0, 101.0): (1.0, 5.0), (100.0, INF): (3.0, INF), (-1e6, 1e6): (-1e4, 1e4)}.get(
        (lower, upper), (lower, upper)
    )


def round_trip_tolerance(raw: Tensor, truth: oracle.Truth, dtype: torch.dtype) -> Tensor:
    """x is held to 2 ulp of its scale, and read to as much again; by dx/draw an error of raw, itself rounded."""
    return 4 * ulp(truth.scale(), dtype) / truth.x_raw + 4 * ulp(raw, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), INVERTIBLE)
def test_inverse_of_bounded_gives_raw_back(lower: float, upper: float, dtype: torch.dtype) -> None:
    raw = torch.linspace(-30, 30, 241, dtype=torch.float64).to(dtype)
    lower, upper = for_dtype(lower, upper, dtype)
    truth = oracle.bounded(raw, held(lower, dtype), held(upper, dtype))
    back = co.bounded_inverse(co.bounded(raw, lower, upper), lower, upper)
    assert back.dtype == dtype
    assert back.isfinite().all()
    # Where x is only a few units away from a bound, a linear estimate of the error says nothing.
    tolerance = round_trip_tolerance(raw, truth, dtype)
    readable = 4 * ulp(truth.scale(), dtype) < 0.25 * truth.distance
    assert readable.sum() > 20
    oracle.assert_within(back[readable], raw[readable].double(), tolerance[readable], raw[readable])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), INVERTIBLE)
def test_bounded_of_its_inverse_gives_x_back(lower: float, upper: float, dtype: torch.dtype) -> None:
    lower, upper = for_dtype(lower, upper, dtype)
    low = lower if lower > -INF else min(upper, 20.0) - 50
    high = upper if upper < INF else low + 50
    x = torch.linspace(low, high, 303, dtype=torch.float64)[1:-1].to(dtype)
    x = x[(x.double() > held(lower, dtype)) & (x.double() < held(upper, dtype))]
    raw = co.bounded_inverse(x, lower, upper)
    truth = oracle.bounded(raw, held(lower, dtype), held(upper, dtype))
    # raw is rounded to dtype, which moves x by its derivative.
    tolerance = 4 * ulp(truth.scale(), dtype) + ulp(raw, dtype) * truth.x_raw
    oracle.assert_within(co.bounded(raw, lower, upper), x.double(), tolerance, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lower", [0.0, 3.0, -1e-3])
def test_inverse_of_the_exponential_gives_raw_back(lower: float, dtype: torch.dtype) -> None:
    raw = torch.linspace(-10, 10, 201, dtype=torch.float64).to(dtype)
    truth = oracle.exponential(raw, held(lower, dtype))
    back = co.positive_inverse(co.positive(raw, lower, kind="exp"), lower, kind="exp")
    readable = 4 * ulp(truth.scale(), dtype) < 0.25 * truth.distance
    assert readable.sum() > 20
    tolerance = round_trip_tolerance(raw, truth, dtype)
    oracle.assert_within(back[readable], raw[readable].double(), tolerance[readable], raw[readable])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lower", "upper"), [(0.0, 1.0), (-3.0, 2.0), (100.0, 104.0), (-1.0, 0.0), (2.0, INF), (-INF, -2.0)]
)
def test_inverse_of_a_value_on_a_bound_is_finite_and_maps_back_inside(
    lower: float, upper: float, dtype: torch.dtype
) -> None:
    bounds = torch.tensor([b for b in (lower, upper) if math.isfinite(b)], dtype=dtype)
    near = torch.cat([bounds, *(bounds.nextafter(torch.full_like(bounds, end)) for end in (-INF, INF))])
    raw = co.bounded_inverse(near, lower, upper)
    assert raw.isfinite().all()
    x = co.bounded(raw, lower, upper).double()
    assert ((x > lower) & (x < upper)).all()
    assert ((x - near.double()).abs() <= 4 * ulp(bounds.abs().max(), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), [(0.1, 0.3), (-0.7, -1 / 3), (99.9, 107.0)])
def test_inverse_of_a_bound_that_is_rounded_is_finite_and_maps_back_inside(
    lower: float, upper: float, dtype: torch.dtype
) -> None:
    raw = co.bounded_inverse(torch.tensor([lower, upper], dtype=dtype), lower, upper)
    assert raw.isfinite().all()
    x = co.bounded(raw, lower, upper).double()
    assert ((x > lower) & (x < upper)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["softplus", "exp"])
def test_inverse_of_an_infinite_value_is_finite(kind: str, dtype: torch.dtype) -> None:
    x = torch.tensor([INF], dtype=dtype)
    raw = co.positive_inverse(x, kind=kind)
    assert raw.isfinite().all()
    assert co.positive(raw, kind=kind).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), [(-INF, 1.0), (-1.0, INF), (-INF, INF)])
def test_inverse_of_a_value_on_an_infinite_bound_is_finite(lower: float, upper: float, dtype: torch.dtype) -> None:
    x = torch.tensor([v for v in (lower, upper) if math.isinf(v)], dtype=dtype)
    bounds = [b if math.isinf(b) else b * torch.finfo(dtype).max / 2 for b in (lower, upper)]
    for low, high in ((lower, upper), bounds):
        raw = co.bounded_inverse(x, low, high)
        assert raw.isfinite().all()
        assert co.bounded(raw, low, high).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-3.0, 2.0), (100.0, 104.0), (2.0, INF), (-INF, -2.0)])
def test_inverse_of_a_value_outside_is_nan(lower: float, upper: float, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    reach = 4 * eps * max(abs(b) for b in (lower, upper) if math.isfinite(b))
    outside = [lower - reach, lower - 10, upper + reach, upper + 10]
    x = torch.tensor([v for v in outside if math.isfinite(v)], dtype=dtype)
    assert co.bounded_inverse(x, lower, upper).isnan().all()
    if upper == INF:
        assert co.positive_inverse(x, lower, kind="exp").isnan().all()


def test_inverse_with_tensor_bounds_is_that_of_each_element() -> None:
    lower, upper = torch.tensor([0.0, -3.0, 2.0, -INF, -INF]), torch.tensor([1.0, 2.0, INF, -2.0, INF])
    x = torch.tensor([0.25, 1.5, 7.0, -2.5, 3.0])
    each = [co.bounded_inverse(x[i : i + 1], lower[i].item(), upper[i].item()) for i in range(5)]
    assert torch.equal(co.bounded_inverse(x, lower, upper), torch.cat(each))


def test_inverses_are_differentiable_twice() -> None:
    x = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    lower = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    upper = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (co.bounded_inverse, (x, lower, upper)),
        (lambda v: co.bounded_inverse(v, -1.0, INF), (x,)),
        (lambda v: co.bounded_inverse(v, -INF, 2.0), (x,)),
        (lambda v: co.positive_inverse(v, -1.0, kind="exp"), (x,)),
        (co.simplex_inverse, (x,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
