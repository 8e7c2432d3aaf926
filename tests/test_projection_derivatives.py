"""Derivatives of the projection onto the simplex, and the projection in torch.func, compilers and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from test_projection import F32, F64, INF, NAN, weights_like
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import constrained_ops as co
from constrained_ops import _library

pytestmark = pytest.mark.usefixtures("implementation")


def loss(y: Tensor) -> Tensor:
    return (y * torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape).sin()).square().sum()


# --- Derivatives ---------------------------------------------------------------------------------------------------


def leaves(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=F64, device=DEVICE, requires_grad=True)
    return x, weights_like(x.detach()).requires_grad_()


@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives(dim: int) -> None:
    def function(x: Tensor) -> Tensor:
        return co.project_simplex(x, dim, total=2.0)

    x, _ = leaves(4, 6)
    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("wanted", ["x", "weight", "both"])
def test_derivatives_with_a_weight(wanted: str) -> None:
    x, weight = leaves(4, 6)
    weight = weight.detach()[:1].clone().requires_grad_()  # one for all rows: gradients add up

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return co.project_simplex(x, total=2.0, weight=weight)

    arguments = (x if wanted != "weight" else x.detach(), weight if wanted != "x" else weight.detach())
    assert gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, arguments, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_third_order_with_a_weight() -> None:
    x, weight = leaves(3, 5)

    def slope(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = co.project_simplex(x, weight=weight)
        return grad(
            (y * torch.arange(15.0, dtype=F64, device=DEVICE).view(3, 5).cos()).sum(), (x, weight), create_graph=True
        )

    assert gradgradcheck(slope, (x, weight))


def test_the_gradient_is_that_of_the_formula() -> None:
    """x - lambda / weight on the support, differentiated by PyTorch."""
    x, weight = leaves(30, 12)
    y = co.project_simplex(x, weight=weight)
    inside = y.detach() > 0
    assert 1 < inside.sum(-1).double().mean() < 11
    u = torch.where(inside, 1 / weight, 0.0)
    multiplier = (torch.where(inside, x, 0.0).sum(-1, keepdim=True) - 1) / u.sum(-1, keepdim=True)
    plain = torch.where(inside, x - multiplier * u, 0.0)
    g = torch.randn_like(x)
    for got, want in zip(grad(y, (x, weight), g), grad(plain, (x, weight), g), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [5, 64, 300, 70_000])
def test_gradients_in_other_dtypes(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, length, device=DEVICE).mul(0.1).to(dtype).requires_grad_()
    g = torch.randn(4, length, device=DEVICE).to(dtype)
    y = co.project_simplex(x)
    (got,) = grad(y, x, g)
    inside = (y > 0).double()
    want = inside * (g.double() - (inside * g.double()).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True))
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(F32).eps)
    assert got.dtype == dtype


def test_gradients_of_masked_and_nan_rows() -> None:
    x = torch.tensor([[-INF, 0.4, 0.1], [NAN, 0.0, 1.0]], device=DEVICE, requires_grad=True)
    y = co.project_simplex(x)
    (got,) = grad(y, x, torch.tensor([[INF, 1.0, 2.0], [NAN, 1.0, 1.0]], device=DEVICE))
    assert got[0].tolist() == [0.0, -0.5, 0.5]  # what comes from outside the support is not looked at
    assert got[1].isnan().all()


def test_what_is_kept_for_backward() -> None:
    x, weight = (t.detach().clone() for t in leaves(4, 8))
    for x_wants, weight_wants in ((True, False), (True, True), (False, True)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            leaf_x, leaf_weight = x.clone().requires_grad_(x_wants), weight.clone().requires_grad_(weight_wants)
            y = co.project_simplex(leaf_x, weight=leaf_weight)
        names = {leaf_x.data_ptr(): "x", leaf_weight.data_ptr(): "weight", y.data_ptr(): "y"}
        assert {names[t.data_ptr()] for t in kept} == {"y", "weight"} | ({"x"} if weight_wants else set())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = co.project_simplex(x.requires_grad_())
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


# --- At home in PyTorch --------------------------------------------------------------------------------------------


def test_func_transforms() -> None:
    x, weight = (t.detach() for t in leaves(3, 4))
    for function, argument in (
        (lambda x: co.project_simplex(x, 0), x),
        (lambda x: co.project_simplex(x, weight=weight), x),
        (lambda w: co.project_simplex(x, weight=w), weight),
    ):
        jacobians = [jac(function)(argument) for jac in (torch.func.jacrev, torch.func.jacfwd)]
        torch.testing.assert_close(*jacobians)
        leaf = argument.clone().requires_grad_()
        torch.testing.assert_close(
            torch.func.grad(lambda a, f=function: loss(f(a)))(argument), grad(loss(function(leaf)), leaf)[0]
        )
        scalar = lambda a, f=function: loss(f(a))  # noqa: E731
        hessians = [torch.func.hessian(scalar)(argument), torch.func.jacrev(torch.func.jacrev(scalar))(argument)]
        torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(in_dim: int) -> None:
    xs, weights = (t.detach() for t in leaves(2, 3, 4))
    moved, moved_weights = xs.movedim(0, in_dim), weights.movedim(0, in_dim)

    def of(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return co.project_simplex(x, 0, weight=weight)

    torch.testing.assert_close(torch.func.vmap(of, in_dims=in_dim)(moved), torch.stack([of(x) for x in xs]))
    pairs = torch.func.vmap(of, in_dims=in_dim)(moved, moved_weights)
    torch.testing.assert_close(pairs, torch.stack([of(x, w) for x, w in zip(xs, weights, strict=True)]))
    shared = torch.func.vmap(of, in_dims=(in_dim, None))(moved, weights[0])
    torch.testing.assert_close(shared, torch.stack([of(x, weights[0]) for x in xs]))
    slopes = torch.func.grad(lambda x, w: loss(of(x, w)), argnums=(0, 1))
    wanted = zip(*(slopes(*pair) for pair in zip(xs, weights, strict=True)), strict=True)
    batched = torch.func.vmap(slopes, in_dims=in_dim)(moved, moved_weights)
    for got, want in zip(batched, wanted, strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    zero_dim = torch.func.vmap(lambda x: co.project_simplex(x, 0))(torch.randn(5, device=DEVICE))
    assert torch.equal(zero_dim, torch.ones(5, device=DEVICE))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    x, weight = leaves(5, 9)

    def function(x: Tensor, weight: Tensor, total: float) -> tuple[Tensor, Tensor]:
        return co.project_simplex(x * 2, 0, total=total) + 1, co.project_simplex(x, weight=weight)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for total in (1.0, 2.0, 3.5):
        outcomes = []
        for f in (compiled, function):
            y, z = f(x, weight, total)
            outcomes.append((y, z, *grad(loss(y) + loss(z), (x, weight))))
        for got, want in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, want)


def test_autocast_checkpoint_and_meta() -> None:
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    plain = co.project_simplex(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(co.project_simplex(x), plain)
    again = torch.utils.checkpoint.checkpoint(co.project_simplex, x, use_reentrant=False)
    torch.testing.assert_close(grad(loss(again), x), grad(loss(plain), x))
    meta = torch.empty(2, 3, device="meta")
    assert co.project_simplex(meta).shape == co.project_simplex(meta, weight=meta).shape == (2, 3)


def arguments_of(kernel: str) -> tuple[Any, ...]:
    x = torch.randn(3, 4, device=DEVICE)
    values = {"dim": 1, "total": 1.0, "needed": -1, "weight": weights_like(x), "y": co.project_simplex(x), "x": x}
    names = [argument.name for argument in _library.overload("projection", kernel)._schema.arguments]
    return tuple(values.get(name, x) for name in names)


@pytest.mark.parametrize("kernel", _library.PROJECTION)
def test_opcheck(kernel: str) -> None:
    operator, arguments = _library.overload("projection", kernel), arguments_of(kernel)
    torch.library.opcheck(operator, arguments)
    torch.library.opcheck(operator, tuple(a.t().contiguous().t() if isinstance(a, Tensor) else a for a in arguments))
    if kernel == "backward.weighted":
        grad_y, _, y, weight, dim, _ = arguments
        torch.library.opcheck(operator, (grad_y, None, y, weight, dim, 1))
        torch.library.opcheck(operator, (*arguments[:-1], 2))
