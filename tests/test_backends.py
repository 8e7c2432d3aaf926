"""The pin: every operator, on every backend, in every dtype and layout, against the reference in float64.

CPU, CUDA (emulated, and on a GPU), Triton (interpreted where there is none) and the reference in the dtype itself take
the same operands, so that none can drift from the others. Depth is elsewhere: test_accuracy, test_triton,
test_emulation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import emulation
import pytest
import torch
from conftest import DEVICE, moved, needs_cuda
from torch import Tensor

import constrained_ops  # noqa: F401  (defines the operators)
from constrained_ops import _library
from constrained_ops._library import TRANSFORMS, compute_dtype

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = {
    "reference": [],
    "cpu": [],
    "emulated": [pytest.mark.skipif(not emulation.available(), reason="the emulation needs g++ on Linux")],
    "cuda": [needs_cuda],
    "triton": [],
}
INTERPRETED = DEVICE == "cpu"  # by Triton: a call takes a hundred times as long


def triton_kernel(transform: str, kernel: str) -> Callable[..., Any]:
    from constrained_ops.triton import KERNELS

    return KERNELS[transform][kernel]


@pytest.fixture(params=[pytest.param(backend, marks=marks) for backend, marks in BACKENDS.items()])
def kernels(request: pytest.FixtureRequest) -> tuple[Callable[[str, str], Callable[..., Any]], str]:
    """(transform, kernel) -> implementation, and the device that it runs on."""
    backend = request.param
    if backend == "reference":
        return lambda transform, kernel: _library._references[transform][kernel], "cpu"
    if backend == "cpu":
        assert _library.has_cpu_library, "the compiled library is missing"
        return _library.overload, "cpu"
    if backend == "triton":
        request.getfixturevalue("triton_interpreter")
        return triton_kernel, DEVICE
    if backend == "cuda":
        assert _library.has_cuda_library, "the CUDA library is missing"
        return _library.overload, "cuda"
    emulated = emulation.load()
    return lambda transform, kernel: emulated[transform][kernel], "cpu"


# Layouts: how a tensor of some shape lies in memory.


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: Tensor) -> Tensor:
    spacious = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
    spacious[..., 1::2] = t
    return spacious[..., 1::2]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def unaligned(t: Tensor) -> Tensor:
    spacious = torch.zeros(t.numel() + 1, dtype=t.dtype)
    spacious[1:] = t.flatten()
    return spacious[1:].view(t.shape)


def test_operands_lie_as_they_did_on_another_device() -> None:
    for layout in LAYOUTS:
        t = layout(torch.randn(5, 3, 7))
        there = moved(t, "meta")
        assert there.is_meta and there.shape == t.shape
        assert (there.stride(), there.storage_offset()) == (t.stride(), t.storage_offset())


LAYOUTS = [contiguous, transposed, sliced, expanded, unaligned]
SHAPES = [(3, 4, 5), (2, 70, 3), (1, 2, 130), (70, 1, 2)]
BOUNDS = {
    "both": (-1.0, 2.5),
    "lower": (-0.5, INF),
    "upper": (-INF, 3.0),
    "neither": (-INF, INF),
}


def check(
    transform: str, kernel: str, implementation: Callable[..., Any], device: str, *args: Any, scale: float = 1.0
) -> None:
    """Results as the reference's in float64, up to the rounding of what is summed, of size `scale`, in its shape."""
    operator = _library.overload(transform, kernel)
    raw = args[_library.like_position(operator)]
    needed_at = _library._argument_positions(operator).get("needed")
    needed = -1 if needed_at is None else args[needed_at]
    got = implementation(*(moved(arg, device) if isinstance(arg, Tensor) else arg for arg in args))
    want = _library._references[transform][kernel](*(arg.double() if isinstance(arg, Tensor) else arg for arg in args))
    got, want = (value if isinstance(value, tuple) else (value,) for value in (got, want))
    assert len(got) == len(want) == len(operator._schema.returns)
    for i, (result, expected) in enumerate(zip(got, want, strict=True)):
        if not needed >> i & 1:
            continue
        assert result.shape == (expected.shape if TRANSFORMS[transform] is _library.BIJECTION else raw.shape)
        expected = expected.to(result.dtype).double()  # what the dtype can hold, overflow included
        finite = expected.isfinite()
        assert torch.equal(result.cpu().double()[~finite].nan_to_num(), expected[~finite].nan_to_num())
        # Sums of terms of either sign: a few units of the largest, and what the result's own dtype rounds.
        eps, stored = torch.finfo(compute_dtype(raw.dtype)).eps, torch.finfo(result.dtype).eps
        largest = max(scale, *(expected[finite].abs().tolist() or [0.0]))
        tolerance = 16 * eps * largest + stored * expected[finite].abs()
        assert ((result.cpu().double() - expected)[finite].abs() <= tolerance).all(), f"{operator}, result {i}"


def cases(meet: int, reference: bool = True, **axes: list[Any]) -> pytest.MarkDecorator:
    """Parameters of a test: every backend, with or without the reference, at every point that the axes span.

    In Triton's interpreter a launch takes tens of milliseconds whatever the size, and nothing in the kernels and their
    launchers looks at all axes at once: shapes decide on blocks, layouts on copies, dtypes on conversions. There it is
    one point in `meet`, so chosen that any two values of two axes still meet if there are three axes.
    """
    chosen = []
    for backend, *point in itertools.product(
        BACKENDS if reference else list(BACKENDS)[1:], *map(enumerate, axes.values())
    ):
        if backend != "triton" or not INTERPRETED or sum(i for i, _ in point) % meet == 0:
            values = [value for _, value in point]
            names = [getattr(value, "__name__", str(value).removeprefix("torch.")) for value in values]
            chosen.append(pytest.param(backend, *values, marks=BACKENDS[backend], id="-".join([backend, *names])))
    return pytest.mark.parametrize(["kernels", *axes], chosen, indirect=["kernels"])


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor], count: int
) -> list[Tensor]:
    return [layout(torch.randn(shape).mul(2).to(dtype)) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("transform", ["bounded", "exponential"])
def test_elementwise_operators_agree(kernels: Any, transform: str, layout: Any, dtype: torch.dtype) -> None:
    of, device = kernels
    shape = (5, 3, 37)
    raw, along, grad_x, grad_log_det, other = operands(shape, dtype, layout, 5)
    plain = contiguous(grad_x)  # strides unlike raw's
    # In the interpreter a call takes a hundred times as long; test_triton goes through all of them once.
    interpreted = INTERPRETED and of is triton_kernel
    for lower, upper in (
        list(BOUNDS.values())[: 1 if interpreted else None] if transform == "bounded" else [(-0.5, INF)]
    ):
        for kernel in ("forward", "forward_log_det"):
            check(transform, kernel, of(transform, kernel), device, raw, lower, upper)
        backward, double_backward = of(transform, "backward"), of(transform, "double_backward")
        for grads in ((plain, grad_log_det), (grad_x, None), (None, grad_log_det))[: 1 if interpreted else None]:
            check(transform, "backward", backward, device, *grads, raw, lower, upper)
            check(transform, "double_backward", double_backward, device, along, *grads, raw, lower, upper, 7)
    for lower_t, upper_t in tensor_bounds(shape, dtype)[: 1 if interpreted else None]:
        if transform == "exponential":
            lower_t = lower_t.clamp(min=-2.0)  # there is nothing below a lower bound of -inf
        for kernel in ("forward.tensor", "forward_log_det.tensor"):
            check(transform, kernel, of(transform, kernel), device, raw, lower_t, upper_t)
        backward, double_backward = of(transform, "backward.tensor"), of(transform, "double_backward.tensor")
        for grads, needed in (((grad_x, None), 7), ((plain, grad_log_det), 7), ((grad_x, grad_log_det), 2)):
            check(transform, "backward.tensor", backward, device, *grads, raw, lower_t, upper_t, needed)
        for alongs, needed in (((along, other, plain), 31), ((None, other, None), 21)):
            args = (*alongs, grad_x, grad_log_det, raw, lower_t, upper_t, needed)
            check(transform, "double_backward.tensor", double_backward, device, *args)


def tensor_bounds(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Per element with all four kinds, one pair for all, and some that broadcast; numbers that every dtype holds."""
    compute = compute_dtype(dtype)
    lower = torch.randint(-16, 0, shape).to(compute) / 8
    upper = torch.randint(1, 16, shape).to(compute) / 4
    mixed = torch.where(torch.rand(shape) < 0.3, -INF, lower), torch.where(torch.rand(shape) < 0.3, INF, upper)
    expanded = lower[:1, :1].expand(shape), upper[:, :1, :1].expand(shape)
    smaller = [
        (lower[0, 0, 0], upper[:1, :1, :1]),
        (lower[0, 0], upper[:, :1, :1]),
        (lower[0, 0, 0], upper[:, 0, None]),
    ]
    return [mixed, (lower, upper), expanded, *smaller]


@cases(len(SHAPES), shape=SHAPES, layout=LAYOUTS, dtype=DTYPES)
def test_simplex_operators_agree(kernels: Any, shape: tuple[int, ...], layout: Any, dtype: torch.dtype) -> None:
    of, device = kernels
    raw, along, grad_x = operands(shape, dtype, layout, 3)
    plain = contiguous(grad_x)
    for dim in range(3):
        check("simplex", "forward", of("simplex", "forward"), device, raw, dim)
        check("simplex", "backward", of("simplex", "backward"), device, plain, raw, dim)
        check("simplex", "double_backward", of("simplex", "double_backward"), device, along, grad_x, raw, dim, 3)


@pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_simplex_rows_of_every_length(dtype: torch.dtype) -> None:
    """The CPU's ways to take rows, at their edges: in registers, tiles, stages and columns, with rows left over."""
    of = {kernel: _library.overload("simplex", kernel) for kernel in _library.ROWWISE}
    lengths = [*range(1, 72), 95, 96, 97, 127, 128, 129, 1023, 1056, 2100]
    columns = [(70, 45), (20, 6), (600, 7), (600, 40), (1030 if dtype == torch.float64 else 2100, 33)]
    columns += [(7, inner) for inner in (2, 3, 5, 7, 8, 9, 20, 31, 32, 33, 40, 77)]
    for length, inner in [*((length, 1) for length in lengths), *columns]:
        for outer in (1, 67) if length < 130 else (3,):
            raw, along, grad_x = operands((outer, length, inner), dtype, contiguous, 3)
            check("simplex", "forward", of["forward"], "cpu", raw, 1)
            check("simplex", "backward", of["backward"], "cpu", grad_x, raw, 1)
            check("simplex", "double_backward", of["double_backward"], "cpu", along, grad_x, raw, 1, 3)
            x = of["forward"](raw, 1)
            check("simplex", "backward", of["backward"], "cpu", grad_x, raw, 1, x)


@pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")
@pytest.mark.parametrize("length", [2, 4, 8, 11, 20, 64, 70, 1100])
@pytest.mark.parametrize("inner", [1, 32])
def test_simplex_rows_with_special_numbers(length: int, inner: int) -> None:
    """A NaN or an infinite element stays in its row; a masked one gives 0, and a gradient of 0."""
    forward, backward = _library.overload("simplex", "forward"), _library.overload("simplex", "backward")
    raw, grad_x = operands((9, length, inner), torch.float32, contiguous, 2)
    raw[1, -1], raw[3, 0], raw[5], raw[7, 1] = NAN, INF, -INF, -INF
    grad_x[0, 1], grad_x[2, 0] = NAN, INF
    x = forward(raw, 1)
    broken = [1, 3, 5]
    assert x[broken].isnan().all()
    assert (x[7, 1] == 0).all()
    assert torch.allclose(x[[0, 2, 4, 6, 7, 8]].sum(1), torch.ones(6, inner))
    for known in (None, x):
        grad_raw = backward(grad_x, raw, 1, known)
        assert grad_raw[[0, 1, 2, 3, 5]].isnan().any(1).all()
        assert grad_raw[[4, 6, 7, 8]].isfinite().all()
        assert (grad_raw[7, 1] == 0).all()


@pytest.mark.parametrize("length", [2, 4, 7, 20, 64, 70, 1100])
@pytest.mark.parametrize("inner", [1, 32])
def test_simplex_gradients_that_are_equal_along_a_row(length: int, inner: int) -> None:
    """They have no part along the simplex: exactly none, since Adam would make much of a rounding error."""
    raw = torch.randn(5, length, inner)
    grad_x = torch.randn(5, 1, inner).expand(raw.shape)
    forward, backward = _library.overload("simplex", "forward"), _library.overload("simplex", "backward")
    for x in (None, forward(raw, 1)):
        assert (backward(grad_x, raw, 1, x) == 0).all()


@pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")
def test_results_that_are_not_needed() -> None:
    raw, along, grad_x = operands((5, 20), torch.float32, contiguous, 3)
    double_backward = _library.overload("simplex", "double_backward")
    whole = double_backward(along, grad_x, raw, 1, 3)
    for needed in range(4):
        results = double_backward(along, grad_x, raw, 1, needed)
        for i, (result, wanted) in enumerate(zip(results, whole, strict=True)):
            assert torch.equal(result, wanted) if needed >> i & 1 else result.numel() == 0


@cases(len(SHAPES), shape=SHAPES, layout=LAYOUTS, dtype=DTYPES)
def test_projection_operators_agree(kernels: Any, shape: tuple[int, ...], layout: Any, dtype: torch.dtype) -> None:
    of, device = kernels
    x, grad_y, spread = operands(shape, dtype, layout, 3)
    weight = layout(spread.abs() + 1)
    plain = contiguous(grad_y)
    terms = max(1.0, grad_y.abs().max().item())  # of means, which may cancel to nothing
    for dim in range(3):
        for scale, total in ((1.0, 1.0), (0.125, 3.0)):
            z = layout(x * scale)
            check("projection", "forward", of("projection", "forward"), device, z, dim, total)
            args = (z, weight, dim, total)
            check("projection", "forward.weighted", of("projection", "forward.weighted"), device, *args)
            y = _library._references["projection"]["forward.weighted"](*args)
            check("projection", "backward", of("projection", "backward"), device, plain, y, dim, scale=terms)
            backward = of("projection", "backward.weighted")
            for given, needed in ((z, 3), (z, 2), (z, 1), (None, 1)):
                args = (grad_y, given, y, weight, dim, needed)
                check("projection", "backward.weighted", backward, device, *args, scale=terms)


KINDS = ["ilr", "stick_breaking"]


def bijection_grads(raw: Tensor, dim: int, layout: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Of x and log_det."""
    x_shape, row_shape = list(raw.shape), list(raw.shape)
    x_shape[dim] += 1
    del row_shape[dim]
    grad_x, grad_log_det = (torch.randn(shape).to(raw.dtype) for shape in (x_shape, row_shape))
    return layout(grad_x), grad_log_det


def check_bijection(
    of: Any, device: str, kind: str, raw: Tensor, along: Tensor, dim: int, layout: Any, given: slice = slice(None)
) -> None:
    g, h = bijection_grads(raw, dim, layout)
    size = raw.shape[dim] + 1
    # Logarithms and their gradients are sums over rows, whose rounding grows with them.
    sums = 1.0 + float(raw.abs().max()) * float(along.abs().max()) * size
    check(kind, "forward", of(kind, "forward"), device, raw, dim)
    check(kind, "forward_log_det", of(kind, "forward_log_det"), device, raw, dim, scale=float(size))
    for grads in ((g, None), (None, h), (g, h))[given]:
        check(kind, "backward", of(kind, "backward"), device, *grads, raw, dim, scale=4.0 * size)
        check(kind, "double_backward", of(kind, "double_backward"), device, along, *grads, raw, dim, 7, scale=sums)


@cases(len(SHAPES), shape=SHAPES, layout=LAYOUTS, dtype=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bijection_operators_agree(
    kernels: Any, kind: str, shape: tuple[int, ...], layout: Any, dtype: torch.dtype
) -> None:
    of, device = kernels
    raw, along = operands(shape, dtype, layout, 2)
    for dim in range(3):
        grads_layouts, given = list(dict.fromkeys((contiguous, layout))), slice(None)
        if INTERPRETED and of is triton_kernel:  # one of the layouts, and one of three ways to give gradients
            turn = dim + DTYPES.index(dtype)
            grads_layouts, given = [grads_layouts[turn % len(grads_layouts)]], slice(turn % 3, turn % 3 + 1)
        for grads_layout in grads_layouts:
            check_bijection(of, device, kind, raw, along, dim, grads_layout, given)


@pytest.mark.parametrize("kind", KINDS)
@cases(2, reference=False, layout=[contiguous, transposed, sliced, expanded], dtype=[torch.float32, torch.float16])
def test_bijection_results_lie_as_promised(kernels: Any, kind: str, layout: Any, dtype: torch.dtype) -> None:
    of, device = kernels
    for shape in ((3, 4, 5), (3, 1, 5), (1, 1, 1), (2, 0, 3), (0, 2, 3)):
        raw = layout(torch.randn(shape).to(dtype)).to(device)
        for dim in range(3):
            g, h = (t.to(device) for t in bijection_grads(raw, dim, contiguous))
            for kernel, args in (
                ("forward_log_det", (raw, dim)),
                ("backward", (g, h, raw, dim)),
                ("double_backward", (raw, g, h, raw, dim, 7)),
            ):
                results = of(kind, kernel)(*args)
                wanted = _library.empty_bijection(raw, dim, _library.BIJECTION_RESULTS[kernel])
                for result, want in zip(results if isinstance(results, tuple) else (results,), wanted, strict=True):
                    assert (result.shape, result.dtype) == (want.shape, want.dtype)
                    assert all(
                        a == b or n <= 1 for n, a, b in zip(want.shape, result.stride(), want.stride(), strict=True)
                    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_bijections_far_out(kernels: Any, kind: str, dtype: torch.dtype) -> None:
    """Strictly positive, log-determinants finite where the dtype holds them; a NaN stays in its row."""
    of, device = kernels
    far = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [80.0, 80.0, -80.0], [NAN, 0.0, 0.0], [20.0, -20.0, 20.0]]
    )
    raw = far.to(dtype).to(device)
    x, log_det = of(kind, "forward_log_det")(raw, 1)
    whole = [0, 1, 2, 4]
    assert (x[whole] > 0).all() and x[whole].isfinite().all()
    assert x[3].isnan().all() and log_det.isnan().tolist() == [False, False, False, True, False]
    want = _library._references[kind]["forward_log_det"](raw.cpu().double(), 1)[1]
    torch.testing.assert_close(log_det[whole].cpu().double(), want.to(dtype)[whole].double(), rtol=4e-3, atol=0)
    assert of(kind, "backward")(torch.ones_like(x), None, raw, 1)[whole].isfinite().all()


@pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_bijection_rows_of_every_length(kind: str, dtype: torch.dtype) -> None:
    """The CPU's ways to take rows, at their edges: tiles and single rows, with rows left over."""
    lengths = [*range(1, 35), 62, 63, 64, 65, 95, 128, 1023, 2100]
    shapes = [*((67, n, 1) for n in lengths if n < 130), *((3, n, 1) for n in lengths), (1, 100, 3), (1, 100, 45)]
    for shape in (*shapes, (2, 70, 8), (2, 300, 31)):
        raw, along = operands(shape, dtype, contiguous, 2)
        check_bijection(_library.overload, "cpu", kind, raw, along, 1, contiguous)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(), (2, 0), (3, 0, 2), (1,), (1, 1)], ids=str)
def test_small_shapes(kernels: Any, transform: str, shape: tuple[int, ...]) -> None:
    of, device = kernels
    raw = torch.full(shape, 0.5)
    if transform in KINDS:
        for dim in range(raw.dim()):
            g, h = bijection_grads(raw, dim, contiguous)
            check(transform, "forward_log_det", of(transform, "forward_log_det"), device, raw, dim)
            check(transform, "backward", of(transform, "backward"), device, g, h, raw, dim)
            check(transform, "double_backward", of(transform, "double_backward"), device, raw, g, h, raw, dim, 7)
    elif transform == "simplex":
        check(transform, "forward", of(transform, "forward"), device, raw, 0)
        check(transform, "backward", of(transform, "backward"), device, raw, raw, 0)
    elif transform == "projection":
        check(transform, "forward", of(transform, "forward"), device, raw, 0, 1.0)
        check(transform, "backward", of(transform, "backward"), device, raw, raw, 0)
        check(transform, "forward.weighted", of(transform, "forward.weighted"), device, raw, raw, 0, 2.0)
        check(transform, "backward.weighted", of(transform, "backward.weighted"), device, raw, raw, raw, raw, 0, 3)
    else:
        check(transform, "forward", of(transform, "forward"), device, raw, -1.0, INF)
        check(transform, "backward", of(transform, "backward"), device, raw, raw, raw, -1.0, INF)


def test_threads_change_nothing() -> None:
    raw, grad_x = torch.randn(3, 100, 1000), torch.randn(3, 100, 1000)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):  # 5: some wait for a core, and others take their work
            torch.set_num_threads(count)
            one = _library.overload("bounded", "backward")(grad_x, None, raw, 0.0, 1.0)
            rows = [_library.overload("simplex", "backward")(grad_x, raw, dim) for dim in range(3)]
            projected = [_library.overload("projection", "forward")(raw, dim, 1.0) for dim in range(3)]
            bijective = [_library.overload(kind, "backward")(None, grad_x[0], raw, 0) for kind in KINDS]
            results.append([one, *rows, *projected, *bijective])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_every_kernel_is_pinned() -> None:
    """A new kernel has to be added above: the lists here are all that there is."""
    assert set(TRANSFORMS) == {"bounded", "exponential", "simplex", "projection", *KINDS}
    assert set(_library.ELEMENTWISE) == {
        name + variant
        for name in ("forward", "forward_log_det", "backward", "double_backward")
        for variant in ("", ".tensor")
    }
    assert set(_library.ROWWISE) == {"forward", "backward", "double_backward"}
    assert set(_library.BIJECTION) == {"forward", "forward_log_det", "backward", "double_backward"}
    assert set(_library.PROJECTION) == {"forward", "backward", "forward.weighted", "backward.weighted"}
