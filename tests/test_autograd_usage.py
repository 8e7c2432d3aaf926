"""Autograd as people know it: each way of using it gives what it gives for the same formula in plain PyTorch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import constrained_ops as co

F64 = torch.float64
LOWER, UPPER = (torch.tensor(bound, dtype=F64, device=DEVICE) for bound in ([-1.0, 0.0, -2.0], [0.0, 5.0, 3.0]))


def sparsemax(x: Tensor) -> Tensor:
    """The projection onto the simplex by sorting (Martins and Astudillo 2016)."""
    ordered = x.sort(descending=True).values
    over = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    last = (ordered > over).sum(-1, keepdim=True) - 1
    return (x - over.gather(-1, last)).clamp(min=0)


Op = Callable[[Tensor], Tensor]
PAIRS: dict[str, tuple[Op, Op]] = {
    "bounded": (lambda raw: co.bounded(raw, -1.0, 2.0), lambda raw: -1 + 3 * torch.sigmoid(raw)),
    "bounded by tensors": (
        lambda raw: co.bounded(raw, LOWER, UPPER),
        lambda raw: LOWER + (UPPER - LOWER) * torch.sigmoid(raw),
    ),
    "positive": (lambda raw: co.positive(raw, 0.5), lambda raw: 0.5 + torch.nn.functional.softplus(raw)),
    "positive exp": (lambda raw: co.positive(raw, kind="exp"), torch.exp),
    "log_det": (
        lambda raw: co.positive(raw, return_log_det=True)[1],
        torch.nn.functional.logsigmoid,
    ),
    "simplex": (co.simplex, lambda raw: torch.softmax(raw, -1)),
    "projection": (co.project_simplex, sparsemax),
}
everywhere = pytest.mark.parametrize(("ours", "plain"), PAIRS.values(), ids=PAIRS)


def leaf() -> Tensor:
    """The same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, dtype=F64, generator=generator).to(DEVICE).requires_grad_()


def loss_of(x: Tensor) -> Tensor:
    return (x * torch.arange(1.0, 1 + x.numel(), dtype=F64, device=DEVICE).view(x.shape).sin()).sum()


def alike(ours: Op, plain: Op, use: Callable[[Op], Any]) -> Any:
    """What ``use`` of an operator gives is what it gives for plain PyTorch."""
    got, want = use(ours), use(plain)
    torch.testing.assert_close(got, want)
    return got


@everywhere
def test_backward_of_many_values_takes_their_gradient(ours: Op, plain: Op) -> None:
    weights = torch.randn(4, 3, dtype=F64, device=DEVICE)

    def use(function: Op) -> Tensor:
        raw = leaf()
        function(raw).backward(gradient=weights)
        return raw.grad  # type: ignore[return-value]

    alike(ours, plain, use)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        ours(leaf()).backward()


@everywhere
def test_backward_twice_needs_retain_graph_as_ever(ours: Op, plain: Op) -> None:
    def use(function: Op) -> list[Tensor]:
        raw = leaf()
        loss, seen = loss_of(function(raw)), []
        for _ in range(2):
            loss.backward(retain_graph=True)
            seen.append(raw.grad.clone())  # type: ignore[union-attr]
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        return [*seen, raw.grad]  # type: ignore[list-item]

    once, twice, three_times = alike(ours, plain, use)
    torch.testing.assert_close([twice, three_times], [2 * once, 3 * once])


@everywhere
def test_gradients_accumulate_over_parts_of_a_batch(ours: Op, plain: Op) -> None:
    batch = torch.randn(6, 3, dtype=F64, device=DEVICE)

    def use(function: Op) -> Tensor:
        raw = leaf()
        for part in batch.split(2):
            (function(raw) @ part.T).square().sum().backward()
        return raw.grad  # type: ignore[return-value]

    by_parts = alike(ours, plain, use)
    raw = leaf()
    (ours(raw) @ batch.T).square().sum().backward()
    torch.testing.assert_close(by_parts, raw.grad)


@everywhere
def test_requires_grad_on_and_off(ours: Op, plain: Op) -> None:
    raw = leaf()
    assert ours(raw).requires_grad
    raw.requires_grad_(False)
    x = ours(raw)
    assert not x.requires_grad and x.grad_fn is None
    x.requires_grad_()  # a leaf of its own now
    loss_of(x).backward()
    assert x.grad is not None and raw.grad is None
    raw.requires_grad_()
    loss_of(ours(raw)).backward()
    assert raw.grad is not None
    assert not ours(raw.detach()).requires_grad
    assert not ours(raw).detach().requires_grad


@everywhere
def test_retain_grad_of_the_result(ours: Op, plain: Op) -> None:
    def use(function: Op) -> list[Any]:
        raw = leaf()
        x = function(raw)
        x.retain_grad()
        loss_of(x).backward()
        return [x.grad, raw.grad]

    alike(ours, plain, use)


@everywhere
def test_hooks_on_tensors_see_and_change_gradients(ours: Op, plain: Op) -> None:
    def use(function: Op) -> list[Tensor]:
        raw, seen = leaf(), []
        x = function(raw)
        x.register_hook(lambda grad: seen.append(grad.clone()))
        x.register_hook(lambda grad: 2 * grad)
        removed = x.register_hook(lambda grad: 100 * grad)
        removed.remove()
        raw.register_hook(lambda grad: seen.append(grad.clone()))
        raw.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        raw.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
        loss_of(x).backward()
        assert len(seen) == 3
        return [*seen, raw.grad]  # type: ignore[list-item]

    alike(ours, plain, use)


@everywhere
def test_hooks_on_nodes_and_saved_tensors(ours: Op, plain: Op) -> None:
    def use(function: Op) -> list[Tensor]:
        raw, seen = leaf(), []
        with torch.autograd.graph.save_on_cpu():
            x = function(raw)
        x.grad_fn.register_prehook(  # type: ignore[union-attr]
            lambda grads: tuple(None if grad is None else 2 * grad for grad in grads)  # None: x beside a log-det
        )
        last = torch.autograd.graph.get_gradient_edge(raw).node
        last.register_prehook(lambda grads: seen.append(grads[0].clone()))
        loss_of(x).backward()
        return [*seen, raw.grad]  # type: ignore[list-item]

    alike(ours, plain, use)


def test_hooks_on_modules() -> None:
    module, seen = co.Bounded(-1.0, 2.0), []
    module.register_full_backward_hook(lambda _, grads_in, grads_out: seen.append((*grads_in, *grads_out)))
    module.register_forward_hook(lambda _, inputs, x: x + 1)
    raw = leaf()
    x = module(raw)
    torch.testing.assert_close(x, co.bounded(raw, -1.0, 2.0) + 1)
    loss_of(x).backward(retain_graph=True)
    ((grad_raw, grad_x),) = seen
    torch.testing.assert_close(grad_raw, raw.grad)
    torch.testing.assert_close(grad_x, torch.autograd.grad(loss_of(x), x)[0])


@everywhere
def test_anomaly_mode_changes_nothing(ours: Op, plain: Op) -> None:
    def use(function: Op) -> Tensor:
        raw = leaf()
        with torch.autograd.detect_anomaly(check_nan=True):
            loss_of(function(raw)).backward()
        return raw.grad  # type: ignore[return-value]

    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        alike(ours, plain, use)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "projection"])
def test_anomaly_mode_names_the_operator_that_gave_nan(name: str) -> None:
    ours, raw = PAIRS[name][0], leaf()
    with torch.no_grad():
        raw[0, 0] = math.nan
    with pytest.warns(UserWarning), torch.autograd.detect_anomaly():
        x = ours(raw)
        assert x[0, 0].isnan()
        node = type(x.grad_fn).__name__
        with pytest.raises(RuntimeError, match=f"Function '{node}' returned nan values"):
            x.nan_to_num().sum().backward()


@everywhere
def test_the_result_may_be_overwritten_where_nothing_needs_it(ours: Op, plain: Op) -> None:
    raw = leaf()
    with torch.no_grad():
        before = ours(raw)
    x = ours(raw)
    x.mul_(2).add_(1)
    torch.testing.assert_close(x, 2 * before + 1)
    if ours in (co.simplex, co.project_simplex):  # which keep their result for backward, as torch.softmax does
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(x).backward()
        return
    loss_of(x).backward()
    (expected,) = torch.autograd.grad(2 * loss_of(ours(raw)), raw)
    torch.testing.assert_close(raw.grad, expected)


# --- torch.autograd.grad and backward(inputs=...) ---------------------------------------------------------------------


def bounds() -> list[Tensor]:
    return [bound.clone().requires_grad_() for bound in (LOWER, UPPER)]


BY_BOUNDS: tuple[Any, Any] = (co.bounded, lambda raw, lower, upper: lower + (upper - lower) * torch.sigmoid(raw))


@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 2], [2, 1], [0, 1, 2]], ids=str)
def test_grad_for_some_inputs_only(asked: list[int]) -> None:
    def use(function: Any) -> list[Tensor]:
        inputs = [leaf(), *bounds()]
        grads = torch.autograd.grad(loss_of(function(*inputs)), [inputs[i] for i in asked])
        assert all(each.grad is None for each in inputs)
        return list(grads)

    alike(*BY_BOUNDS, use)


@pytest.mark.parametrize("asked", [[0], [1], [2, 0]], ids=str)
def test_backward_for_some_inputs_only(asked: list[int]) -> None:
    def use(function: Any) -> list[Any]:
        inputs = [leaf(), *bounds()]
        loss_of(function(*inputs)).backward(inputs=[inputs[i] for i in asked])
        assert [i for i in range(3) if inputs[i].grad is not None] == sorted(asked)
        return [inputs[i].grad for i in asked]

    alike(*BY_BOUNDS, use)


@everywhere
def test_grad_for_what_was_not_used(ours: Op, plain: Op) -> None:
    raw, other = leaf(), leaf()
    loss = loss_of(ours(raw))
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, [raw, other])
    loss = loss_of(ours(raw))
    grad, none = torch.autograd.grad(loss, [raw, other], allow_unused=True)
    assert none is None
    torch.testing.assert_close(grad, torch.autograd.grad(loss_of(ours(raw)), raw)[0])


@everywhere
def test_many_gradients_at_once(ours: Op, plain: Op) -> None:
    def use(function: Op) -> Tensor:
        raw = leaf()
        rows = torch.eye(12, dtype=F64, device=DEVICE).view(12, 4, 3)
        return torch.autograd.grad(function(raw), raw, rows, is_grads_batched=True)[0]

    alike(ours, plain, use)


@everywhere
def test_a_gradient_penalty(ours: Op, plain: Op) -> None:
    """The gradient's norm is part of the loss."""

    def use(function: Op) -> Tensor:
        raw = leaf()
        loss = loss_of(function(raw))
        (grad,) = torch.autograd.grad(loss, raw, create_graph=True)
        (loss + grad.square().sum()).backward()
        return raw.grad  # type: ignore[return-value]

    alike(ours, plain, use)


@everywhere
def test_what_is_used_twice_gets_both_gradients(ours: Op, plain: Op) -> None:
    def use(function: Op) -> Tensor:
        raw = leaf()
        x = function(raw)
        (loss_of(x) + x.square().sum() + loss_of(function(2 * raw))).backward()
        return raw.grad  # type: ignore[return-value]

    alike(ours, plain, use)


@everywhere
def test_no_call_binds_arguments_to_a_signature(ours: Op, plain: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15 does so for Functions with ``setup_context``, at several times the cost of the rest."""
    raw = torch.randn(4, 3, dtype=F64, requires_grad=True)
    expected = plain(raw)

    def signature(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"bound to a signature: {args[0]}")

    monkeypatch.setattr(inspect, "signature", signature)
    x = ours(raw)
    (grad,) = torch.autograd.grad(x.sum(), raw, create_graph=True)
    grad.sum().backward()
    monkeypatch.undo()
    torch.testing.assert_close(x, expected)
