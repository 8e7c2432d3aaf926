"""What holds whatever the numbers: strictly inside, monotone, rows that sum to 1."""

from __future__ import annotations

import functools
import math

import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracle import INF, held, next_above, next_below, smallest_subnormal, ulp
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co
from constrained_ops._library import compute_dtype

DEVICES = list(dict.fromkeys(["cpu", DEVICE]))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {
    torch.float16: (10, torch.int16),
    torch.bfloat16: (7, torch.int16),
    torch.float32: (23, torch.int32),
    torch.float64: (52, torch.int64),
}
NAN = math.nan

settings.register_profile("constrained_ops", derandomize=True, database=None, deadline=None, max_examples=150)
settings.load_profile("constrained_ops")


# --- Strictly inside --------------------------------------------------------------------------------------------------

REGIMES = ["tiny", "huge", "any bits", "one number in between", "ordinary", "infinite"]
PAIRS = 175_000  # per regime: a million per dtype, and some more


def random_numbers(n: int, dtype: torch.dtype, exponents: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Numbers of ``dtype`` with uniformly random mantissa, sign, and biased exponent in a range; 0 is subnormal."""
    mantissa_bits, integer = BITS[dtype]
    exponent = torch.randint(exponents[0], exponents[1], (n,), generator=generator)
    mantissa = torch.randint(0, 1 << mantissa_bits, (n,), generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return ((exponent << mantissa_bits) | mantissa).to(integer).view(dtype) * sign.to(dtype)


def random_bounds(regime: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs in the compute dtype with at least one number of ``dtype`` strictly between, by construction."""
    generator = torch.Generator().manual_seed(REGIMES.index(regime))
    compute = compute_dtype(dtype)
    top = (1 << torch.finfo(dtype).bits - 1 - BITS[dtype][0]) - 1  # the exponent of infinity
    one = top // 2
    exponents = {"tiny": (0, 3), "huge": (top - 4, top - 2), "ordinary": (one - 4, one + 4)}.get(regime, (0, top - 2))
    n = PAIRS + PAIRS // 5
    if regime == "one number in between":
        inside = random_numbers(n, dtype, exponents, generator)
        below, above = (inside.nextafter(torch.full_like(inside, end)) for end in (-INF, INF))
    else:
        three = torch.stack([random_numbers(n, dtype, exponents, generator) for _ in range(3)])
        below, inside, above = three.sort(0)[0]
    distinct = (below < inside) & (inside < above)
    below, inside, above = (t[distinct][:PAIRS].to(compute) for t in (below, inside, above))
    assert len(inside) == PAIRS
    # Bounds that a 16-bit dtype cannot hold, as the compute dtype of tensor bounds allows.
    moved = [end + (inside - end) * torch.rand(PAIRS, generator=generator, dtype=compute) for end in (below, above)]
    lower = torch.where(moved[0] < inside, moved[0], below)
    upper = torch.where(moved[1] > inside, moved[1], above)
    if regime == "infinite":
        which = torch.randint(0, 3, (PAIRS,), generator=generator)  # no lower bound, no upper bound, neither
        lower, upper = torch.where(which != 1, -INF, lower), torch.where(which != 0, INF, upper)
    return lower, upper


def random_raw(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    fixed = torch.tensor([s * r for r in (0.0, 20.0, 100.0, 1e4, INF) for s in (1, -1)], dtype=torch.float64)
    raw = torch.randn(1, PAIRS, generator=generator, dtype=torch.float64) * 5
    return torch.cat([raw, fixed[:, None].expand(-1, PAIRS)]).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_on_or_beyond_a_tensor_bound(dtype: torch.dtype, regime: str, device: str) -> None:
    lower, upper = (bound.to(device) for bound in random_bounds(regime, dtype))
    low, high = lower.double(), upper.double()
    for raw in random_raw(dtype).to(device):
        x = co.bounded(raw, lower, upper).double()
        wrong = ~((low < x) & (x < high))
        assert not wrong.any(), f"{int(wrong.sum())}, first {raw[wrong][0]}, {low[wrong][0]}, {high[wrong][0]}"
        x = co.positive(raw, lower.clamp(min=-1e30), kind="exp").double()
        assert (low.clamp(min=-1e30) < x).all()
        assert x.isfinite().all()


UNREPRESENTABLE = [
    (0.1, 0.3),
    (1 / 3, 2 / 3),
    (-0.7, -0.1),
    (0.0, 0.1),
    (-1e-3, 1e-3),
    (99.9, 100.7),
    (1 / 3, INF),
    (-0.1, INF),
    (-INF, 0.7),
    (-INF, -1 / 3),
    (0.2, 0.2 + 1e-2),
    (-1.0, math.nextafter(-1.0, INF) + 2e-2),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), UNREPRESENTABLE)
def test_no_value_on_or_beyond_a_float_bound(lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
    x = co.bounded(random_raw(dtype)[:, :1000].to(device), lower, upper).double()
    assert (x > lower).all()
    assert (x < upper).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_and_alone(dtype: torch.dtype) -> None:
    raw = torch.tensor([0.5, NAN, -0.5] * 11, dtype=dtype, requires_grad=True)
    zero = torch.zeros((), dtype=dtype)
    for x, log_det in (
        co.bounded(raw, 0.0, 1.0, return_log_det=True),
        co.bounded(raw, zero, zero + 1, return_log_det=True),
        co.bounded(raw, -INF, 2.0, return_log_det=True),
        co.positive(raw, return_log_det=True),
        co.positive(raw, kind="exp", return_log_det=True),
    ):
        (grad_raw,) = grad(x.sum(), raw, retain_graph=True)
        assert torch.equal(x.isnan(), raw.isnan())
        assert torch.equal(log_det.isnan(), raw.isnan())
        assert torch.equal(grad_raw.isnan(), raw.isnan())
    for dim in (0, 1):
        rows = torch.ones(9, 9, dtype=dtype)
        rows[4, 4] = NAN
        assert co.simplex(rows, dim).isnan().sum(dim).tolist() == [9 * (i == 4) for i in range(9)]
    assert co.bounded_inverse(raw, -1.0, 1.0).isnan().equal(raw.isnan())
    assert co.positive_inverse(raw, -1.0, kind="exp").isnan().equal(raw.isnan())
    assert co.simplex_inverse(torch.tensor([0.5, NAN], dtype=dtype)).isnan().tolist() == [False, True]


# --- Monotone ---------------------------------------------------------------------------------------------------------

MONOTONE = [(0.0, 1.0), (-1e-3, 1e-3), (100.0, 101.0), (-2.0, 7.0), (0.0, INF), (100.0, INF), (-INF, 0.0), (-INF, INF)]


def every_number(dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype, ascending, infinities included."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[~numbers.isnan()].sort()[0]


@functools.cache
def ascending(dtype: torch.dtype) -> Tensor:
    """Runs of neighbours where formulas change over, and a dense spread of everything else."""
    if dtype in (torch.float16, torch.bfloat16):
        return every_number(dtype)
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(200_000, generator=generator, dtype=torch.float64) * torch.logspace(-6, 2, 200_000)
    centres = [0.0, *(s * k * math.log(2) / 2 for k in (1, 2, 3, 5, 25, 47, 51, 120) for s in (1, -1)), 17.0, -104.0]
    integer = BITS[dtype][1]
    runs = [
        (torch.tensor(abs(c), dtype=dtype).view(integer) + torch.arange(-200, 200)).clamp(min=0).to(integer).view(dtype)
        * (-1 if c < 0 else 1)
        for c in centres
    ]
    return torch.cat([spread.to(dtype), *runs, -runs[0], torch.tensor([INF, -INF, 1e4, -1e4], dtype=dtype)]).sort()[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lower", "upper"), MONOTONE)
def test_bounded_never_falls(lower: float, upper: float, dtype: torch.dtype, device: str) -> None:
    raw = ascending(dtype).to(device)
    x = co.bounded(raw, lower, upper)
    # A half-line's logarithm is rounded, to the two units in the last place that every value is held to.
    slack = 2 * ulp(x, dtype) if INF in (-lower, upper) else torch.zeros_like(x, dtype=torch.float64)
    x = x.double()
    falls = (x[1:] < x[:-1] - slack[1:].to(x.device)).nonzero().reshape(-1)
    assert not len(falls), f"{len(falls)} falls, first from {raw[falls[0]].item()!r}: {x[falls[0]].item()!r}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponential_never_falls(dtype: torch.dtype, device: str) -> None:
    raw = ascending(dtype).to(device)
    x = co.positive(raw, kind="exp").double()
    falls = (x[1:] < x[:-1]).nonzero().reshape(-1)
    assert not len(falls), f"{len(falls)} falls, first from {raw[falls[0]].item()!r}: {x[falls[0]].item()!r}"


# --- Simplex ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000, 5000])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_sum_to_one_and_are_positive(dim: int, length: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(length)
    raw = torch.randn(9, length, generator=generator, dtype=torch.float64)
    raw = raw * torch.tensor([1e-3, 0.1, 1, 3, 10, 30, 100, 1000, 1e4], dtype=torch.float64)[:, None]
    raw = (raw if dim == 1 else raw.T.contiguous()).to(dtype).to(device)
    x = co.simplex(raw, dim)
    assert (x > 0).all()
    assert (x <= 1).all()
    # The error of the sum in the denominator is that of adding up at most 1024 numbers one by one: a random walk. A
    # finite raw that underflows is given the smallest number instead.
    steps = min(length, 1024) if compute_dtype(dtype) == dtype else 0
    tolerance = torch.finfo(dtype).eps * (2 + math.sqrt(steps) / 3) + 2 * length * smallest_subnormal(dtype)
    errors = [abs(math.fsum(row) - 1) for row in (x if dim == 1 else x.T).tolist()]
    assert max(errors) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_an_infinitely_negative_raw_is_a_mask(dim: int, dtype: torch.dtype) -> None:
    raw = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.eye(6, dtype=torch.bool)
    raw = raw.masked_fill(mask, -INF).requires_grad_()
    x = co.simplex(raw, dim)
    assert torch.equal(x == 0, mask)
    (grad_raw,) = grad(x, raw, torch.arange(36.0).reshape(6, 6).to(dtype), create_graph=True)
    assert torch.equal(grad_raw == 0, mask)
    (second,) = grad(grad_raw.square().sum(), raw)
    assert second.isfinite().all()
    assert (second[mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_finite_raw_is_no_mask(dtype: torch.dtype) -> None:
    x = co.simplex(torch.tensor([0.0, torch.finfo(dtype).min, -1e4], dtype=dtype))
    assert x[1] == x[2] == smallest_subnormal(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simplex_of_its_inverse_gives_x_back(dtype: torch.dtype) -> None:
    raw = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    x = co.simplex(raw)
    log_x = co.simplex_inverse(x)
    back = co.simplex(log_x)
    # The logarithm is rounded, and an error of it is a relative error of x; x itself sums to 1 to as much.
    relative = torch.finfo(dtype).eps * (4 + log_x.double().abs())
    oracle.assert_within(back, x.double(), relative * x.double() + smallest_subnormal(dtype), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_of_the_simplex_at_and_beyond_its_edges(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    raw = co.simplex_inverse(torch.tensor([1.0, 0.0, -eps / 2, 1 + eps, -0.0], dtype=dtype))
    assert raw.isfinite().all()
    assert (co.simplex(raw) > 0).all()
    assert co.simplex_inverse(torch.tensor([-4 * eps, 1 + 4 * eps, -1.0, 2.0, INF, -INF], dtype=dtype)).isnan().all()


# --- Hypothesis -------------------------------------------------------------------------------------------------------

any_dtype = st.sampled_from(DTYPES)
any_bound = st.floats(-1e30, 1e30) | st.floats(-2.0, 2.0) | st.sampled_from([INF, -INF, 0.0, 1.0, 100.0, -1e-3])
any_raw = st.floats(-30, 30) | st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, INF, -INF, 100.0, -100.0])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(any_dtype, any_bound, any_bound, st.lists(any_raw, min_size=1, max_size=40))
def test_either_strictly_inside_or_told_that_there_is_no_room(
    dtype: torch.dtype, lower: float, upper: float, raws: list[float]
) -> None:
    assume(lower < upper)
    raw = torch.tensor(raws, dtype=torch.float64).to(dtype)
    compute = compute_dtype(dtype)
    if next_above(held(lower, dtype), dtype) > next_below(held(upper, dtype), dtype):
        with pytest.raises(ValueError, match="no number strictly between"):
            co.bounded(raw, lower, upper)
        return
    if math.isfinite(upper - lower) and upper - lower > torch.finfo(compute).max:
        with pytest.raises(ValueError, match="overflows"):
            co.bounded(raw, lower, upper)
        return
    x = co.bounded(raw, lower, upper).double()
    assert ((x > lower) & (x < upper)).all()


@given(any_dtype, st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), any_raw, any_raw)
@example(torch.float32, 1.0, 4095.443016568799, 0.0, -2.220446049250313e-16)  # where the halves meet
def test_increasing_in_raw(dtype: torch.dtype, lower: float, width: float, a: float, b: float) -> None:
    upper = lower + width
    assume(next_above(held(lower, dtype), dtype) <= next_below(held(upper, dtype), dtype))
    raw = torch.tensor(sorted([a, b]), dtype=torch.float64).to(dtype)
    for bounds in ((lower, upper), (lower, INF), (-INF, upper), (-INF, INF)):
        first, second = co.bounded(raw, *bounds).tolist()
        assert first <= second


@st.composite
def broadcastable(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and two that broadcast to it."""
    shape = draw(shapes)

    def narrowed() -> tuple[int, ...]:
        kept = shape[draw(st.integers(0, len(shape))) :]
        return tuple(size if draw(st.booleans()) else 1 for size in kept)

    return shape, narrowed(), narrowed()


@given(broadcastable(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_tensor_bounds_are_float_bounds_element_by_element(
    shape_of: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw, lower, width = (torch.randn(s, generator=generator, dtype=dtype) * 3 for s in shape_of)
    infinite = torch.randint(0, 4, shape_of[1], generator=generator) == 0
    lower, upper = torch.where(infinite, -INF, lower), width.abs() + 10
    upper = torch.where(torch.randint(0, 4, shape_of[2], generator=generator) == 0, INF, upper)
    x, log_det = co.bounded(raw, lower, upper, return_log_det=True)
    assert x.shape == log_det.shape == raw.shape
    each = zip(*(t.expand(raw.shape).reshape(-1) for t in (raw, lower, upper)), strict=True)
    for got_x, got_log_det, (r, lo, hi) in zip(x.reshape(-1), log_det.reshape(-1), each, strict=True):
        want_x, want_log_det = co.bounded(r, lo.item(), hi.item(), return_log_det=True)
        scale = max(abs(v) for v in (want_x.item(), lo.item(), hi.item()) if math.isfinite(v))
        assert abs(got_x - want_x) <= 4 * torch.finfo(dtype).eps * scale
        assert abs(got_log_det - want_log_det) <= 4 * torch.finfo(dtype).eps * (1 + abs(want_log_det))


rows = st.tuples(shapes.filter(lambda s: len(s) > 0 and 0 not in s), st.integers(0, 3), st.integers(0, 2**31))


@given(rows, any_dtype, st.floats(1e-6, 200.0))
def test_every_row_of_any_shape_is_on_the_simplex(
    row: tuple[tuple[int, ...], int, int], dtype: torch.dtype, scale: float
) -> None:
    shape, dim, seed = row
    dim %= len(shape)
    raw = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    x = co.simplex(raw, dim)
    assert x.shape == raw.shape
    assert x.dtype == dtype
    assert (x > 0).all()
    assert ((x.double().sum(dim) - 1).abs() <= 3 * torch.finfo(dtype).eps).all()
    torch.testing.assert_close(co.simplex(raw, dim - len(shape)), x, rtol=0, atol=0)


@given(rows, st.floats(-50, 50), st.floats(0.1, 20.0))
def test_simplex_ignores_a_shift_and_follows_a_permutation(
    row: tuple[tuple[int, ...], int, int], shift: float, scale: float
) -> None:
    shape, dim, seed = row
    dim %= len(shape)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    order = torch.randperm(shape[dim], generator=generator)
    x = co.simplex(raw, dim)
    torch.testing.assert_close(co.simplex(raw + shift, dim), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        co.simplex(raw.index_select(dim, order), dim), x.index_select(dim, order), rtol=1e-13, atol=0
    )


@given(rows, st.floats(0.1, 40.0), st.floats(-1e3, 1e3))
def test_gradients_through_the_simplex_sum_to_zero_and_ignore_a_shift(
    row: tuple[tuple[int, ...], int, int], scale: float, shift: float
) -> None:
    shape, dim, seed = row
    dim %= len(shape)
    generator = torch.Generator().manual_seed(seed)
    raw = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    g = torch.randint(-64, 64, shape, generator=generator) / 8  # so that adding the shift is exact
    shift = float(round(shift))
    x = co.simplex(raw, dim)
    (grad_raw,) = grad(x, raw, g, retain_graph=True)
    (shifted,) = grad(x, raw, g + shift)
    terms = (x * (g - (x * g).sum(dim, keepdim=True)).abs()).detach().sum(dim) + 1e-30
    assert (grad_raw.sum(dim).abs() <= 1e-5 * terms + 1e-6 * grad_raw.abs().sum(dim)).all()
    assert ((shifted - grad_raw).abs() <= 1e-6 * terms.unsqueeze(dim)).all()
