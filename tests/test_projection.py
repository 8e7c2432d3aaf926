"""The projection onto the simplex: against exact rational arithmetic and sorting, and by what defines it.

``implementation`` is what the device chooses, and the reference; test_backends, test_emulation and test_triton hold the
other implementations to the reference.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co
from constrained_ops import _library
from constrained_ops._library import compute_dtype

INF, NAN = math.inf, math.nan
F32, F64 = torch.float32, torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("implementation")


def exact(x: Tensor, weight: Tensor | None, total: float) -> Tensor:
    """One row in rational arithmetic: the support by elimination, whoever turns negative leaves."""
    d = [Fraction(1)] * x.numel() if weight is None else [Fraction(v) for v in weight.double().tolist()]
    numbers = [Fraction(v) for v in x.double().tolist()]
    support = set(range(len(numbers)))
    while True:
        multiplier = (sum(numbers[i] for i in support) - Fraction(total)) / sum(1 / d[i] for i in support)
        out = {i for i in support if numbers[i] * d[i] <= multiplier}
        if not out:
            y = [numbers[i] - multiplier / d[i] if i in support else Fraction(0) for i in range(len(numbers))]
            return torch.tensor([float(v) for v in y], dtype=F64)
        support -= out


def by_sorting(x: Tensor, weight: Tensor, total: float) -> Tensor:
    """Rows in float64, as Held, Wolfe and Crowder (1974) have it: the last prefix of the order that holds itself."""
    x, u = x.double(), 1 / weight.double()
    order = (x / u).argsort(-1, descending=True)
    ratio, sums, slopes = (x / u).gather(-1, order), x.gather(-1, order).cumsum(-1), u.gather(-1, order).cumsum(-1)
    multiplier = (sums - total) / slopes
    last = (ratio > multiplier).sum(-1, keepdim=True) - 1
    return (x - multiplier.gather(-1, last) * u).clamp(min=0)


def weights_like(x: Tensor) -> Tensor:
    return torch.rand(x.shape, dtype=compute_dtype(x.dtype), device=x.device) * 4 + 0.05


def assert_near(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    """To a few units of rounding of numbers as large as ``scale``, and what the dtype of ``got`` rounds."""
    compute, stored = torch.finfo(compute_dtype(got.dtype)), torch.finfo(got.dtype)
    error = (got.double().cpu() - want.cpu()).abs()
    allowed = 4 * compute.eps * scale + (stored.eps * want.cpu() if stored.bits == 16 else 0.0) + stored.tiny
    assert (error <= allowed).all(), f"{float((error - allowed).max()):.3g} beyond what rounding allows"


# --- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
@pytest.mark.parametrize("total", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("length", [*range(1, 18), 64, 65])
def test_exact(length: int, total: float, weighted: bool, dtype: torch.dtype) -> None:
    x = torch.randn(6, length, device=DEVICE).mul(torch.logspace(-2, 2, 6, device=DEVICE)[:, None]).to(dtype)
    weight = weights_like(x) if weighted else None
    y = co.project_simplex(x, total=total, weight=weight)
    assert y.dtype == dtype and (y >= 0).all()
    for i, row in enumerate(x):
        assert_near(y[i], exact(row, None if weight is None else weight[i], total), total + float(row.abs().max()))


ROWS = {
    "normal": lambda shape: torch.randn(shape),
    "wide": lambda shape: torch.randn(shape) * 1e3,
    "narrow": lambda shape: 5 + torch.randn(shape) * 1e-7,
    "equal": lambda shape: torch.full(shape, 5.0),
    "heavy": lambda shape: torch.rand(shape).pow(-2).neg(),
    "ramp": lambda shape: torch.linspace(-3, 3, shape[-1]).expand(shape),
    "powers": lambda shape: -torch.logspace(-30, 30, shape[-1], base=2.0).expand(shape),
    "few": lambda shape: torch.randint(0, 3, shape).float() / 4,
}


@pytest.mark.parametrize("length", [4, 5, 32, 33, 63, 64, 65, 1024, 1025, 65536, 1_000_000])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_sums_and_values_of_rows_of_any_length(rows: str, length: int, weighted: bool) -> None:
    x = ROWS[rows]((2, length)).to(DEVICE)
    weight = weights_like(x) if weighted else torch.ones_like(x)
    y = co.project_simplex(x, weight=weight if weighted else None)
    assert ((y.double().sum(-1) - 1).abs() <= 1e-6).all()
    assert_near(y, by_sorting(x, weight, 1.0), 1.0 + float((x.abs() * (y > 0)).max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_optimality(dtype: torch.dtype, weighted: bool) -> None:
    """The conditions of Karush, Kuhn and Tucker: one multiplier for all of the support, none larger outside."""
    x = (torch.randn(50, 40, device=DEVICE) * 0.4).to(dtype)
    weight = weights_like(x) if weighted else torch.ones_like(x, dtype=compute_dtype(dtype))
    y = co.project_simplex(x, weight=weight if weighted else None).double()
    pull = weight.double() * (x.double() - y)
    multiplier = torch.where(y > 0, pull, -INF).amax(-1, keepdim=True)
    slack = 8 * torch.finfo(dtype).eps * weight.double()
    assert (y >= 0).all()
    assert ((y.sum(-1) - 1).abs() <= (1e-6 if dtype in (F32, F64) else torch.finfo(dtype).eps)).all()
    assert ((pull - multiplier).abs() <= slack)[y > 0].all()
    assert (pull <= multiplier + slack)[y == 0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_a_point_of_the_simplex_stays(dtype: torch.dtype, weighted: bool) -> None:
    for total in (1.0, 8.0):
        x = torch.randn(20, 30, device=DEVICE).relu().double()
        x = (total * x / x.sum(-1, keepdim=True)).to(dtype)
        weight = weights_like(x) if weighted else None
        once = co.project_simplex(x, total=total, weight=weight)
        twice = co.project_simplex(once, total=total, weight=weight)
        eps = torch.finfo(dtype).eps
        assert ((once - x).abs() <= 2 * eps * total).all()
        assert ((twice - once).abs() <= 2 * eps * total).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [4, 70, 9000])
def test_corners_and_ties_are_exact(length: int, dtype: torch.dtype) -> None:
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 3, 2]), length).to(dtype).to(DEVICE)
    assert torch.equal(co.project_simplex(one_hot), one_hot)
    assert torch.equal(co.project_simplex(5 * one_hot), one_hot)
    tied = torch.full((2, length), -7.0, dtype=dtype, device=DEVICE)
    tied[:, :4] = 3.0
    want = torch.zeros_like(tied)
    want[:, :4] = 0.25
    assert torch.equal(co.project_simplex(tied), want)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("exponent", [4, 8, 20, 37])
@pytest.mark.parametrize("length", [6, 100, 70_000])
def test_huge_numbers(length: int, exponent: int, dtype: torch.dtype) -> None:
    huge = 10.0**exponent
    x = torch.randn(3, length, device=DEVICE).to(dtype).clamp(-2, 2) * huge
    x[1, :3] = 2.5 * huge  # three tied
    x[2] = -huge
    x[2, 1] = -huge * (1 - torch.finfo(dtype).eps)
    y = co.project_simplex(x)
    assert torch.equal(y.sum(-1), torch.ones(3, dtype=dtype, device=DEVICE)) or length > 100
    assert_near(y, by_sorting(x - x.amax(-1, keepdim=True), torch.ones_like(x), 1.0))
    y = co.project_simplex(x, weight=weights_like(x))
    assert ((y.double().sum(-1) - 1).abs() <= 1e-6).all() or huge * torch.finfo(dtype).eps ** 2 > 1e-7


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 6, 8, 9, 33, 70, 300])
def test_huge_numbers_with_weights_leave_a_point_of_the_simplex(length: int, dtype: torch.dtype) -> None:
    """As far as a sum of two numbers says where lambda is. Rows give the same whatever lies beside them."""
    top = (14 if dtype == F32 else 28) - (4 if _library._backend == "reference" else 0)  # which takes fewer steps
    exponents = torch.linspace(4, top, 11, dtype=torch.float64)
    x = (torch.randn(11, length, dtype=torch.float64) * 10 ** exponents[:, None]).to(dtype).to(DEVICE)
    for weight in (torch.ones_like(x), weights_like(x)):
        y = co.project_simplex(x, weight=weight)
        assert (y >= 0).all()
        assert ((y.double().sum(-1) - 1).abs() <= 1e-6).all()
    alone = torch.cat([co.project_simplex(row[None], weight=d[None]) for row, d in zip(x, weight, strict=True)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [4, 70, 20_000])
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_masks_infinities_and_nan(length: int, weighted: bool, dtype: torch.dtype) -> None:
    x = torch.randn(6, length, device=DEVICE).to(dtype)
    x[0, 1] = NAN
    x[1, 2] = INF
    x[2] = -INF
    x[3, 1:] = -INF
    x[4, : length // 2] = -INF
    weight = weights_like(x) if weighted else None
    y = co.project_simplex(x, weight=weight)
    assert y[:3].isnan().all() and y[3:].isfinite().all()
    assert y[3, 0] == 1 and (y[3, 1:] == 0).all() and (y[4, : length // 2] == 0).all()
    rest = slice(length // 2, None)
    alone = co.project_simplex(x[4, rest], weight=None if weight is None else weight[4, rest])
    assert_near(y[4, rest], alone.double(), 8.0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
@pytest.mark.parametrize("length", [*range(1, 26), 31, 48, 100, 255, 256, 257])
def test_rows_side_by_side(length: int, weighted: bool, dtype: torch.dtype) -> None:
    """Of small, large and no support, with a NaN anywhere: each as if it were alone, or beside its like."""
    x = (torch.randn(70, length) * torch.logspace(-3, 2, 70)[:, None]).to(dtype).to(DEVICE)
    places = list(range(0, length, 1 + length // 20))
    x[[3 * i % 70 for i in range(len(places))], places] = NAN
    x[1, length // 2 :] = -INF
    weight = weights_like(x) if weighted else torch.ones_like(x)
    y = co.project_simplex(x, weight=weight if weighted else None)
    bad = x.isnan().any(-1) | (x == -INF).all(-1)
    assert y[bad].isnan().all()
    assert_near(y[~bad], by_sorting(x[~bad], weight[~bad], 1.0), float(x[~bad].clamp(min=-1).abs().max()))
    for i in range(0, 70, 9):
        for copies in (1, 70):
            row, d = x[i].repeat(copies, 1), weight[i].repeat(copies, 1)
            same = co.project_simplex(row, weight=d if weighted else None)
            torch.testing.assert_close(same, y[i].expand_as(same), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [0.0, -1.0, INF, NAN, 1e-310])
@pytest.mark.parametrize("length", [3, 70, 20_000])
def test_a_bad_weight_makes_nan_of_its_row(length: int, bad: float) -> None:
    x = torch.randn(3, length, dtype=F64, device=DEVICE)
    weight = weights_like(x)
    weight[1, length - 1] = bad
    y = co.project_simplex(x, weight=weight)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_only_ratios_of_weights_matter() -> None:
    x = torch.randn(20, 7, dtype=F64, device=DEVICE)
    weight = weights_like(x)
    y = co.project_simplex(x, weight=weight)
    for scale in (1e-8, 1e6):
        torch.testing.assert_close(co.project_simplex(x, weight=scale * weight), y, rtol=0, atol=1e-14)
    constant = torch.tensor(0.3, dtype=F64, device=DEVICE)
    torch.testing.assert_close(co.project_simplex(x, weight=constant), co.project_simplex(x), rtol=0, atol=1e-14)


def test_weights_of_many_magnitudes() -> None:
    """As Adam makes them: from epsilon to the size of a gradient."""
    x = torch.rand(200, 12, device=DEVICE)
    x = x / x.sum(-1, keepdim=True) + 0.02 * torch.randn_like(x)
    weight = 10.0 ** (torch.rand_like(x) * 8 - 8)
    y = co.project_simplex(x, weight=weight)
    assert ((y.double().sum(-1) - 1).abs() <= 1e-6).all()
    assert_near(y, by_sorting(x, weight, 1.0), 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [*range(1, 17), 300])
def test_sums_in_16_bits_are_off_by_the_rounding_of_elements_alone(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(15_000 // length, length, device=DEVICE).mul(0.05).to(dtype)
    for weight in (None, weights_like(x)):
        y = co.project_simplex(x, weight=weight)
        wide = co.project_simplex(x.float(), weight=weight)
        assert torch.equal(y, wide.to(dtype))
        assert ((y.double().sum(-1) - 1).abs() <= torch.finfo(dtype).eps / 2).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
def test_dimensions_and_strides(dim: int, weighted: bool) -> None:
    values = torch.randn(5, 7, 6, device=DEVICE)
    spacious = torch.zeros(5, 7, 13, device=DEVICE)
    spacious[..., 1::2] = values
    weight = weights_like(values)[:, :1] if weighted else None
    last = None if weight is None else weight.movedim(dim, -1)
    want = co.project_simplex(values.movedim(dim, -1).contiguous(), weight=last)
    for x in (
        values,
        values.transpose(0, 2).contiguous().transpose(0, 2),
        spacious[..., 1::2],
        values[:1].expand(5, 7, 6),
    ):
        y = co.project_simplex(x, dim, weight=weight)
        if _library._backend is None:  # operators promise a layout, formulas do not
            assert y.stride() == torch.empty_like(x).stride()
        if x.stride(0):
            torch.testing.assert_close(y.movedim(dim, -1), want, rtol=0, atol=2e-6)
        torch.testing.assert_close(y.sum(dim), torch.ones_like(y.sum(dim)))


@pytest.mark.parametrize("length", [40, 200, 1030])
@pytest.mark.parametrize("weighted", [False, True], ids=["euclidean", "weighted"])
@pytest.mark.parametrize("total", [1.0, 30.0])
def test_longer_rows_along_the_middle(length: int, weighted: bool, total: float) -> None:
    x = torch.randn(2, length, 35, device=DEVICE)
    weight = weights_like(x) if weighted else torch.ones_like(x)
    y = co.project_simplex(x, 1, total=total, weight=weight if weighted else None)
    want = by_sorting(x.movedim(1, -1), weight.movedim(1, -1), total).movedim(-1, 1)
    assert ((y.double() - want).abs() <= 4e-6 * (1 + want)).all()


def test_shapes_without_much_in_them() -> None:
    for weight in (None, torch.tensor(2.0, device=DEVICE)):
        for shape in ((0,), (0, 3), (2, 0, 3)):
            if shape[-1]:
                assert co.project_simplex(torch.empty(shape, device=DEVICE), weight=weight).shape == shape
        x = torch.tensor(-4.0, device=DEVICE, requires_grad=True)
        y = co.project_simplex(x, 0, total=3, weight=weight)
        assert y.item() == 3.0 and y.shape == ()
        assert grad(y, x)[0].item() == 0.0
        assert torch.equal(co.project_simplex(x.detach().expand(4, 1), weight=weight), torch.ones(4, 1, device=DEVICE))


# --- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0.0, -1.0, INF, NAN, 1e39, 1e-46])
def test_a_total_that_cannot_be_is_a_value_error(total: float) -> None:
    with pytest.raises(ValueError, match=f"^project_simplex: total must be .*, got total={re.escape(str(total))}$"):
        co.project_simplex(torch.zeros(3), total=total)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"^project_simplex: x must be float16, .*, got torch\.int64$"):
        co.project_simplex(x.long())
    with pytest.raises(TypeError, match=r"^project_simplex: x must be a Tensor, got list$"):
        co.project_simplex([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^project_simplex: total must be a float, got str$"):
        co.project_simplex(x, total="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^project_simplex: weight must be a Tensor or None, got float$"):
        co.project_simplex(x, weight=2.0)  # type: ignore[arg-type]
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"^project_simplex: weight must be real, got dtype {dtype}$"):
            co.project_simplex(x, weight=torch.ones(3, dtype=dtype))
    with pytest.raises(ValueError, match=r"^project_simplex: weight must broadcast .* \(2,\), x \(2, 3\)$"):
        co.project_simplex(x, weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"^project_simplex: weight is on meta, x on cpu$"):
        co.project_simplex(x, weight=torch.ones(3, device="meta"))
    with pytest.raises(IndexError, match=r"^project_simplex: dim must be from -2 to 1 for x .*, got 2$"):
        co.project_simplex(x, 2)
    with pytest.raises(ValueError, match=r"^project_simplex: x needs at least one element along dim 1"):
        co.project_simplex(torch.zeros(2, 0))
