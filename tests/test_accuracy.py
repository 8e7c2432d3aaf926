"""Values, first and second derivatives and log-determinants against mpmath, through the public functions.

Bounds are taken as the compute dtype holds them: float32(-1e-3) is a bound in its own right, not an error of the map.
What is claimed, for |raw| <= 80, "as far as the dtype can hold it" meaning up to one smallest subnormal number times
the width of the interval:

=================================  =====================================  =======================================
quantity                           float32                                float64
=================================  =====================================  =======================================
x                                  2 ulp of the larger of |x| and the     1e-14 of the same
                                   distance to the nearer bound
first derivatives of x             1e-6 relative                          1e-14 relative
second derivatives of x            1e-5 relative                          1e-14 relative
log_det                            1e-6 absolute plus relative            1e-14 absolute plus relative
first, second derivatives of it    1e-6, 1e-5 relative                    1e-14 relative
=================================  =====================================  =======================================

16-bit results are those of float32, rounded: x within 1 ulp of the same larger number (strictness may move it to the
neighbour of a bound), derivatives and log_det within 0.51.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import oracle
import pytest
import torch
from conftest import DEVICE
from oracle import INF, assert_within, smallest_subnormal, ulp
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co

DEVICES = list(dict.fromkeys(["cpu", DEVICE]))
EXACT = [torch.float32, torch.float64]
LOW = [torch.float16, torch.bfloat16]
FIRST = {torch.float32: 1e-6, torch.float64: 1e-14}
SECOND = {torch.float32: 1e-5, torch.float64: 1e-14}

BOUNDS = [
    (0.0, 1.0),
    (-1e-3, 1e-3),
    (100.0, 101.0),
    (-1e6, 1e6),
    (0.0, INF),
    (100.0, INF),
    (-1e-3, INF),
    (-INF, 0.0),
    (-INF, 100.0),
    (-INF, 1e-3),
    (-INF, INF),
]
LOWER = [0.0, 100.0, -1e-3]


@functools.cache
def grid(dtype: torch.dtype) -> Tensor:
    """|raw| <= 80: dense, random, powers of ten down to nothing, and k ln 2 / 2, where exp changes its reduction."""
    generator = torch.Generator().manual_seed(0)
    tiny = 10.0 ** -torch.arange(0, 45, dtype=torch.float64)
    breaks = torch.arange(-230, 231, dtype=torch.float64) * (math.log(2) / 2)
    raw = torch.cat(
        [
            torch.linspace(-80, 80, 321, dtype=torch.float64),
            torch.linspace(-18, 18, 217, dtype=torch.float64),
            (torch.rand(300, generator=generator, dtype=torch.float64) - 0.5) * 160,
            torch.randn(300, generator=generator, dtype=torch.float64),
            tiny,
            -tiny,
            torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=torch.float64),
            breaks,
        ]
    ).to(dtype)
    ends = torch.tensor([0.0, 80.0], dtype=dtype)
    inward = torch.tensor([1.0, 0.0], dtype=dtype)
    steps = torch.nextafter(ends, inward)
    return torch.cat([raw, torch.nextafter(breaks.to(dtype), torch.full((), INF, dtype=dtype)), steps, -steps]).unique()


class Results(NamedTuple):
    """Everything that autograd gives for one elementwise call; the two derivatives of x and log_det in raw."""

    x: Tensor
    x_raw: Tensor
    x_raw_raw: Tensor
    log_det: Tensor
    log_det_raw: Tensor
    log_det_raw_raw: Tensor


def derivatives(y: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    (first,) = grad(y.sum(), raw, create_graph=True)
    (second,) = grad(first.sum(), raw, retain_graph=True)
    return first.detach(), second


@functools.cache
def bounded(dtype: torch.dtype, lower: float, upper: float, device: str) -> Results:
    raw = grid(dtype).to(device).requires_grad_()
    x, log_det = co.bounded(raw, lower, upper, return_log_det=True)
    assert torch.equal(co.bounded(raw, lower, upper), x)
    return Results(x.detach(), *derivatives(x, raw), log_det.detach(), *derivatives(log_det, raw))


@functools.cache
def exponential(dtype: torch.dtype, lower: float, device: str) -> Results:
    raw = grid(dtype).to(device).requires_grad_()
    x, log_det = co.positive(raw, lower, kind="exp", return_log_det=True)
    assert torch.equal(co.positive(raw, lower, kind="exp"), x)
    return Results(x.detach(), *derivatives(x, raw), log_det.detach(), *derivatives(log_det, raw))


def held(bound: float, dtype: torch.dtype) -> float:
    """A bound as the compute dtype holds it."""
    return torch.tensor(bound, dtype=torch.float64 if dtype == torch.float64 else torch.float32).item()


@functools.cache
def bounded_truth(dtype: torch.dtype, lower: float, upper: float) -> oracle.Truth:
    return oracle.bounded(grid(dtype), held(lower, dtype), held(upper, dtype))


@functools.cache
def exponential_truth(dtype: torch.dtype, lower: float) -> oracle.Truth:
    return oracle.exponential(grid(dtype), held(lower, dtype))


def floor(dtype: torch.dtype, lower: float, upper: float) -> float:
    """What is lost where a factor is subnormal: one unit of it times the width of the interval."""
    return smallest_subnormal(dtype) * (max(1.0, upper - lower) if math.isfinite(upper - lower) else 1.0)


def value_tolerance(truth: oracle.Truth, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return 1e-14 * truth.scale() + smallest_subnormal(dtype)
    return 2 * ulp(truth.scale(), dtype)


def relative(want: Tensor, tolerance: float, least: float) -> Tensor:
    return want.abs() * tolerance + least


def log_det_tolerance(want: Tensor, tolerance: float) -> Tensor:
    return tolerance + tolerance * want.abs()


# --- Bounds that are floats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("lower", "upper"), BOUNDS)
class TestBounded:
    def test_value(self, lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
        truth = bounded_truth(dtype, lower, upper)
        got = bounded(dtype, lower, upper, device).x
        assert_within(got, truth.x, value_tolerance(truth, dtype), grid(dtype))

    def test_first_derivative(self, lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
        want, got = bounded_truth(dtype, lower, upper).x_raw, bounded(dtype, lower, upper, device).x_raw
        assert_within(got, want, relative(want, FIRST[dtype], floor(dtype, lower, upper)), grid(dtype))

    def test_second_derivative(self, lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
        want, got = bounded_truth(dtype, lower, upper).x_raw_raw, bounded(dtype, lower, upper, device).x_raw_raw
        assert_within(got, want, relative(want, SECOND[dtype], floor(dtype, lower, upper)), grid(dtype))

    def test_log_det(self, lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
        want, got = bounded_truth(dtype, lower, upper).log_det, bounded(dtype, lower, upper, device).log_det
        assert_within(got, want, log_det_tolerance(want, FIRST[dtype]), grid(dtype))

    def test_derivatives_of_log_det(self, lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
        truth, got = bounded_truth(dtype, lower, upper), bounded(dtype, lower, upper, device)
        least = smallest_subnormal(dtype)
        tolerance = relative(truth.log_det_raw, FIRST[dtype], least)
        assert_within(got.log_det_raw, truth.log_det_raw, tolerance, grid(dtype))
        tolerance = relative(truth.log_det_raw_raw, SECOND[dtype], least)
        assert_within(got.log_det_raw_raw, truth.log_det_raw_raw, tolerance, grid(dtype))

    def test_second_backward_to_incoming_gradients(
        self, lower: float, upper: float, dtype: torch.dtype, device: str
    ) -> None:
        truth, raw = bounded_truth(dtype, lower, upper), grid(dtype).to(device).requires_grad_()
        g, h = torch.ones_like(raw, requires_grad=True), torch.ones_like(raw, requires_grad=True)
        (grad_raw,) = grad(co.bounded(raw, lower, upper, return_log_det=True), raw, (g, h), create_graph=True)
        for_g, for_h = grad(2 * grad_raw.sum(), (g, h))
        assert_within(
            for_g, 2 * truth.x_raw, relative(2 * truth.x_raw, FIRST[dtype], 2 * floor(dtype, lower, upper)), grid(dtype)
        )
        tolerance = relative(2 * truth.log_det_raw, FIRST[dtype], 2 * smallest_subnormal(dtype))
        assert_within(for_h, 2 * truth.log_det_raw, tolerance, grid(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    ("lower", "upper", "per_element"),
    [(*bounds, False) for bounds in BOUNDS if bounds != (-INF, INF)] + [(*bounds, True) for bounds in BOUNDS],
)
def test_a_step_on_raw(lower: float, upper: float, per_element: bool, dtype: torch.dtype, device: str) -> None:
    """The optimizer has exponentials of its own: with lr = 0 a step is the transform, with beta1 = 0 the first moment
    its derivative."""
    raw, truth = grid(dtype), bounded_truth(dtype, lower, upper)
    x = torch.nn.Parameter(co.bounded(raw.to(device), lower, upper))
    bounds = [torch.full_like(x, b) if per_element else b for b in (lower, upper)]
    optimizer = co.optim.ReparametrizedAdam([x], lr=0.0, betas=(0.0, 0.9), constraint=co.Bounded(*bounds))
    x.grad = torch.ones_like(x)
    optimizer.step()
    optimizer.state[x]["raw"].copy_(raw)
    optimizer.state[x]["exp_avg"].zero_()
    optimizer.step()
    assert_within(x, truth.x, value_tolerance(truth, dtype), raw)
    want, got = truth.x_raw, optimizer.state[x]["exp_avg"]
    assert_within(got, want, relative(want, FIRST[dtype], floor(dtype, lower, upper)), raw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("lower", LOWER)
def test_exponential(lower: float, dtype: torch.dtype, device: str) -> None:
    truth, got, raw = exponential_truth(dtype, lower), exponential(dtype, lower, device), grid(dtype)
    least = smallest_subnormal(dtype)
    assert_within(got.x, truth.x, value_tolerance(truth, dtype), raw)
    assert_within(got.x_raw, truth.x_raw, relative(truth.x_raw, FIRST[dtype], least), raw)
    assert_within(got.x_raw_raw, truth.x_raw_raw, relative(truth.x_raw_raw, SECOND[dtype], least), raw)
    assert torch.equal(got.log_det.cpu(), raw)
    assert torch.equal(got.log_det_raw.cpu(), torch.ones_like(raw))
    assert torch.equal(got.log_det_raw_raw.cpu(), torch.zeros_like(raw))


@pytest.mark.parametrize("lower", LOWER)
def test_softplus_kind_of_positive_is_bounded_below(lower: float) -> None:
    raw = grid(torch.float32)
    for got, want in zip(
        co.positive(raw, lower, return_log_det=True), co.bounded(raw, lower, INF, return_log_det=True), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("lower", "upper"), [bounds for bounds in BOUNDS if bounds != (-1e6, 1e6)])
def test_16_bit_results_are_those_of_float32_rounded(
    lower: float, upper: float, dtype: torch.dtype, device: str
) -> None:
    truth, got, raw = bounded_truth(dtype, lower, upper), bounded(dtype, lower, upper, device), grid(dtype)
    assert_within(got.x, truth.x, ulp(truth.scale(), dtype), raw)
    for field in Results._fields[1:]:
        want = getattr(truth, field)
        assert_within(getattr(got, field), want, 0.51 * ulp(want, dtype) + 2e-6 * (field == "log_det"), raw)


# --- Bounds that are tensors ------------------------------------------------------------------------------------------


class TensorCase(NamedTuple):
    raw: Tensor
    lower: Tensor
    upper: Tensor


@functools.cache
def tensor_case(dtype: torch.dtype) -> TensorCase:
    """Every kind of bounds beside every other in one tensor."""
    raw = grid(dtype)[::6]
    bounds = torch.tensor(BOUNDS, dtype=dtype).T
    raw, lower, upper = torch.broadcast_tensors(raw[:, None], *bounds[:, None, :])
    return TensorCase(raw.clone(), lower.clone(), upper.clone())


@functools.cache
def tensor_truth(dtype: torch.dtype) -> oracle.Truth:
    return oracle.bounded(*tensor_case(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
class TestTensorBounds:
    def test_value_and_log_det(self, dtype: torch.dtype, device: str) -> None:
        case, truth = tensor_case(dtype), tensor_truth(dtype)
        x, log_det = co.bounded(*(t.to(device) for t in case), return_log_det=True)
        assert_within(x, truth.x, value_tolerance(truth, dtype), case.raw)
        assert_within(log_det, truth.log_det, log_det_tolerance(truth.log_det, FIRST[dtype]), case.raw)

    def test_derivatives_of_the_value(self, dtype: torch.dtype, device: str) -> None:
        case, truth = tensor_case(dtype), tensor_truth(dtype)
        inputs = [t.to(device).requires_grad_() for t in case]
        first = grad(co.bounded(*inputs).sum(), inputs, create_graph=True)
        width = (case.upper - case.lower).double().nan_to_num(posinf=1.0).clamp(min=1.0)
        least = smallest_subnormal(dtype) * width
        for got, want in zip(first, (truth.x_raw, truth.x_lower, truth.x_upper), strict=True):
            assert_within(got, want, want.abs() * FIRST[dtype] + least, case.raw)
        (x_raw_raw, *by_bounds) = grad(first[0].sum(), inputs, retain_graph=True)
        (from_lower,) = grad(first[1].sum(), inputs[:1], retain_graph=True)
        (from_upper,) = grad(first[2].sum(), inputs[:1])
        want = truth.x_raw_raw
        assert_within(x_raw_raw, want, want.abs() * SECOND[dtype] + least, case.raw)
        for want, both in (
            (truth.x_raw_lower, (by_bounds[0], from_lower)),
            (truth.x_raw_upper, (by_bounds[1], from_upper)),
        ):
            for got in both:
                assert_within(got, want, relative(want, SECOND[dtype], smallest_subnormal(dtype)), case.raw)

    def test_derivatives_of_log_det(self, dtype: torch.dtype, device: str) -> None:
        case, truth = tensor_case(dtype), tensor_truth(dtype)
        inputs = [t.to(device).requires_grad_() for t in case]
        first = grad(co.bounded(*inputs, return_log_det=True)[1].sum(), inputs, create_graph=True)
        least = smallest_subnormal(dtype)
        wanted = truth.log_det_raw, -truth.log_det_width, truth.log_det_width
        for got, want in zip(first, wanted, strict=True):
            assert_within(got, want, relative(want, FIRST[dtype], least), case.raw)
        # Along (1, 2, 5), so that no two terms can stand in for one another: 5 - 2 of the width, twice.
        second = grad(sum(k * t.sum() for k, t in zip((1, 2, 5), first, strict=True)), inputs)
        wanted = truth.log_det_raw_raw, -3 * truth.log_det_width_width, 3 * truth.log_det_width_width
        for got, want in zip(second, wanted, strict=True):
            assert_within(got, want, relative(want, SECOND[dtype], least), case.raw)

    def test_second_backward_to_incoming_gradients(self, dtype: torch.dtype, device: str) -> None:
        case, truth = tensor_case(dtype), tensor_truth(dtype)
        inputs = [t.to(device).requires_grad_() for t in case]
        g, h = (torch.ones_like(inputs[0], requires_grad=True) for _ in range(2))
        first = grad(co.bounded(*inputs, return_log_det=True), inputs, (g, h), create_graph=True)
        got = grad(sum(k * t.sum() for k, t in zip((2, 3, 7), first, strict=True)), (g, h))
        wanted = (
            (2 * truth.x_raw, 3 * truth.x_lower, 7 * truth.x_upper),
            (2 * truth.log_det_raw, -3 * truth.log_det_width, 7 * truth.log_det_width),
        )
        for result, terms in zip(got, wanted, strict=True):
            tolerance = FIRST[dtype] * sum(term.abs() for term in terms) + 8 * smallest_subnormal(dtype)
            assert_within(result, sum(terms), tolerance, case.raw)

    def test_exponential(self, dtype: torch.dtype, device: str) -> None:
        raw, lower = torch.broadcast_tensors(grid(dtype)[::3, None], torch.tensor(LOWER, dtype=dtype))
        truth = oracle.exponential(raw, lower)
        inputs = [raw.to(device, copy=True).requires_grad_(), lower.to(device, copy=True).requires_grad_()]
        x, log_det = co.positive(*inputs, kind="exp", return_log_det=True)
        assert_within(x, truth.x, value_tolerance(truth, dtype), raw)
        assert torch.equal(log_det.cpu(), raw)
        first = grad(x.sum(), inputs, create_graph=True)
        assert_within(first[0], truth.x_raw, relative(truth.x_raw, FIRST[dtype], 0), raw)
        assert torch.equal(first[1].cpu(), torch.ones_like(raw))
        second = grad(first[0].sum() + first[1].sum(), inputs)
        assert_within(second[0], truth.x_raw_raw, relative(truth.x_raw_raw, SECOND[dtype], 0), raw)
        assert torch.equal(second[1].cpu(), torch.zeros_like(raw))


# --- Saturation -------------------------------------------------------------------------------------------------------

SATURATED = torch.tensor([s * r for r in (20.0, 100.0, 1e4, INF) for s in (1, -1)], dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT + LOW, ids=str)
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-3.0, 2.0), (0.0, INF), (-INF, 0.0), (-INF, INF)])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["floats", "tensors"])
def test_derivatives_are_right_where_the_value_saturates(
    lower: float, upper: float, as_tensors: bool, dtype: torch.dtype, device: str
) -> None:
    raw = SATURATED.to(dtype).to(device).requires_grad_()
    bounds = [torch.tensor(b, dtype=dtype, device=device) if as_tensors else b for b in (lower, upper)]
    truth = oracle.bounded(raw.detach().cpu(), lower, upper)
    x, log_det = co.bounded(raw, *bounds, return_log_det=True)
    assert x.isfinite().all()
    least, rounding = 4 * floor(dtype, lower, upper), max(1e-6, torch.finfo(dtype).eps)
    for y, wanted in ((x, (truth.x_raw, truth.x_raw_raw)), (log_det, (truth.log_det_raw, truth.log_det_raw_raw))):
        for got, want in zip(derivatives(y, raw), wanted, strict=True):
            assert got.isfinite().all()
            assert_within(got, want, relative(want, rounding, least), SATURATED)
    assert_within(log_det, truth.log_det.to(dtype).double(), relative(truth.log_det, rounding, 0), SATURATED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT + LOW, ids=str)
def test_exponential_far_out(dtype: torch.dtype, device: str) -> None:
    raw = SATURATED.to(dtype).to(device).requires_grad_()
    x = co.positive(raw, kind="exp")
    assert x.isfinite().all()
    truth = oracle.exponential(raw.detach().cpu(), 0.0)
    for got, want in zip(derivatives(x, raw), (truth.x_raw, truth.x_raw_raw), strict=True):
        in_dtype = want.to(torch.float32 if dtype in LOW else dtype).to(dtype).double()  # overflow is the right answer
        tolerance = relative(want.nan_to_num(posinf=0.0), max(1e-6, torch.finfo(dtype).eps), smallest_subnormal(dtype))
        assert_within(got, in_dtype, tolerance, SATURATED)


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-2.0, 5.0)])
def test_autograd_of_the_sigmoid_is_wrong_where_this_is_right(lower: float, upper: float) -> None:
    raw = torch.linspace(16, 17, 101, requires_grad=True)
    want = oracle.bounded(raw.detach(), lower, upper).x_raw
    (eager,) = grad((lower + (upper - lower) * torch.sigmoid(raw)).sum(), raw)
    (ours,) = grad(co.bounded(raw, lower, upper).sum(), raw)
    assert ((eager / want - 1).abs() > 0.1).float().mean() > 0.5
    assert ((ours / want - 1).abs() < 1e-6).all()


# --- Simplex ----------------------------------------------------------------------------------------------------------


def row(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A row of logits, a gradient of it and a direction, the latter two with a large part in common."""
    generator = torch.Generator().manual_seed(7)
    raw = {
        "one": torch.tensor([3.0]),
        "even": torch.full((5,), -2.5),
        "random": torch.randn(33, generator=generator),
        "wide": torch.randn(100, generator=generator) * 10,
        "gap 15": torch.tensor([-15.0, 0.0]),
        "gap 15, many": torch.cat([torch.randn(16, generator=generator) - 15, torch.tensor([0.0])]),
        "gap 40": torch.tensor([40.0, 0.0, -0.5, 1.0]),
        "gap 80": torch.tensor([-40.0, 40.0, 39.0]),
        "far from 0": torch.randn(9, generator=generator) + 300,
    }[kind].to(dtype)
    g, along = torch.randn(2, len(raw), generator=generator).to(dtype)
    return raw, g + 3, along - 2


ROWS = ["one", "even", "random", "wide", "gap 15", "gap 15, many", "gap 40", "gap 80", "far from 0"]


def simplex_relative(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """raw_i - max is itself rounded, by half a unit of the gap, which is the relative error of its exponential."""
    gap = (raw - raw.max()).abs().double()
    return torch.finfo(dtype).eps * (8 + gap / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("dim", [1, 0], ids=["along rows", "along columns"])
@pytest.mark.parametrize("kind", ROWS)
def test_simplex(kind: str, dim: int, dtype: torch.dtype, device: str) -> None:
    raw, g, along = row(kind, dtype)
    truth, rounding = oracle.simplex(raw, g, along), simplex_relative(raw, dtype)

    def batch(t: Tensor) -> Tensor:  # the row among others, as both loops of the CPU library meet it
        rows = torch.stack([t.flip(0), t, -t])
        return (rows if dim == 1 else rows.T.contiguous()).to(device)

    def middle(t: Tensor) -> Tensor:
        return t.select(1 - dim, 1)

    raw_batch, g_batch = batch(raw).requires_grad_(), batch(g).requires_grad_()
    x = co.simplex(raw_batch, dim)
    (grad_raw,) = grad(x, raw_batch, g_batch, create_graph=True)
    for_raw, for_grad = grad(grad_raw, (raw_batch, g_batch), batch(along))
    shared = rounding.max()  # the errors of all weights enter every mean
    assert_within(middle(x), truth.x, truth.x * rounding, raw)
    assert_within(middle(grad_raw), truth.grad_raw, truth.grad_raw_scale * shared, raw)
    assert_within(middle(for_grad), truth.for_grad, truth.for_grad_scale * shared, raw)
    assert_within(middle(for_raw), truth.for_raw, truth.for_raw_scale * shared, raw)


@pytest.mark.parametrize("gap", [15.0, 40.0])
def test_simplex_backward_keeps_the_digits_that_the_plain_formula_loses(gap: float) -> None:
    raw = torch.tensor([0.0, -gap], requires_grad=True)
    g = torch.tensor([1.7, 0.3])
    want = oracle.simplex(raw.detach(), g, g).grad_raw
    (eager,) = grad(torch.softmax(raw, 0), raw, g)
    (ours,) = grad(co.simplex(raw), raw, g)
    assert ((eager / want - 1).abs() > 0.1).any()
    assert ((ours / want - 1).abs() < 3e-6).all()
