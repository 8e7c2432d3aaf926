"""Every CUDA kernel against the reference in float64: executed without a GPU (see ``emulation``), and on one."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from conftest import moved, needs_cuda
from torch import Tensor

import constrained_ops  # noqa: F401  (defines the operators)
from constrained_ops import _library
from constrained_ops._library import compute_dtype

inf, nan = math.inf, math.nan

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-6, torch.float64: 1e-13}
BOUNDS = {"bounded": [(-1.0, 2.0), (0.5, inf), (-inf, 3.0), (-inf, inf)], "exponential": [(0.25, inf)]}
ELEMENTWISE = [(transform, bounds) for transform in BOUNDS for bounds in BOUNDS[transform]]

emulated = pytest.mark.skipif(not emulation.available(), reason="the emulation needs g++ on Linux")


class OnGpu:
    """An operator that takes CPU tensors to the GPU as they lie in memory, and its results back."""

    def __init__(self, operator: Any) -> None:
        self._operator, self._schema = operator, operator._schema

    def __call__(self, *args: Any) -> Any:
        results = self._operator(*(moved(a, "cuda") if isinstance(a, Tensor) else a for a in args))
        return results.cpu() if isinstance(results, Tensor) else tuple(result.cpu() for result in results)


@pytest.fixture(
    scope="module", params=[pytest.param("emulated", marks=emulated), pytest.param("cuda", marks=needs_cuda)]
)
def kernels(request: pytest.FixtureRequest) -> dict[str, dict[str, Callable[..., Any]]]:
    if request.param == "emulated":
        return emulation.load()
    assert _library.has_cuda_library, "the CUDA library is missing"
    return {
        transform: {kernel: OnGpu(_library.overload(transform, kernel)) for kernel in members}
        for transform, members in _library.TRANSFORMS.items()
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are too small to share out, and the emulation is not to wait for threads that spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def check(
    kernels: dict[str, dict[str, Callable[..., Any]]], transform: str, kernel: str, *args: Any, **tolerance: float
) -> None:
    """One call against the reference: values, and dtype, layout and emptiness of results as ``_library`` promises."""
    operator = kernels[transform][kernel]
    raw = args[_library.like_position(operator)]
    needed_at = _library._argument_positions(operator).get("needed")
    needed = -1 if needed_at is None else args[needed_at]
    results = as_tuple(operator(*args))
    doubles = [a.double() if isinstance(a, Tensor) else a for a in args]
    expected = as_tuple(_library._references[transform][kernel](*doubles))
    if _library.TRANSFORMS[transform] is _library.BIJECTION:
        dim = args[_library._argument_positions(operator)["dim"]]
        promised = _library.empty_bijection(raw, dim, _library.BIJECTION_RESULTS[kernel])
    else:
        promised = (torch.empty_like(raw),) * len(results)
    bound_results = 2 if kernel in ("backward.tensor", "double_backward.tensor") else 0
    for k, (result, value) in enumerate(zip(results, expected, strict=True)):
        dtype = compute_dtype(raw.dtype) if k >= len(results) - bound_results else raw.dtype
        assert result.dtype == dtype
        if not needed >> k & 1:
            assert result.numel() == 0
            continue
        assert result.shape == promised[k].shape and result.stride() == promised[k].stride()
        bound = {"rtol": TOLERANCE[raw.dtype], "atol": TOLERANCE[raw.dtype], **tolerance}
        torch.testing.assert_close(
            result.double(),
            value.expand(result.shape),
            equal_nan=True,
            msg=lambda m: f"{transform}_{kernel}: {m}",
            **bound,
        )


def calls(
    transform: str, raw: Tensor, bounds: tuple[Any, Any], like: Callable[[], Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Every kernel of an elementwise family, with gradients made by ``like``."""
    g, h, a = like(), like(), like()
    if isinstance(bounds[0], Tensor):
        b, c = (like().to(compute_dtype(raw.dtype)).to(raw.dtype) for _ in range(2))
        yield "forward.tensor", raw, *bounds
        yield "forward_log_det.tensor", raw, *bounds
        yield "backward.tensor", g, None, raw, *bounds, 7
        yield "backward.tensor", g, h, raw, *bounds, 7
        yield "double_backward.tensor", a, b, c, g, h, raw, *bounds, 31
    else:
        yield "forward", raw, *bounds
        yield "forward_log_det", raw, *bounds
        yield "backward", g, None, raw, *bounds
        yield "backward", g, h, raw, *bounds
        yield "double_backward", a, g, h, raw, *bounds, 7


def tensor_bounds(raw: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The same bounds for all elements: one that broadcasts, and an expanded view."""
    lower, upper = (torch.tensor(bound, dtype=compute_dtype(raw.dtype)) for bound in bounds)
    return lower, upper.expand(raw.shape)


def mixed_bounds(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that differ from element to element, some of them infinite."""
    n, dtype = raw.numel(), compute_dtype(raw.dtype)
    lower = torch.tensor([-1.0, -inf, 0.5, -inf], dtype=dtype).repeat(n // 4 + 1)[:n]
    upper = torch.tensor([2.0, 3.0, inf, inf, 1.5], dtype=dtype).repeat(n // 5 + 1)[:n]
    return lower.view(raw.shape), upper.view(raw.shape)


# --- Elementwise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transform", "bounds"), ELEMENTWISE, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 255, 256, 257, 2047, 2049])
def test_elementwise_sizes(kernels: Any, transform: str, bounds: Any, dtype: torch.dtype, n: int) -> None:
    raw = sample((n,), dtype)
    for kernel, *args in calls(transform, raw, bounds, lambda: sample((n,), dtype)):
        check(kernels, transform, kernel, *args)
    for kernel, *args in calls(transform, raw, tensor_bounds(raw, bounds), lambda: sample((n,), dtype)):
        check(kernels, transform, kernel, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_elements_than_the_grid(kernels: Any, dtype: torch.dtype) -> None:
    n = 140_001
    raw, grad = sample((n,), dtype), sample((n,), dtype)
    check(kernels, "bounded", "forward", raw, -1.0, 2.0)
    check(kernels, "bounded", "backward", grad[::2], None, raw[::2], -1.0, 2.0)
    check(kernels, "bounded", "backward.tensor", grad, None, raw, *tensor_bounds(raw, (-1.0, 2.0)), 7)


def layouts(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    return {
        "0-dim": lambda: sample((), dtype),
        "unaligned": lambda: sample((602,), dtype)[1:].view(601),
        "transposed": lambda: sample((37, 19), dtype).t(),
        "channels last": lambda: sample((2, 5, 7, 3), dtype).to(memory_format=torch.channels_last),
        "sliced": lambda: sample((21, 40), dtype)[1:20:2, 3:36:3],
        "sliced and transposed": lambda: sample((21, 5, 40), dtype).transpose(0, 2)[:, 1:4, ::2],
        "expanded": lambda: sample((13, 1, 4), dtype).expand(13, 9, 4),
        "size 1": lambda: sample((1, 65, 1), dtype).transpose(0, 1),
        "ten dimensions": lambda: sample((2,) * 10 + (2,), dtype)[..., ::2].permute(9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 10),
    }


LAYOUTS = list(layouts(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_layouts(kernels: Any, layout: str, dtype: torch.dtype) -> None:
    raw = layouts(dtype)[layout]()
    same, other = layouts(dtype)[layout], lambda: sample(tuple(raw.shape), dtype)
    for like in (same, other):
        for bounds in ((-1.0, 2.0), mixed_bounds(raw), tensor_bounds(raw, (-1.0, inf))):
            for kernel, *args in calls("bounded", raw, bounds, like):
                check(kernels, "bounded", kernel, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transform", "bounds"), ELEMENTWISE, ids=str)
def test_every_map_strided(kernels: Any, transform: str, bounds: Any, dtype: torch.dtype) -> None:
    sliced = layouts(dtype)["sliced"]
    raw = sliced()
    for of_kind in (bounds, tensor_bounds(raw, bounds)):
        for kernel, *args in calls(transform, raw, of_kind, sliced):
            check(kernels, transform, kernel, *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lower_shape", [(1, 1), (37,), (19, 1), (19, 37)], ids=str)
@pytest.mark.parametrize("upper_shape", [(), (1, 37), (19, 37)], ids=str)
def test_broadcast_bounds(kernels: Any, lower_shape: Any, upper_shape: Any, dtype: torch.dtype) -> None:
    compute, shape = compute_dtype(dtype), (19, 37)
    lower, upper = -1 - torch.rand(lower_shape, dtype=compute), 1 + torch.rand(upper_shape, dtype=compute)
    for raw in (sample(shape, dtype), sample((37, 19), dtype).t()):
        for transform in BOUNDS:
            for kernel, *args in calls(transform, raw, (lower, upper), lambda: sample(shape, dtype)):
                check(kernels, transform, kernel, *args)


@pytest.mark.parametrize("transform", BOUNDS)
def test_operands_and_results_left_out(kernels: Any, transform: str) -> None:
    raw = sample((300,), torch.float32)
    bounds = BOUNDS[transform][0]
    of_tensors = tensor_bounds(raw, bounds)
    optional = [None, sample((300,), torch.float32)]
    for g, h in itertools.product(optional, repeat=2):
        check(kernels, transform, "backward", g, h, raw, *bounds)
        for needed in range(8):
            check(kernels, transform, "backward.tensor", g, h, raw, *of_tensors, needed)
            check(kernels, transform, "double_backward", optional[1], g, h, raw, *bounds, needed)
    for number, operands in enumerate(itertools.product(optional, repeat=5)):
        check(kernels, transform, "double_backward.tensor", *operands, raw, *of_tensors, number)
        check(kernels, transform, "double_backward.tensor", *operands, raw, *of_tensors, 31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, -2.0), (0.1, 0.3), (1.0, inf), (-inf, -1.0)], ids=str)
def test_strictly_inside(kernels: Any, bounds: tuple[float, float], dtype: torch.dtype) -> None:
    raw = torch.tensor([0.0, -0.0, 1.0, -5.0, 20.0, -20.0, 100.0, -100.0, 6e4, -6e4, inf, -inf], dtype=dtype)
    at_bounds = tensor_bounds(raw, bounds)
    for x in (
        kernels["bounded"]["forward"](raw, *bounds),
        kernels["bounded"]["forward.tensor"](raw, *at_bounds),
        kernels["bounded"]["forward.tensor"](raw, *(b.clone() for b in at_bounds)),
    ):
        assert torch.isfinite(x).all()
        assert (x.double() > bounds[0]).all() and (x.double() < bounds[1]).all()
    assert kernels["bounded"]["forward"](torch.full((5,), nan, dtype=dtype), *bounds).isnan().all()


# --- Rows ----------------------------------------------------------------------------------------------------------


def check_rows(kernels: Any, raw: Tensor, dim: int, like: Callable[[], Tensor], **tolerance: float) -> None:
    g, a = like(), like()
    check(kernels, "simplex", "forward", raw, dim, **tolerance)
    check(kernels, "simplex", "backward", g, raw, dim, **tolerance)
    check(kernels, "simplex", "double_backward", a, g, raw, dim, 3, **tolerance)


def like_rounding(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}


def check_projection(kernels: Any, x: Tensor, dim: int, like: Callable[[], Tensor], **tolerance: float) -> None:
    """With numbers so that from one to all of a row end up on the support."""
    weight = like().abs() + 1
    for scale, total in ((1.0, 1.0), (0.125, 4.0)):
        z = (x * scale).as_strided(x.shape, x.stride()) if x.numel() and 0 in x.stride() else x * scale
        check(kernels, "projection", "forward", z, dim, total, **tolerance)
        check(kernels, "projection", "forward.weighted", z, weight, dim, total, **tolerance)
        y = _library._references["projection"]["forward.weighted"](z, weight, dim, total)
        y = torch.empty_like(z).copy_(y)
        check(kernels, "projection", "backward", like(), y, dim, **tolerance)
        for given, needed in ((z, 3), (z, 2), (None, 1)):
            check(kernels, "projection", "backward.weighted", like(), given, y, weight, dim, needed, **tolerance)


def check_bijections(kernels: Any, raw: Tensor, dim: int, like: Callable[[], Tensor]) -> None:
    """Tolerances are those of sums along a row, which the logarithms and their gradients are."""
    size = raw.shape[dim] + 1
    x_shape, row_shape = [n + (d == dim) for d, n in enumerate(raw.shape)], [*raw.shape[:dim], *raw.shape[dim + 1 :]]
    g, h, along = sample(tuple(x_shape), raw.dtype), sample(tuple(row_shape), raw.dtype) / size, like()
    for kind in ("ilr", "stick_breaking"):
        check(kernels, kind, "forward", raw, dim)
        check(kernels, kind, "forward_log_det", raw, dim, atol=4 * size * TOLERANCE[torch.float32])
        for grads in ((g, h), (g, None), (None, h)):
            check(kernels, kind, "backward", *grads, raw, dim)
        check(kernels, kind, "double_backward", along, g, h, raw, dim, 7, atol=40 * TOLERANCE[raw.dtype])


LENGTHS = [1, 2, 3, 4, 5, 8, 31, 32, 33, 127, 128, 129, 132, 255, 256, 257, 264, 511, 513, 1023, 1024, 1025]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [0, 1])
def test_contiguous_rows(kernels: Any, length: int, offset: int, dtype: torch.dtype) -> None:
    rows = 9 if length < 500 else 2
    shape = (rows, length)
    unaligned = lambda: sample((rows * length + offset,), dtype)[offset:].view(shape)  # noqa: E731
    check_rows(kernels, unaligned(), 1, unaligned)
    check_projection(kernels, unaligned(), 1, unaligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 126, 127, 128, 129, 600, 1025])
def test_contiguous_rows_of_bijections(kernels: Any, length: int, dtype: torch.dtype) -> None:
    rows = 9 if length < 500 else 2
    offset = length % 2  # an odd one begins between multiples of 16 bytes
    like = lambda: sample((rows * length + offset,), dtype)[offset:].view(rows, length)  # noqa: E731
    check_bijections(kernels, like(), 1, like)


@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((2, 4095), 1, torch.float32),
        ((2, 4096), 1, torch.float32),
        ((2, 8300), 1, torch.bfloat16),
        ((1, 5000), 1, torch.float64),
        ((3, 5, 7), 1, torch.float32),
        ((70, 3), 0, torch.float64),
        ((2, 300, 1, 4), 1, torch.bfloat16),
        ((4200, 2), 0, torch.float32),
        ((2, 9, 4100), 1, torch.float32),  # a thread for each row
        ((17, 8192), 0, torch.float16),
    ],
    ids=str,
)
def test_rows_of_bijections_in_parts_and_along_other_dimensions(
    kernels: Any, shape: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    check_bijections(kernels, sample(shape, dtype), dim, lambda: sample(shape, dtype))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "0-dim"])
def test_layouts_of_bijections(kernels: Any, layout: str) -> None:
    raw = layouts(torch.float32)[layout]()
    for dim in range(raw.dim()):
        check_bijections(kernels, raw, dim, layouts(torch.float32)[layout])


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        (torch.float32, 8192),
        (torch.float32, 8193),
        (torch.float32, 8196),
        (torch.float32, 16_388),
        (torch.float16, 8200),
        (torch.bfloat16, 8200),
        (torch.float16, 8201),
        (torch.bfloat16, 8201),
        (torch.float64, 5000),
        (torch.float32, 16_385),
        (torch.float16, 16_401),
        (torch.bfloat16, 16_401),
        (torch.float64, 8193),
    ],
    ids=str,
)
def test_rows_too_long_for_registers(kernels: Any, dtype: torch.dtype, length: int) -> None:
    check_rows(kernels, sample((2, length), dtype), 1, lambda: sample((2, length), dtype))
    check_projection(kernels, sample((2, length), dtype), 1, lambda: sample((2, length), dtype))


COLUMNS = [
    ((3, 5, 7), 1), ((2, 17, 2), 1), ((70, 3), 0), ((40, 33), 0), ((3, 129, 9), 1), ((2, 300, 1, 4), 1),
    ((5, 2, 300), 1), ((1030, 9), 0), ((1100, 40), 0), ((2100, 2), 0), ((2, 4100, 3), 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), COLUMNS, ids=str)
def test_rows_along_other_dimensions(kernels: Any, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    check_rows(kernels, sample(shape, dtype), dim, lambda: sample(shape, dtype))
    check_projection(kernels, sample(shape, dtype), dim, lambda: sample(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_layouts(kernels: Any, layout: str, dtype: torch.dtype) -> None:
    raw = layouts(dtype)[layout]()
    for dim in range(max(raw.dim(), 1)):
        check_rows(kernels, raw, dim, layouts(dtype)[layout])
        check_projection(kernels, raw, dim, layouts(dtype)[layout])
        check_rows(kernels, raw, dim, lambda: sample(tuple(raw.shape), dtype))


@pytest.mark.parametrize(
    ("shape", "dim"), [((35_000, 3), 1), ((5000, 12), 1), ((300, 320), 1), ((3, 40_000), 0), ((40, 1500), 0)], ids=str
)
def test_more_rows_than_the_grid(kernels: Any, shape: tuple[int, int], dim: int) -> None:
    raw, g = sample(shape, torch.float32), sample(shape, torch.float32)
    check(kernels, "simplex", "backward", g, raw, dim)
    check(kernels, "projection", "forward", raw, dim, 1.0)


@pytest.mark.parametrize(("shape", "dim"), [((9000, 2), 1), ((35, 300), 1), ((300, 3, 40), 1)], ids=str)
def test_more_rows_of_bijections_than_the_grid(kernels: Any, shape: tuple[int, ...], dim: int) -> None:
    raw = sample(shape, torch.float32)
    for kind in ("ilr", "stick_breaking"):
        check(kernels, kind, "forward", raw, dim)
        x = _library._references[kind]["forward"](raw, dim)
        check(kernels, kind, "backward", torch.randn_like(x), None, raw, dim)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4)], ids=str)
def test_no_rows(kernels: Any, shape: tuple[int, ...]) -> None:
    raw = torch.empty(shape)
    assert kernels["simplex"]["forward"](raw, 1).shape == raw.shape
    assert kernels["projection"]["forward.weighted"](raw, raw, 1, 1.0).shape == raw.shape
    assert [r.shape for r in kernels["simplex"]["double_backward"](raw, raw, raw, 1, 3)] == [raw.shape] * 2


@pytest.mark.parametrize("needed", range(4))
def test_row_results_left_out(kernels: Any, needed: int) -> None:
    for shape, dim in (((4, 50), 1), ((4, 300), 1), ((50, 6), 0), ((2000, 40), 0)):
        raw, g, a = (sample(shape, torch.float32) for _ in range(3))
        check(kernels, "simplex", "double_backward", a, g, raw, dim, needed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((8, 7), 1), ((8, 200), 1), ((8, 700), 1), ((8, 17_000), 1), ((40, 8), 0), ((2000, 8), 0)],
    ids=str,
)
def test_masked_and_extreme_rows(kernels: Any, shape: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    raw = sample(shape, dtype).movedim(dim, 1).contiguous()
    raw[1] = -inf
    raw[1, 3] = 1.0  # one entry takes all
    raw[2, :5] = -inf  # the first entries that a thread or a part of a row sees are masked
    raw[3, 2] = nan
    raw[4] = 7.0  # all are the largest
    raw[5, 0], raw[5, 1:] = 3e4, -3e4  # underflow
    raw[6] = -inf
    raw[7, 4] = inf
    raw = raw.movedim(1, dim).contiguous()
    g, a = sample(shape, dtype), sample(shape, dtype)
    check(kernels, "simplex", "forward", raw, dim)
    check(kernels, "simplex", "backward", g, raw, dim)
    check(kernels, "simplex", "double_backward", a, g, raw, dim, 3)
    x = kernels["simplex"]["forward"](raw, dim)
    finite = raw.isfinite() & ~x.isnan()
    assert (x[finite] > 0).all() and (x[raw == -inf].nan_to_num() == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((9, 7), 1), ((9, 200), 1), ((9, 700), 1), ((9, 17_000), 1), ((40, 9), 0), ((2000, 9), 0)],
    ids=str,
)
def test_masked_and_extreme_rows_of_a_projection(
    kernels: Any, shape: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    x = sample(shape, dtype).movedim(dim, 1).contiguous()
    x[1] = -inf
    x[1, 3] = 1.0
    x[2, :5] = -inf
    x[3, 2] = nan
    x[4] = 7.0  # all are the largest: the smallest numbers that a row can give
    x[5, 0], x[5, 1:] = 3e4, -3e4
    x[6] = -inf
    x[7, 4] = inf
    weight = sample(shape, dtype).movedim(dim, 1).abs() + 1
    weight[8, 2] = 0
    x, weight = (t.movedim(1, dim).contiguous() for t in (x, weight))
    check(kernels, "projection", "forward", x, dim, 1.0)
    check(kernels, "projection", "forward.weighted", x, weight, dim, 1.0, rtol=1e-2 if dtype == torch.float32 else 2e-2)
    y = kernels["projection"]["forward"](x, dim, 1.0)
    check(kernels, "projection", "backward", sample(shape, dtype), y, dim)
    y = y.movedim(dim, 1)
    torch.testing.assert_close(
        y[4].double(), torch.full(y[4].shape, 1 / y.shape[1], dtype=torch.float64), **like_rounding(dtype)
    )
    assert y[1, 3] == y[5, 0] == 1 and (y[2, :5] == 0).all()
    weighted = kernels["projection"]["forward.weighted"](x, weight, dim, 1.0).movedim(dim, 1)
    assert y[[3, 6, 7]].isnan().all() and weighted[[3, 6, 7, 8]].isnan().all()


@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_sums_of_projected_rows(kernels: Any, weighted: bool) -> None:
    """In float32, over supports of every size."""
    for shape in ((40, 9), (20, 500), (5, 30_000)):
        for scale in (1e-7, 1e-4, 0.1, 1.0, 1e4):
            x = 5 + sample(shape, torch.float32) * scale
            arguments = (x, sample(shape, torch.float32).abs() + 0.1) if weighted else (x,)
            y = kernels["projection"]["forward.weighted" if weighted else "forward"](*arguments, 1, 1.0)
            assert (y >= 0).all()
            assert ((y.double().sum(1) - 1).abs() <= 1e-6).all()


def test_one_entry_nearly_one(kernels: Any) -> None:
    """Without the shift by the value at the peak, float32 loses the gradient's digits here."""
    for length, dim in ((6, 1), (300, 1), (17_000, 1), (40, 0), (2000, 0)):
        raw, g = sample((3, length), torch.float32), sample((3, length), torch.float32)
        raw[:, 2] += 40
        g += 100
        shape = (lambda t: t) if dim == 1 else (lambda t: t.t().contiguous())
        check(kernels, "simplex", "backward", shape(g), shape(raw), dim, rtol=1e-4, atol=0.0)


# --- The outer layer -----------------------------------------------------------------------------------------------


def test_operands_that_do_not_fit_are_refused(kernels: Any) -> None:
    raw = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"bounded_backward.*grad_x"):
        kernels["bounded"]["backward"](torch.zeros(3), None, raw, 0.0, 1.0)
    with pytest.raises(RuntimeError, match=r"bounded_forward.*lower"):
        kernels["bounded"]["forward.tensor"](raw, torch.zeros(4, dtype=torch.float64), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"simplex_backward.*grad_x"):
        kernels["simplex"]["backward"](torch.zeros(4, dtype=torch.float64), raw, 0)
    with pytest.raises(RuntimeError, match=r"simplex_forward.*dim"):
        kernels["simplex"]["forward"](raw, 1)
    with pytest.raises(RuntimeError, match=r"projection_forward.*weight must have the shape of x"):
        kernels["projection"]["forward.weighted"](raw, torch.ones(3), 0, 1.0)
    with pytest.raises(RuntimeError, match=r"projection_backward.*grad_y must have the shape of y"):
        kernels["projection"]["backward"](torch.ones(3), raw, 0)
    with pytest.raises(RuntimeError, match=r"projection_backward.*needs x"):
        kernels["projection"]["backward.weighted"](raw, None, raw, raw, 0, 3)
    with pytest.raises(RuntimeError, match=r"bounded_forward.*raw"):
        kernels["bounded"]["forward"](torch.zeros(4, dtype=torch.int32), 0.0, 1.0)


# --- Index arithmetic and the emulation itself ---------------------------------------------------------------------


ROWS_BEGIN = ("row_in_one_piece", "row_side_by_side", "row_of_a_step")


@pytest.fixture(scope="module")
def checks() -> ctypes.CDLL:
    if not emulation.available():
        pytest.skip("the emulation needs g++ on Linux")
    sources = [emulation.FOLDER / "checks.cpp", emulation.FOLDER / "fibers.cpp"]
    library = ctypes.CDLL(str(emulation.build("libchecks.so", sources, ["-O1"], ["-shared", "-Wl,-Bsymbolic"])))
    for name in ("run_half_a_block", "run_half_a_warp", "run_mask", "run_empty_grid", "run_sound"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ROWS_BEGIN:
        getattr(library, name).restype, getattr(library, name).argtypes = ctypes.c_int64, [ctypes.c_int64] * 4
    library.quotient.restype = library.offset.restype = ctypes.c_int64
    library.quotient.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.offset.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.POINTER(ctypes.c_int64)] * 2]
    return library


def test_division_beyond_32_bits(checks: ctypes.CDLL) -> None:
    numbers = random.Random(0)
    sizes = [1, 2, 3, 5, 7, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 2**62 - 1, 2**62, 2**62 + 1, 2**63 - 1]
    sizes += [numbers.randrange(1, 2 ** numbers.randrange(1, 64)) for _ in range(300)]
    for size in sizes:
        multiples = [size * numbers.randrange(2**63 // size) for _ in range(5)]
        for n in [0, size - 1, size, 2**31, 2**32 - 1, 2**63 - 1, *multiples, *(m - 1 for m in multiples if m)]:
            assert checks.quotient(n, size) == n // size, (n, size)


def test_offsets_beyond_32_bits(checks: ctypes.CDLL) -> None:
    numbers = random.Random(0)
    for _ in range(300):
        rank = numbers.randrange(2, 7)
        sizes = [numbers.randrange(2, 2**10) for _ in range(rank)]
        strides = [numbers.choice([0, 1, numbers.randrange(1, 2**40)]) for _ in range(rank)]
        n = numbers.randrange(math.prod(sizes))
        rest, expected = n, 0
        for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
            expected += rest % size * stride
            rest //= size
        array = ctypes.c_int64 * rank
        assert checks.offset(n, rank, array(*sizes), array(*strides)) == expected, (n, sizes, strides)


def test_rows_beyond_32_bits(checks: ctypes.CDLL) -> None:
    numbers = random.Random(0)
    for name in ROWS_BEGIN:
        for _ in range(300):
            outer, length, inner = (numbers.randrange(1, 2 ** numbers.randrange(1, 21)) for _ in range(3))
            inner = 1 if name == "row_in_one_piece" else inner
            row = numbers.choice([outer * inner - 1, numbers.randrange(outer * inner)])
            first = row // inner * length * inner + row % inner
            assert getattr(checks, name)(outer, length, inner, row) == first, (name, outer, length, inner, row)


def test_the_emulation_reports_mistakes(checks: ctypes.CDLL) -> None:
    assert b"__syncthreads that not all come to" in checks.run_half_a_block()
    assert b"warp operation that not all come to" in checks.run_half_a_warp()
    assert b"leaves out lanes" in checks.run_mask()
    message = checks.run_empty_grid()
    assert message.startswith(b"op: invalid configuration") and b"checks.cpp:" in message
    result = (ctypes.c_int * 64)()
    assert checks.run_sound(result) is None and list(result) == [63] * 64


# --- Planted faults ------------------------------------------------------------------------------------------------

MEMORY, RACES = "-fsanitize=address,undefined", "-fsanitize=thread"
FAULTS = {  # file of csrc/cuda, what stands there and what instead, sanitizer, what is to be said
    "nothing": ("reduce.cuh", "", "", MEMORY, None),
    "nothing that threads share": ("reduce.cuh", "", "", RACES, None),
    "out-of-bounds read": (
        "storage.cuh",
        "if (i < count) values",
        "if (i <= count) values",
        MEMORY,
        "heap-buffer-over",
    ),
    "missing barrier": ("reduce.cuh", "__syncthreads();\n    state[0] = lane", "state[0] = lane", RACES, "data race"),
    "wrong shuffle mask": ("reduce.cuh", "0xffffffffu", "0x0000ffffu", MEMORY, "leaves out lanes that take part"),
}


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path) -> None:
    """In copies of the parts that the kernels are made of."""
    file, right, wrong, sanitizer, said = FAULTS[fault]
    shutil.copytree(emulation.CSRC, tmp_path / "csrc")
    shutil.copytree(emulation.FOLDER, tmp_path / "tests" / "emulation")
    planted = tmp_path / "csrc" / "cuda" / file
    text = planted.read_text()
    assert not right or text.count(right) == 1
    planted.write_text(text.replace(right, wrong) if right else text)
    sources = [tmp_path / "tests" / "emulation" / name for name in ("planted.cpp", "threads.cpp")]
    flags = ["-O0", "-g1", sanitizer, "-fno-sanitize-recover=all"]
    of_fault = hashlib.sha256(repr(FAULTS[fault]).encode()).hexdigest()[:16]
    program = emulation.build(f"planted_{of_fault}", sources, flags, [])
    done = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True, timeout=100)
    if said is None:
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    else:
        assert done.returncode != 0 and said in done.stderr


# --- Sanitizers ----------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("memory", ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
        ("races", ["-fsanitize=thread", "-DRACES"]),
    ],
    ids=["address and undefined behaviour", "thread"],
)
def test_sanitizers(name: str, flags: list[str]) -> None:
    sources = [emulation.FOLDER / "sanitize.cpp", emulation.FOLDER / "threads.cpp"]
    program = emulation.build(f"sanitize_{name}", sources, ["-O0", "-g1", *flags], [])
    # The thread sanitizer of older compilers cannot live with much randomness in addresses.
    done = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
