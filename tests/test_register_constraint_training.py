"""Constrained modules in training: optimizers, autocast, compilers, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from constrained_modules import CONSTRAINTS, UNIT, constrained, layer, train
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import parametrize

import constrained_ops as co

# --- Optimizers -------------------------------------------------------------------------------------------------------

ADAMS = [torch.optim.Adam, co.optim.ReparametrizedAdam, co.optim.ProjectedAdam]


@pytest.mark.parametrize("kind", ADAMS)
def test_an_optimizer_made_before_or_after(kind: Any) -> None:
    before, after = layer(), layer()
    early = kind(before.parameters(), lr=0.1)
    for module in (before, after):
        co.register_constraint(module, "weight", UNIT)
    late = kind(after.parameters(), lr=0.1)
    for module, optimizer in ((before, early), (after, late)):
        train(module, optimizer, 50)
    assert torch.equal(before.weight, after.weight)
    torch.testing.assert_close(before.weight, torch.full((3, 3), 0.9), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ADAMS)
def test_an_optimizer_in_use_follows_registration_and_removal(kind: Any) -> None:
    """Its parameter changes its memory under it, twice."""
    ours, theirs = layer(), layer()
    optimizers = [kind(ours.parameters(), lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1)]
    for change in (
        lambda module: module,
        lambda module: co.register_constraint(module, "weight", constraints.interval(0.0, 2.0)),
        lambda module: parametrize.remove_parametrizations(module, "weight"),
    ):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            train(change(module), optimizer)
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=1e-5)


def test_lbfgs_trains_it() -> None:
    module = constrained()
    optimizer = torch.optim.LBFGS([module.parametrizations.weight.original], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (module.weight - 0.9).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.9), atol=1e-3, rtol=0)


# --- Autocast, compilers, torch.func ----------------------------------------------------------------------------------

SOME = ["interval", "tensors", "positive", "Positive", "simplex"]
some = pytest.mark.parametrize(("constraint", "shown", "value"), [CONSTRAINTS[name] for name in SOME], ids=SOME)


@some
def test_autocast(constraint: Any, shown: str, value: Tensor) -> None:
    """As for a plain layer of the same weight: the product is rounded, the weight and its gradient are not."""
    module = constrained(constraint, value)
    plain = layer(module.weight.detach())
    plain.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})
    x = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each(x) for each in (module, plain)]
        assert module.weight.dtype == torch.float32
        for y in outputs:
            y.float().square().sum().backward()
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    raw = module.parametrizations.weight.original
    (expected,) = torch.autograd.grad(module.weight, raw, plain.weight.grad)
    assert raw.grad.dtype == torch.float32
    torch.testing.assert_close(raw.grad, expected)


@some
def test_compile_in_one_graph(constraint: Any, shown: str, value: Tensor) -> None:
    torch._dynamo.reset()
    module, x = constrained(constraint, value), torch.randn(4, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outcomes = []
    for each in (module, compiled):
        module.zero_grad()
        y = each(x)
        y.square().sum().backward()
        outcomes.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [True, False])
@some
def test_export(constraint: Any, shown: str, value: Tensor, strict: bool) -> None:
    module, x = constrained(constraint, value), torch.randn(4, 3)
    exported = torch.export.export(module, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), module(x))
    with torch.no_grad():
        module.parametrizations.weight.original.zero_()
    again = exported.module()
    again.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(again(x), module(x))


def test_functional_call_takes_raws_from_outside() -> None:
    module, x = constrained(), torch.randn(4, 3)
    raws = torch.randn(5, 3, 3)

    def loss(raw: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"parametrizations.weight.original": raw}, x).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(raws)
    for raw, grad in zip(raws, grads, strict=True):
        leaf = raw.clone().requires_grad_()
        weight = co.bounded(leaf, 0.0, 1.0)
        (expected,) = torch.autograd.grad(nn.functional.linear(x, weight, module.bias.detach()).square().sum(), leaf)
        torch.testing.assert_close(grad, expected)
