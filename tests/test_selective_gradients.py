"""Gradients for some variables only, and no work for the others; parameters and single elements that stay put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

F64 = torch.float64
UNIT = constraints.unit_interval
RAW, LOWER, UPPER = range(3)


class Kernels(TorchDispatchMode):
    """Which of our kernels run, and which of their results were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, set[int] | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "constrained_ops":
            names = [argument.name for argument in func._schema.arguments]
            bits = args[names.index("needed")] if "needed" in names else None
            wanted = None if bits is None else {i for i in range(5) if bits >> i & 1}
            self.ran.append((func.__name__.removesuffix(".default"), wanted))
        return func(*args, **(kwargs or {}))


def leaf(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=F64, device=DEVICE, requires_grad=grad)


def bounds(lower: bool, upper: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.full((3,), -1.0, dtype=F64, device=DEVICE, requires_grad=lower),
        torch.full((3,), 2.0, dtype=F64, device=DEVICE, requires_grad=upper),
    )


# --- No work for what is not asked ------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": lambda raw: co.bounded(raw, -1.0, 2.0),
    "bounded by tensors": lambda raw: co.bounded(raw, *bounds(False, False)),
    "positive exp": lambda raw: co.positive(raw, kind="exp"),
    "simplex": co.simplex,
    "projection": co.project_simplex,
}
everywhere = pytest.mark.parametrize("function", TRANSFORMS.values(), ids=TRANSFORMS)


@everywhere
def test_a_frozen_parameter_costs_no_backward_and_keeps_nothing(function: Any) -> None:
    frozen, weight = leaf(4, 3, grad=False), leaf(4, 3)
    kept: list[Tensor] = []
    with Kernels() as kernels, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = function(frozen)
        assert not kept
        (weight * x).sum().backward()
    assert [name for name, _ in kernels.ran if "backward" in name] == []
    assert frozen.grad is None
    torch.testing.assert_close(weight.grad, x)


@everywhere
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_part_without_gradients(function: Any, mode: Any) -> None:
    raw = leaf(4, 3)
    with mode():
        kept = function(raw)
        assert not kept.requires_grad and kept.grad_fn is None
    kept = kept.clone()  # what inference mode made may not be saved for backward
    with Kernels() as kernels:
        (kept * function(raw)).sum().backward()
    assert len([name for name, _ in kernels.ran if "backward" in name]) == 1
    (expected,) = torch.autograd.grad(function(raw), raw, kept)
    torch.testing.assert_close(raw.grad, expected)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((True, False, False), {RAW}),
        ((False, True, False), {LOWER}),
        ((False, False, True), {UPPER}),
        ((False, True, True), {LOWER, UPPER}),
        ((True, False, True), {RAW, UPPER}),
    ],
)
@pytest.mark.parametrize("return_log_det", [False, True])
def test_raw_and_bounds_apart(wanted: Any, expected: set[int], return_log_det: bool) -> None:
    inputs = (leaf(4, 3, grad=wanted[0]), *bounds(*wanted[1:]))
    x = co.bounded(*inputs, return_log_det=return_log_det)
    with Kernels() as kernels:
        (sum(each.sum() for each in x) if return_log_det else x.sum()).backward()
    assert kernels.ran == [("bounded_backward.tensor", expected)]
    assert [each.grad is not None for each in inputs] == list(wanted)


CONSTANT_BOUNDS = {
    "bounded": lambda raw, lower, upper: co.bounded(raw, lower, upper),
    "bounded with log_det": lambda raw, lower, upper: co.bounded(raw, lower, upper, return_log_det=True),
    "softplus": lambda raw, lower, _: co.positive(raw, lower),
    "exp with log_det": lambda raw, lower, _: co.positive(raw, lower, kind="exp", return_log_det=True),
}


@pytest.mark.parametrize("function", CONSTANT_BOUNDS.values(), ids=CONSTANT_BOUNDS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_constant_bounds_give_raw_the_gradients_that_learned_ones_give(function: Any, create_graph: bool) -> None:
    raw = leaf(4, 3)

    def gradients(learned: bool) -> list[Tensor]:
        results = function(raw, *bounds(learned, learned))
        loss = sum(each.pow(3).sum() for each in (results if isinstance(results, tuple) else (results,)))
        (first,) = torch.autograd.grad(loss, raw, create_graph=create_graph)
        return [first, *(torch.autograd.grad(first.square().sum(), raw) if create_graph else ())]

    torch.testing.assert_close(gradients(False), gradients(True), rtol=0, atol=0)
    constant = bounds(False, False)
    assert torch.autograd.gradcheck(lambda raw: function(raw, *constant), raw)
    assert torch.autograd.gradgradcheck(lambda raw: function(raw, *constant), raw)


def test_learned_bounds_of_raws_shape_are_not_expanded() -> None:
    raw, lower = leaf(4, 3), leaf(4, 3)
    x = co.bounded(raw, lower, lower.detach() + 1)
    assert {type(node).__name__ for node, _ in x.grad_fn.next_functions} == {"AccumulateGrad", "NoneType"}


@pytest.mark.parametrize("changed", [0, 1])
def test_a_constant_bound_changed_before_backward_is_noticed(changed: int) -> None:
    constant = [bound.expand(4, 3).clone() for bound in bounds(False, False)]
    x = co.bounded(leaf(4, 3), *constant)
    constant[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@pytest.mark.parametrize("kind", ["softplus", "exp"])
def test_a_lower_bound_alone(kind: str) -> None:
    raw, (lower, _) = leaf(4, 3, grad=False), bounds(True, False)
    with Kernels() as kernels:
        co.positive(raw, lower, kind=kind).sum().backward()
    name = "bounded" if kind == "softplus" else "exponential"
    assert kernels.ran == [(f"{name}_forward.tensor", None), (f"{name}_backward.tensor", {LOWER})]
    torch.testing.assert_close(lower.grad, torch.full_like(lower, 4.0))


def test_a_parametrized_module_whose_raw_is_frozen() -> None:
    layer: Any = nn.Linear(3, 4, dtype=F64, device=DEVICE)
    lower, upper = bounds(False, True)
    co.register_constraint(layer, "weight", co.Bounded(lower, nn.Parameter(upper.detach())))
    layer.parametrizations.weight.original.requires_grad_(False)
    with Kernels() as kernels:
        layer(torch.ones(3, dtype=F64, device=DEVICE)).sum().backward()
    assert kernels.ran[-1] == ("bounded_backward.tensor", {UPPER})
    assert layer.parametrizations.weight[0].upper.grad is not None


@pytest.mark.parametrize(
    ("name", "function", "raw_at"), [("bounded", lambda raw: co.bounded(raw, -1.0, 2.0), 2), ("simplex", co.simplex, 1)]
)
@pytest.mark.parametrize("both", [False, True])
def test_second_order_where_the_first_gradient_is_a_constant(name: str, function: Any, raw_at: int, both: bool) -> None:
    raw, grad_x = leaf(4, 3), leaf(4, 3, grad=both)
    (grad,) = torch.autograd.grad(function(raw), raw, grad_x, create_graph=True)
    with Kernels() as kernels:
        grad.square().sum().backward()
    assert kernels.ran == [(f"{name}_double_backward", {0, raw_at} if both else {raw_at})]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_the_weighted_projection(wanted: tuple[bool, bool]) -> None:
    x = leaf(4, 3, grad=wanted[0])
    weight = torch.rand(4, 3, dtype=F64, device=DEVICE).add_(0.5).requires_grad_(wanted[1])
    y = co.project_simplex(x, weight=weight)
    with Kernels() as kernels:
        y.square().sum().backward()
    assert kernels.ran == [("projection_backward.weighted", {i for i in range(2) if wanted[i]})]
    assert [each.grad is not None for each in (x, weight)] == list(wanted)


# --- Parameters that stay put, in optimizers --------------------------------------------------------------------------

OPTIMIZERS = [ReparametrizedAdam, ProjectedAdam]
both = pytest.mark.parametrize("kind", OPTIMIZERS)


def parameter(*shape: int) -> Tensor:
    return (0.1 + 0.8 * torch.rand(shape, device=DEVICE)).requires_grad_()


def step(optimizer: Any, loss: Callable[[], Tensor], steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@both
def test_a_parameter_frozen_for_a_while(kind: Any) -> None:
    x, y = parameter(4), parameter(4)
    optimizer = kind([x, y], lr=0.1, constraint=UNIT)

    def loss() -> Tensor:
        return (x - 0.9).square().sum() + (y - 0.9).square().sum()

    step(optimizer, loss, 2)
    x.requires_grad_(False)
    before = [each.detach().clone() for each in (x, y)]
    state = {name: value.clone() for name, value in optimizer.state[x].items()}
    step(optimizer, loss, 3)
    assert torch.equal(x, before[0]) and not torch.equal(y, before[1])
    assert all(torch.equal(optimizer.state[x][name], value) for name, value in state.items())
    x.requires_grad_()
    step(optimizer, loss)
    assert not torch.equal(x, before[0])
    assert [optimizer.state[each]["step"].item() for each in (x, y)] == [3, 6]


@both
def test_groups_are_optimizers_of_their_own(kind: Any) -> None:
    """Each group's learning rate and constraint are its own; a learning rate of 0 holds its group in place."""
    groups = [
        {"lr": 0.1, "constraint": UNIT},
        {"lr": 0.01, "constraint": constraints.interval(-1.0, 3.0)},
        {"lr": 0.0, "constraint": constraints.positive},
        {"lr": 0.2, "constraint": None},
    ]
    together = [parameter(3, 2) for _ in groups]
    apart = [each.detach().clone().requires_grad_() for each in together]
    optimizer = kind([{"params": [x], **group} for x, group in zip(together, groups, strict=True)])
    optimizers = [kind([x], **group) for x, group in zip(apart, groups, strict=True)]
    starts = [each.detach().clone() for each in together]
    for _ in range(20):
        step(optimizer, lambda: sum((x - 2.0).square().sum() for x in together))  # type: ignore[arg-type, return-value]
        for x, each in zip(apart, optimizers, strict=True):
            step(each, lambda: (x - 2.0).square().sum())  # noqa: B023
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(together[2], starts[2], rtol=1e-6, atol=0)
    assert all((together[i] > starts[i] + 0.05).all() for i in (0, 1, 3))
    assert (together[0] <= 1).all()
    assert (together[3] > 1.5).all()


# --- Single elements that stay put ------------------------------------------------------------------------------------


def masked(x: Tensor) -> Tensor:
    """Freeze the first column of x: a mask in a gradient hook."""
    mask = torch.ones_like(x)
    mask[:, 0] = 0
    x.register_hook(lambda grad: grad * mask)
    return mask == 0


def distance(x: Tensor) -> Callable[[], Tensor]:
    return lambda: (x - 0.5).square().sum()


def test_elements_of_raw_frozen_by_a_mask() -> None:
    raw = leaf(4, 3)
    start, frozen = raw.detach().clone(), masked(raw)
    step(torch.optim.Adam([raw], lr=0.1), lambda: (co.bounded(raw, 0.0, 1.0) - 0.9).square().sum(), 20)
    assert torch.equal(raw[frozen], start[frozen])
    assert (raw[~frozen] != start[~frozen]).all()


@both
@pytest.mark.parametrize("constraint", [UNIT, constraints.positive, None], ids=str)
def test_elements_of_a_parameter_frozen_by_a_mask(kind: Any, constraint: Any) -> None:
    x = parameter(4, 3)
    start, frozen = x.detach().clone(), masked(x)
    step(kind([x], lr=0.1, constraint=constraint), distance(x), 20)
    if kind is ProjectedAdam:
        assert torch.equal(x[frozen], start[frozen])
    torch.testing.assert_close(x[frozen], start[frozen], rtol=3e-7, atol=0)  # transformed from raw: by rounding
    assert (x[~frozen] - start[~frozen]).abs().min() > 1e-3


@both
def test_elements_frozen_later_need_their_momentum_cleared(kind: Any) -> None:
    x = parameter(4, 3)
    optimizer = kind([x], lr=0.1, constraint=UNIT)
    step(optimizer, distance(x), 5)
    start, frozen = x.detach().clone(), masked(x)
    optimizer.state[x]["exp_avg"][frozen] = 0
    step(optimizer, distance(x), 20)
    torch.testing.assert_close(x[frozen], start[frozen], rtol=3e-7, atol=0)
    assert (x[~frozen] != start[~frozen]).all()


def test_elements_frozen_by_where_in_forward() -> None:
    """Whatever the optimizer does, weight decay and momentum included."""
    raw, value = leaf(4, 3), 0.125
    frozen = torch.zeros(4, 3, dtype=torch.bool, device=DEVICE)
    frozen[:, 0] = True
    optimizer = torch.optim.AdamW([raw], lr=0.1)

    def x() -> Tensor:
        return torch.where(frozen, value, co.bounded(raw, 0.0, 1.0))

    step(optimizer, lambda: (x() - 0.9).square().sum(), 20)
    assert (x()[frozen] == value).all()
    assert (x()[~frozen] > 0.125).all()


def test_weights_frozen_on_the_simplex() -> None:
    """No mask can do it, since all weights of a row move together: the free ones share what the fixed ones leave."""
    fixed = torch.tensor([[0.25], [0.5]], dtype=F64, device=DEVICE)
    raw = leaf(2, 3)

    def x() -> Tensor:
        return torch.cat([fixed, (1 - fixed) * co.simplex(raw)], -1)

    start = x().detach()
    step(torch.optim.Adam([raw], lr=0.1), lambda: x()[:, 1].log().neg().sum(), 20)
    torch.testing.assert_close(x().sum(-1), torch.ones(2, dtype=F64, device=DEVICE))
    assert torch.equal(x()[:, :1], fixed)
    assert (x()[:, 1] > start[:, 1]).all()
