"""The kinds of simplex that are bijections: against mpmath, autograd's Jacobian and torch.distributions."""

from __future__ import annotations

import functools
import math

import mpmath
import oracle
import pytest
import torch
from conftest import DEVICE
from oracle import assert_within, smallest_subnormal
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co

DEVICES = list(dict.fromkeys(["cpu", DEVICE]))
EXACT = [torch.float32, torch.float64]
DTYPES = [*EXACT, torch.float16, torch.bfloat16]
kinds = pytest.mark.parametrize("kind", ["ilr", "stick_breaking"])


# --- Log-determinants ------------------------------------------------------------------------------------------------


@kinds
def test_log_det_is_that_of_autograds_jacobian(kind: str) -> None:
    for size in range(2, 65):
        raw = torch.randn(size - 1, dtype=torch.float64, device=DEVICE) * 2
        _, log_det = co.simplex(raw, kind=kind, return_log_det=True)
        jacobian = torch.autograd.functional.jacobian(lambda r: co.simplex(r, kind=kind)[:-1], raw)
        _, want = torch.linalg.slogdet(jacobian)
        torch.testing.assert_close(log_det, want, rtol=1e-12, atol=1e-11)


@kinds
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("size", [1000, 20_000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_long_rows(kind: str, size: int, dtype: torch.dtype, scale: float) -> None:
    raw = (torch.randn(size - 1, generator=torch.Generator().manual_seed(size)) * scale).to(dtype)
    x, log_det = co.simplex(raw.to(DEVICE), kind=kind, return_log_det=True)
    want, want_log_det = long_truth(kind, size, dtype, scale)
    # float32 adds up in something wider, or in trees; the logarithms of x in float64 carry the rounding of long sums.
    rounding = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * (24 + want.log().abs())
    assert_within(x, want, want * rounding + smallest_subnormal(dtype), torch.arange(size))
    assert_within(log_det, want_log_det, 8 * torch.finfo(dtype).eps * want_log_det.abs(), torch.zeros(()))


@functools.cache
def long_truth(kind: str, size: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    raw = (torch.randn(size - 1, generator=torch.Generator().manual_seed(size)) * scale).to(dtype)
    with mpmath.workdps(30):
        log_x = oracle.log_simplex(kind, raw)
        constant = mpmath.log(size) / 2 if kind == "ilr" else 0
        numbers = [float(mpmath.exp(v)) for v in log_x], float(constant + mpmath.fsum(log_x))
    return torch.tensor(numbers[0], dtype=torch.float64), torch.tensor(numbers[1], dtype=torch.float64)


# --- All orders ------------------------------------------------------------------------------------------------------

ROWS = {
    "two": torch.tensor([0.7]),
    "zeros": torch.zeros(6),
    "random": torch.randn(32, generator=torch.Generator().manual_seed(1)),
    "wide": torch.randn(19, generator=torch.Generator().manual_seed(2)) * 8,
    "front": torch.tensor([20.0, 0.5, -0.5, 1.0]),
    "back": torch.tensor([-20.0, -20.0, -20.0, -20.0]),
    "signs": torch.tensor([-20.0, 20.0, -20.0, 20.0, 1.0]),
    "long": torch.randn(79, generator=torch.Generator().manual_seed(3)) * 2,
}


@functools.cache
def row(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, Tensor]:
    """raw, gradients of x and log_det, and a direction."""
    raw, generator = ROWS[name].to(dtype), torch.Generator().manual_seed(4)
    g, along = (torch.randn(n, generator=generator).to(dtype) for n in (len(raw) + 1, len(raw)))
    return raw, g, 0.375, along


@functools.cache
def truth_of(kind: str, name: str, dtype: torch.dtype) -> oracle.BijectionTruth:
    return oracle.bijection(kind, *row(name, dtype))


@kinds
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("dim", [1, 0], ids=["along rows", "along columns"])
@pytest.mark.parametrize("name", ROWS)
def test_all_orders(kind: str, name: str, dim: int, dtype: torch.dtype, device: str) -> None:
    (raw, g, h, along), truth = row(name, dtype), truth_of(kind, name, dtype)

    def batch(t: Tensor) -> Tensor:  # the row among others
        rows = torch.stack([t.flip(0), t, -t])
        return (rows if dim == 1 else rows.T.contiguous()).to(device)

    def middle(t: Tensor) -> Tensor:
        return t.select(1 - dim, 1)

    raw_batch, g_batch = batch(raw).requires_grad_(), batch(g).requires_grad_()
    h_batch = torch.full((3,), h, dtype=dtype, device=device, requires_grad=True)
    results = co.simplex(raw_batch, dim, kind=kind, return_log_det=True)
    (grad_raw,) = grad(results, raw_batch, (g_batch, h_batch), create_graph=True)
    for_raw, for_g, for_h = grad(grad_raw, (raw_batch, g_batch, h_batch), batch(along))

    eps = torch.finfo(dtype).eps
    of_x = eps * (8 + truth.log_x.abs() + raw.double().abs().max() / 2)  # logits are rounded where they are large
    shared, least = of_x[truth.x > 1e-3].max() + 8 * eps, 2 * smallest_subnormal(dtype)
    assert_within(middle(results[0]), truth.x, truth.x * of_x + least, g)
    assert_within(results[1][1], truth.log_det, 8 * eps * (truth.log_x.abs().sum() + 1), raw[:1])
    for got, want, scale, where in (
        (middle(grad_raw), truth.grad_raw, truth.grad_raw_scale, raw),
        (middle(for_g), truth.for_grad_x, truth.for_grad_x_scale, g),
        (for_h[1], truth.for_grad_log_det, truth.for_grad_log_det_scale, raw[:1]),
        (middle(for_raw), truth.for_raw, truth.for_raw_scale, raw),
    ):
        assert_within(got, want, scale * shared + least, where)


@kinds
@pytest.mark.parametrize("shape", [(5, 2), (7, 20), (3, 300), (2, 16, 3)], ids=str)
def test_gradients_that_are_equal_along_a_row_give_exactly_none(kind: str, shape: tuple[int, ...]) -> None:
    raw = torch.randn(shape, device=DEVICE, requires_grad=True)
    x = co.simplex(raw, 1, kind=kind)
    (grad_raw,) = grad(x, raw, torch.randn_like(x[:, :1]).expand(x.shape))
    assert (grad_raw == 0).all()


# --- Each kind against what it is named after ------------------------------------------------------------------------


def test_ilr_preserves_distances() -> None:
    raw, other = torch.randn(2, 4, 9, dtype=torch.float64, device=DEVICE)

    def centred_log(r: Tensor) -> Tensor:
        log_x = co.simplex(r, kind="ilr").log()
        return log_x - log_x.mean(-1, keepdim=True)

    between = (centred_log(raw) - centred_log(other)).norm(dim=-1)
    torch.testing.assert_close(between, (raw - other).norm(dim=-1), rtol=1e-12, atol=0)


@kinds
def test_zero_gives_equal_parts(kind: str) -> None:
    x = co.simplex(torch.zeros(3, 6, device=DEVICE), 0, kind=kind)
    torch.testing.assert_close(x, torch.full((4, 6), 0.25, device=DEVICE), rtol=1e-6, atol=0)


def test_stick_breaking_is_the_map_of_torch_distributions() -> None:
    transform, raw = torch.distributions.StickBreakingTransform(), torch.randn(5, 12, dtype=torch.float64)
    x, log_det = co.simplex(raw.to(DEVICE), kind="stick_breaking", return_log_det=True)
    torch.testing.assert_close(x.cpu(), transform(raw), rtol=1e-12, atol=0)
    torch.testing.assert_close(log_det.cpu(), transform.log_abs_det_jacobian(raw, x.cpu()), rtol=1e-12, atol=0)
    torch.testing.assert_close(co.simplex_inverse(x, kind="stick_breaking").cpu(), raw, rtol=1e-12, atol=1e-12)


# --- Far out ---------------------------------------------------------------------------------------------------------


def far_out(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """raw of -20 and 20: all, one after the other, and as a single one at the end."""
    low, signs = torch.full((size - 1,), -20.0, dtype=dtype), torch.ones(size - 1, dtype=dtype)
    signs[::2] = -1
    single = low.clone()
    single[-1] = 20
    return {"low": low, "high": -low, "in turns": 20 * signs, "single": single}


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("size", [2, 3, 10, 100, 1000])
def test_stick_breaking_far_out_is_finite_and_invertible(size: int, dtype: torch.dtype) -> None:
    for raw in far_out(size, dtype).values():
        x, log_det = co.simplex(raw.to(DEVICE), kind="stick_breaking", return_log_det=True)
        assert (x > 0).all() and x.sum() <= 1 + size * torch.finfo(dtype).eps
        with mpmath.workdps(30):
            log_x = oracle.log_simplex("stick_breaking", raw)
            want, want_log_det = [float(mpmath.exp(v)) for v in log_x], float(mpmath.fsum(log_x))
        want_x = torch.tensor(want, dtype=torch.float64)
        eps, least = torch.finfo(dtype).eps, smallest_subnormal(dtype)
        tolerance = want_x * (eps * (8 + 4 * torch.tensor([float(v) for v in log_x]).abs())) + least
        assert_within(x, want_x, tolerance, torch.arange(size))
        assert log_det.isfinite() and abs(log_det.item() / want_log_det - 1) < 4 * eps
        back = co.simplex_inverse(x, kind="stick_breaking").cpu()
        assert back.isfinite().all()
        # Where x and what is left after it are normal numbers they tell what raw was.
        left = want_x.flip(0).cumsum(0).flip(0)[1:]
        told = torch.minimum(want_x[:-1], left) > torch.finfo(dtype).smallest_normal
        assert told[0]
        error = (back - raw).abs()[told]
        assert error.max() <= 200 * eps * max(1.0, -math.log(float(left[told].min())) / 20)
        torch.testing.assert_close(co.simplex(back, kind="stick_breaking"), x.cpu(), rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("size", [2, 10, 1000])
def test_torch_distributions_is_not(size: int) -> None:
    """In float32 its clipped sigmoid turns 20 into 16 at best, and what follows into nothing."""
    raw = far_out(size, torch.float32)["single"]
    transform = torch.distributions.StickBreakingTransform()
    x = transform(raw)
    assert not (transform.inv(x) - raw).abs().max() < 1
    assert (co.simplex_inverse(co.simplex(raw, kind="stick_breaking"), kind="stick_breaking") - raw).abs().max() < 1e-4


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strictly_positive_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    big = min(1e4, torch.finfo(dtype).max / 4)
    rows = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 30.0], [big, -big, big], [-big, -big, -big]], device=DEVICE)
    rows = torch.cat([rows, rows.repeat(1, 40)[:, :3] * 0.01, torch.randn(200, 3, device=DEVICE) * 50]).to(dtype)
    for dim, raw in ((1, rows), (0, rows.T), (0, rows)):
        x, log_det = co.simplex(raw, dim, kind=kind, return_log_det=True)
        assert (x > 0).all()
        assert (x.double().sum(dim) - 1).abs().max() <= x.shape[dim] * torch.finfo(dtype).eps
        assert not log_det.isnan().any()
        (g,) = grad(co.simplex(r := raw.clone().requires_grad_(), dim, kind=kind).square().sum(), r)
        assert g.isfinite().all()


# --- Inverses --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_inverse(kind: str, dim: int, dtype: torch.dtype) -> None:
    raw = torch.randn(5, 7, device=DEVICE).to(dtype)
    x = co.simplex(raw, dim, kind=kind)
    back = co.simplex_inverse(x, dim, kind=kind)
    eps = torch.finfo(dtype).eps
    assert back.dtype == dtype and back.shape == raw.shape
    assert (back - raw).abs().max() <= 32 * eps
    torch.testing.assert_close(co.simplex(back, dim, kind=kind), x, rtol=16 * eps, atol=0)
    multiple = (0.5 * x).requires_grad_()
    torch.testing.assert_close(co.simplex_inverse(multiple, dim, kind=kind), back, rtol=0, atol=32 * eps)


@kinds
def test_inverse_at_the_edges(kind: str) -> None:
    eps = torch.finfo(torch.float32).eps
    raw = co.simplex_inverse(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -eps / 2, 1.0 + eps]]), kind=kind)
    assert raw.isfinite().all()
    assert (co.simplex(raw, kind=kind) > 0).all()
    assert co.simplex_inverse(torch.tensor([-4 * eps, 0.5, 0.5]), kind=kind).isnan().any()


# --- Optimizers ------------------------------------------------------------------------------------------------------


@kinds
def test_optimizers_know_what_they_do_not_do(kind: str) -> None:
    weights = torch.full((3, 4), 0.25, requires_grad=True)
    with pytest.raises(NotImplementedError, match=f'^ReparametrizedAdam: .*"softmax" is supported, got kind "{kind}"$'):
        co.optim.ReparametrizedAdam([weights], constraint=co.Simplex(kind=kind))
    optimizer = co.optim.ReparametrizedAdam([weights])
    group = {"params": [torch.full((2,), 0.5, requires_grad=True)], "constraint": co.Simplex(kind=kind)}
    with pytest.raises(NotImplementedError, match="only the simplex of kind"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and not optimizer.state
    projected = co.optim.ProjectedAdam(
        [weights], constraint=co.Simplex(kind=kind)
    )  # to the same set, whatever leads there
    weights.square().sum().backward()
    projected.step()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
