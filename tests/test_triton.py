"""The Triton kernels to a few units in the last place of each term; in Triton's interpreter where there is no GPU.

test_backends has them beside the other backends, test_triton_compile compiles them for GPUs that are not here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import constrained_ops  # noqa: F401  (defines the operators)
from constrained_ops import _library
from constrained_ops._library import TRANSFORMS, compute_dtype

pytest.importorskip("triton", reason="Triton exists for Linux only")
pytestmark = pytest.mark.usefixtures("triton_interpreter")

from constrained_ops.triton import KERNELS, launch, simplex  # noqa: E402

REFERENCES = _library._references
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF = math.inf


# --- What a result should be -----------------------------------------------------------------------------------------


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def reference(transform: str, kernel: str, *args: Any) -> tuple[Tensor, ...]:
    return as_tuple(REFERENCES[transform][kernel](*(double(arg) for arg in args)))


def check(got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype, ulps: float = 8, tiny: float = 1.0) -> None:
    """``got``, computed for ``dtype``, is ``want`` to ``ulps`` of ``scale`` and what rounding to its own dtype adds.

    ``scale`` is the sum of the terms' magnitudes, ``tiny`` how many of the smallest numbers an underflow may cost.
    """
    compute, stored = torch.finfo(compute_dtype(dtype)), torch.finfo(got.dtype)
    want_stored = want.to(got.dtype)
    same = (got == want_stored) | (got.isnan() & want.isnan())
    subnormal = tiny * compute.smallest_normal * compute.eps + stored.smallest_normal * stored.eps
    rounding = want.abs() * stored.eps / 2 if got.dtype != compute_dtype(dtype) else 0.0
    close = (got.double() - want).abs() <= ulps * compute.eps * scale + rounding + subnormal
    wrong = ~(same | (close & want_stored.isfinite()))
    first = tuple(wrong.nonzero()[0].tolist()) if wrong.any() else ()
    assert not wrong.any(), f"{int(wrong.sum())} wrong; at {first}: got {got[first]!r}, want {want[first]!r}"


def check_layout(results: tuple[Tensor, ...], raw: Tensor, needed: int = -1) -> None:
    for i, result in enumerate(results):
        if needed >> i & 1:
            assert result.shape == raw.shape
            assert result.stride() == torch.empty_like(raw).stride()
        else:
            assert result.shape == (0,)


def one_at_a_time(*operands: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    for i, operand in enumerate(operands):
        if operand is not None:
            yield tuple(operand if j == i else None for j in range(len(operands)))


def sum_of_abs(terms: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([part.abs() for part in parts]).sum(0) for parts in zip(*terms, strict=True))


def check_elementwise(
    transform: str,
    raw: Tensor,
    lower: Any,
    upper: Any,
    grads: tuple[Tensor | None, Tensor | None],
    along: tuple[Tensor | None, ...],
) -> None:
    """All four kernels of one overload against the reference."""
    dtype, suffix = raw.dtype, ".tensor" if isinstance(lower, Tensor) else ""
    kernels, bounds, needed = KERNELS[transform], (lower, upper), (-1,) if suffix else ()

    x, log_det = got = kernels["forward_log_det" + suffix](raw, *bounds)
    check_layout(got, raw)
    assert torch.equal(kernels["forward" + suffix](raw, *bounds).nan_to_num(), x.nan_to_num())
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device=raw.device).expand_as(raw) for bound in bounds)
    assert ((x.double() > low) & (x.double() < high) | raw.isnan()).all()
    smallest, largest = innermost(low, dtype), -innermost(-high, dtype)
    want_x, want_log_det = reference(transform, "forward_log_det" + suffix, raw, *bounds)
    want = torch.where(raw.isnan(), want_x, want_x.clamp(smallest, largest))
    check(x, want, scale_of_x(want_x, low, high), dtype)
    log_width = torch.where((high - low).isfinite(), (high - low).log(), 0.0)
    check(log_det, want_log_det, log_width.abs() + (want_log_det - log_width).abs(), dtype)

    tiny = 64 * max(1.0, float(torch.stack([low, high, high - low]).nan_to_num(posinf=0, neginf=0).abs().max()))
    got = as_tuple(kernels["backward" + suffix](*grads, raw, *bounds, *needed))
    check_layout(got, raw)
    want = reference(transform, "backward" + suffix, *grads, raw, *bounds)
    scale = sum_of_abs([reference(transform, "backward" + suffix, *g, raw, *bounds) for g in one_at_a_time(*grads)])
    for result in zip(got, want, scale, strict=True):
        check(*result, dtype, tiny=tiny)

    along = along if suffix else along[:1]
    got = kernels["double_backward" + suffix](*along, *grads, raw, *bounds, 31 if suffix else 7)
    check_layout(got, raw)
    want = reference(transform, "double_backward" + suffix, *along, *grads, raw, *bounds)
    terms = itertools.product(one_at_a_time(*along), one_at_a_time(*grads))
    scale = sum_of_abs([reference(transform, "double_backward" + suffix, *a, *g, raw, *bounds) for a, g in terms])
    for result in zip(got, want, scale, strict=True):
        check(*result, dtype, tiny=tiny)


def innermost(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of ``dtype`` above ``bound``, found without the bits."""
    info = torch.finfo(dtype)
    number = bound.clamp(-info.max, info.max)
    if dtype == torch.float64:
        return torch.where(bound < number, number, number.nextafter(torch.full_like(number, INF)))
    spacing = (number.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    candidates = torch.stack([(number + k * spacing / 2).to(dtype).double() for k in range(-2, 3)])
    return torch.where(candidates > bound, candidates, INF).amin(0)


def scale_of_x(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x is a bound and a distance from it; from the nearer one if there are two."""
    from_low = torch.where(low.isfinite(), low.abs() + (x - low).abs(), INF)
    from_high = torch.where(high.isfinite(), high.abs() + (high - x).abs(), INF)
    nearer = torch.minimum(from_low, from_high)
    return torch.where(nearer.isfinite(), nearer, x.abs())


SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e-3, -0.5, 1.0, -3.0, 8.0, 16.5, -16.5, 20.0, -40.0, 75.0, 88.5, -88.5, -100.0]
BEYOND = [104.5, -104.5, -300.0, 700.0, -746.0, 1e4, -1e4, INF, -INF, math.nan]


def numbers(dtype: torch.dtype, *shape: int, seed: int = 0, special: list[float] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * (6 if special else 1)
    if special:
        values.view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64)[: values.numel()]
    return values.to(dtype).to(DEVICE)


# --- Elementwise -----------------------------------------------------------------------------------------------------


SCALARS = [(0.0, 1.0), (-1.0, 0.0), (-2.5, 7.25), (100.0, 104.0), (1 / 3, 0.7), (-INF, 0.3), (0.1, INF), (-INF, INF)]


def test_every_operator_has_a_kernel() -> None:
    assert {name: set(kernels) for name, kernels in KERNELS.items()} == {
        name: set(kernels) for name, kernels in TRANSFORMS.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", SCALARS, ids=str)
def test_scalar_bounds(bounds: tuple[float, float], dtype: torch.dtype) -> None:
    raw = numbers(dtype, 200, special=SPECIAL + BEYOND)
    grads = numbers(dtype, 200, seed=1), numbers(dtype, 200, seed=2)
    check_elementwise("bounded", raw, *bounds, grads, (numbers(dtype, 200, seed=3),))


@pytest.mark.parametrize("bounds", [(-1e150, 1e150), (1e-150, 2e-150), (1 / 3, 1 / 3 + 1e-15)], ids=str)
def test_scalar_bounds_that_float32_cannot_hold(bounds: tuple[float, float]) -> None:
    raw = numbers(torch.float64, 50, special=SPECIAL)
    grads = numbers(torch.float64, 50, seed=1), None
    check_elementwise("bounded", raw, *bounds, grads, (numbers(torch.float64, 50, seed=3),))


def test_exp_and_logarithms() -> None:
    """In float32, where next to nothing else rounds: errors relative to the result, in units of its epsilon."""
    raw = torch.cat([torch.linspace(-87, 87, 6000), torch.randn(6000)]).to(DEVICE)
    zero = torch.zeros_like(raw)

    def error(got: Tensor, want: Tensor) -> float:
        return float(((got.double() - want) / want).abs().max()) / torch.finfo(torch.float32).eps

    assert error(KERNELS["exponential"]["forward"](raw, 0.0, INF), raw.double().exp()) < 0.8
    _, log_det = KERNELS["bounded"]["forward_log_det"](raw.abs(), 0.0, INF)
    assert error(log_det, -raw.abs().double().neg().exp().log1p()) < 1.2
    width = raw.abs().clamp(2.0, 80.0).exp()
    _, log_det = KERNELS["bounded"]["forward_log_det.tensor"](zero, zero, width)
    assert error(log_det, width.double().log() - 2 * math.log(2)) < 1.2


def mixed_bounds(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    """Finite, half-infinite and infinite ones, in the compute dtype."""
    compute = compute_dtype(dtype)
    lower = numbers(compute, *shape, seed=4)
    upper = lower + numbers(compute, *shape, seed=5).abs() + 0.1
    lower.view(-1)[::3], upper.view(-1)[::4] = -INF, INF
    return lower, upper


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_bounds(dtype: torch.dtype) -> None:
    raw = numbers(dtype, 300, special=[value for value in SPECIAL + BEYOND for _ in range(6)])
    grads = numbers(dtype, 300, seed=1), numbers(dtype, 300, seed=2)
    along = numbers(dtype, 300, seed=3), *(numbers(compute_dtype(dtype), 300, seed=seed) for seed in (6, 7))
    check_elementwise("bounded", raw, *mixed_bounds(dtype, 300), grads, along)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_above_zero(dtype: torch.dtype) -> None:
    raw = numbers(dtype, 4, special=[-1e4] * 4)
    lower = torch.tensor([0.0, -0.0, -0.0, 0.0], dtype=compute_dtype(dtype), device=DEVICE)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert KERNELS["bounded"]["forward.tensor"](raw, lower, lower + 1).tolist() == [smallest] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lower", [0.0, -0.75, "tensor"])
def test_exponential(lower: Any, dtype: torch.dtype) -> None:
    """Up to where the derivatives overflow, and at -inf."""
    raw = numbers(dtype, 200, special=[value for value in SPECIAL + BEYOND if not 88 < value < INF])
    raw = raw.clamp(max=80.0 if dtype != torch.float16 else 10.0).where(raw < INF, raw)
    grads = numbers(dtype, 200, seed=1), numbers(dtype, 200, seed=2)
    along = numbers(dtype, 200, seed=3), *(numbers(compute_dtype(dtype), 200, seed=seed) for seed in (6, 7))
    upper: Any = INF
    if lower == "tensor":
        lower = numbers(compute_dtype(dtype), 200, seed=4)
        upper = torch.full_like(lower, INF)
    check_elementwise("exponential", raw, lower, upper, grads, along)


@pytest.mark.parametrize("count", [0, 1, 5, 127, 128, 129, 511, 512, 513, 1025])
def test_sizes(count: int) -> None:
    dtype = torch.float32
    raw, (lower, upper) = numbers(dtype, count), mixed_bounds(dtype, count)
    grads, along = (raw.cos(), raw.sin()), (raw + 1, raw - 1, raw * 2)
    if count:
        check_elementwise("bounded", raw, 0.0, 1.0, grads, along)
        check_elementwise("bounded", raw, lower, upper, grads, along)
    else:
        check_layout(KERNELS["bounded"]["double_backward.tensor"](*along, *grads, raw, lower, upper, 31), raw)
        check_layout((KERNELS["bounded"]["forward"](raw, 0.0, 1.0),), raw)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
    "rows": lambda t: t[..., :1].expand_as(t),
    "uniform": lambda t: t.reshape(-1)[-1].expand_as(t),
}


@pytest.mark.parametrize("of_bounds", ["transposed", "expanded", "rows", "uniform"])
@pytest.mark.parametrize("of_raw", LAYOUTS)
def test_layouts(of_raw: str, of_bounds: str) -> None:
    dtype, shape = torch.float32, (4, 3, 6)
    raw, (lower, upper) = LAYOUTS[of_raw](numbers(dtype, *shape)), mixed_bounds(dtype, *shape)
    lower, upper = LAYOUTS[of_bounds](lower), LAYOUTS[of_bounds](upper)
    grads = LAYOUTS["sliced"](numbers(dtype, *shape, seed=1)), LAYOUTS["uniform"](numbers(dtype, *shape, seed=2))
    along = LAYOUTS["reversed"](raw + 1), LAYOUTS[of_raw](raw - 1), LAYOUTS["rows"](raw * 2)
    check_elementwise("bounded", raw, lower, upper, grads, along)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3, 1), (2, 3, 2, 3, 2, 3, 2)], ids=str)
def test_dimensions(shape: tuple[int, ...]) -> None:
    """None, those of size 1, and more than the kernel's loop has."""
    dtype = torch.float64
    raw, (lower, upper) = numbers(dtype, *shape), mixed_bounds(dtype, *shape)
    swapped = raw
    for dim in range(0, raw.dim() - 1, 2):
        swapped = swapped.transpose(dim, dim + 1).contiguous().transpose(dim, dim + 1)
    grads, along = (swapped, raw.cos()), (raw + 1, None, raw * 2)
    check_elementwise("bounded", raw, lower, upper, grads, along)
    check_elementwise("bounded", raw, 0.0, 1.0, grads, along)


def test_channels_last() -> None:
    raw = numbers(torch.float32, 2, 3, 4, 5).to(memory_format=torch.channels_last)
    per_channel = numbers(torch.float32, 3, seed=4).view(3, 1, 1).expand_as(raw)
    check_elementwise("bounded", raw, per_channel, per_channel + 1, (raw.cos(), raw.sin().contiguous()), (raw,) * 3)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "NARROW", 1)
    monkeypatch.setattr(simplex, "NARROW", 1)
    raw = numbers(torch.float32, 12, 7)
    check_elementwise("bounded", raw, raw.T.contiguous().T - 1, raw[:, :1].expand_as(raw) + 9, (raw, raw), (raw,) * 3)
    check_simplex(numbers(torch.float32, 5, 7, 3), 1)


@pytest.mark.parametrize("kernel", ["backward.tensor", "double_backward.tensor"])
def test_needed(kernel: str) -> None:
    """Results that nobody asked for are empty; the others are as if all had been."""
    raw = numbers(torch.bfloat16, 40)
    lower, upper = mixed_bounds(torch.bfloat16, 40)
    along = (raw.cos(), None, numbers(torch.float32, 40)) if kernel.startswith("double") else ()
    operands = (*along, raw.sin(), None, raw, lower, upper)
    run = KERNELS["bounded"][kernel]
    everything = run(*operands, -1)
    for needed in {0, *(1 << i for i in range(len(everything))), *(~(1 << i) for i in range(len(everything)))}:
        some = run(*operands, needed)
        check_layout(some, raw, needed)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert one.dtype == other.dtype == (torch.bfloat16 if i < len(some) - 2 else torch.float32)
            assert one.numel() == 0 or torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["backward", "double_backward", "backward.tensor", "double_backward.tensor"])
def test_absent_operands_are_zeros(kernel: str) -> None:
    raw = numbers(torch.float32, 40)
    bounds: tuple[Any, Any] = mixed_bounds(torch.float32, 40) if kernel.endswith(".tensor") else (0.0, 2.0)
    needed = () if kernel == "backward" else (-1,)
    count = {"backward": 2, "double_backward": 3, "backward.tensor": 2, "double_backward.tensor": 5}[kernel]
    inputs = [numbers(torch.float32, 40, seed=seed) for seed in range(count)]
    for i in range(count):
        for absent in ({i}, set(range(count)) - {i}):
            if kernel == "double_backward":
                absent = absent - {0}  # along_raw is there without exception
            without = [None if j in absent else t for j, t in enumerate(inputs)]
            zeros = [torch.zeros_like(t) if j in absent else t for j, t in enumerate(inputs)]
            got = as_tuple(KERNELS["bounded"][kernel](*without, raw, *bounds, *needed))
            want = as_tuple(KERNELS["bounded"][kernel](*zeros, raw, *bounds, *needed))
            for result in zip(got, want, strict=True):
                torch.testing.assert_close(*result, rtol=0, atol=0)


# --- Simplex ---------------------------------------------------------------------------------------------------------


def check_simplex(
    raw: Tensor, dim: int, grad_x: Tensor | None = None, along: Tensor | None = None, ulps: float = 8
) -> None:
    """The three kernels; a term's error grows with how far its raw lies below the row's largest."""
    dtype = raw.dtype
    g = (numbers(dtype, *raw.shape, seed=1) if grad_x is None else grad_x) if raw.numel() else raw
    a = (numbers(dtype, *raw.shape, seed=2) if along is None else along) if raw.numel() else raw
    kernels = KERNELS["simplex"]
    got_x = kernels["forward"](raw, dim)
    got_grad = kernels["backward"](g, raw, dim)
    got_for_grad, got_for_raw = kernels["double_backward"](a, g, raw, dim, 3)
    check_layout((got_x, got_grad, got_for_grad, got_for_raw), raw)
    if raw.numel() == 0:
        return

    row = (lambda t: t.double().reshape(1)) if raw.dim() == 0 else Tensor.double
    raw64, g64, a64 = row(raw), row(g), row(a)
    below = (raw64.amax(dim, keepdim=True) - raw64).nan_to_num(posinf=0.0)
    x = torch.softmax(raw64, dim)
    at = raw64.argmax(dim, keepdim=True)
    shifted_g, shifted_a = (v - v.gather(dim, at) for v in (g64, a64))
    mean_g, mean_a = ((x * v).sum(dim, keepdim=True) for v in (shifted_g, shifted_a))
    c = (shifted_a - mean_a) * (shifted_g - mean_g)
    mean_c = (x * c).sum(dim, keepdim=True)

    def scale(v: Tensor) -> Tensor:
        return x * ((1 + below) * v + (x * (1 + below) * v).sum(dim, keepdim=True))

    size_g, size_a = (v.abs() + (x * v.abs()).sum(dim, keepdim=True) for v in (shifted_g, shifted_a))
    info = torch.finfo(dtype)
    floor = torch.where(raw64 > -INF, info.smallest_normal * info.eps, 0.0)
    for got, want, terms in (
        (got_x, torch.maximum(x, floor), scale(torch.ones_like(x))),
        (got_grad, x * (shifted_g - mean_g), scale(size_g)),
        (got_for_grad, x * (shifted_a - mean_a), scale(size_a)),
        (got_for_raw, x * (c - mean_c), scale(size_a * size_g)),
    ):
        check(got.reshape(want.shape), want, terms, dtype, ulps, tiny=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((1,), 0), ((), 0), ((5, 1), 1), ((6, 33), 1), ((33, 6), 0), ((3, 129, 2), 1), ((2, 5, 40), 1)],
    ids=str,
)
def test_simplex(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    check_simplex(3 * numbers(dtype, *shape), dim)


@pytest.mark.parametrize(("shape", "dim"), [((2, 9000), 1), ((9000, 2), 0), ((300, 33), 0), ((1, 70_000), 1)], ids=str)
def test_simplex_rows_longer_than_a_block(shape: tuple[int, ...], dim: int) -> None:
    check_simplex(3 * numbers(torch.float32, *shape), dim, ulps=16)


@pytest.mark.parametrize("of_grads", ["contiguous", "reversed", "uniform"])
@pytest.mark.parametrize("of_raw", LAYOUTS)
def test_simplex_layouts(of_raw: str, of_grads: str) -> None:
    raw = LAYOUTS[of_raw](numbers(torch.float32, 4, 3, 6))
    grads = [LAYOUTS[of_grads](numbers(torch.float32, 4, 3, 6, seed=seed)) for seed in (1, 2)]
    check_simplex(raw, sum(map(ord, of_raw)) % 3, *grads)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3, 0)], ids=str)
def test_simplex_without_elements(shape: tuple[int, ...]) -> None:
    check_simplex(numbers(torch.float32, *shape), 0)


@pytest.mark.parametrize("needed", range(4))
def test_simplex_needed(needed: int) -> None:
    raw, g, a = (numbers(torch.float16, 5, 6, seed=seed) for seed in range(3))
    everything = KERNELS["simplex"]["double_backward"](a, g, raw, 1, 3)
    some = KERNELS["simplex"]["double_backward"](a, g, raw, 1, needed)
    check_layout(some, raw, needed)
    for one, other in zip(some, everything, strict=True):
        assert one.dtype == torch.float16
        assert one.numel() == 0 or torch.equal(one, other)


@pytest.mark.parametrize("gap", [1.0, 12.0, 30.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simplex_keeps_its_digits_where_one_x_is_nearly_one(dtype: torch.dtype, gap: float) -> None:
    raw = numbers(dtype, 4, 9) * 0.1
    raw[:, 3] += gap
    check_simplex(raw, 1, 100 + numbers(dtype, 4, 9, seed=1), 100 + numbers(dtype, 4, 9, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [6, 9000])
def test_simplex_of_numbers_beyond_measure(size: int, dtype: torch.dtype) -> None:
    rows = numbers(dtype, 5, size) * 0.1
    rows[0, 2] = -1e4
    rows[1, :] = -INF
    rows[2, : size // 2] = -INF
    rows[3, 1] = INF
    rows[4, 4] = math.nan
    x = KERNELS["simplex"]["forward"](rows, 1)
    info = torch.finfo(dtype)
    assert x[0, 2].item() == info.smallest_normal * info.eps
    assert (x[2, : size // 2] == 0).all()
    assert (x[2, size // 2 :] > 0).all()
    assert x[[1, 3, 4]].isnan().all()
    assert not x[[0, 2]].isnan().any()
    want = torch.softmax(rows[2].double(), 0)
    check(x[2], want, want * 2, dtype, 8)
    grad = KERNELS["simplex"]["backward"](numbers(dtype, 5, size), rows, 1)
    assert grad[[1, 3, 4]].isnan().all()
    assert not grad[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((2, 2047), 1, torch.float32),
        ((2, 5000), 1, torch.float32),
        ((1, 4500), 1, torch.bfloat16),
        ((1, 5000), 1, torch.float64),
        ((300, 33), 0, torch.float32),
        ((2, 70, 5), 1, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["ilr", "stick_breaking"])
def test_bijections_in_one_block_and_in_several(
    kind: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    raw, along = numbers(dtype, *shape), numbers(dtype, *shape, seed=1)
    x_shape = [n + (d == dim) for d, n in enumerate(shape)]
    g, h = numbers(dtype, *x_shape, seed=2), numbers(dtype, *shape[:dim], *shape[dim + 1 :], seed=3) / shape[dim]
    kernels, reference = KERNELS[kind], _library._references[kind]
    eps, size = torch.finfo(dtype).eps, x_shape[dim]
    for kernel, args, scale in (
        ("forward", (raw, dim), 1.0),
        ("forward_log_det", (raw, dim), size),
        ("backward", (g, h, raw, dim), 4.0),
        ("backward", (g, None, raw, dim), 1.0),
        ("double_backward", (along, g, h, raw, dim, 7), 64.0 + size),
    ):
        got = kernels[kernel](*args)
        want = reference[kernel](*(a.double() if isinstance(a, Tensor) else a for a in args))
        for result, value in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
            assert result.dtype == dtype
            rounding = 32 * torch.finfo(compute_dtype(dtype)).eps * scale
            torch.testing.assert_close(result.double(), value, rtol=max(eps, 1e-5), atol=rounding)


@pytest.mark.parametrize("needed", range(8))
@pytest.mark.parametrize("kind", ["ilr", "stick_breaking"])
def test_results_of_bijections_that_are_not_needed(kind: str, needed: int) -> None:
    raw, along, g, h = (numbers(torch.float32, *shape) for shape in ((5, 6), (5, 6), (5, 7), (5,)))
    everything = KERNELS[kind]["double_backward"](along, g, h, raw, 1, 7)
    some = KERNELS[kind]["double_backward"](along, g, h, raw, 1, needed)
    for i, (one, other) in enumerate(zip(some, everything, strict=True)):
        assert torch.equal(one, other) if needed >> i & 1 else one.numel() == 0
