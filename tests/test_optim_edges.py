"""What is easily got wrong at the edges of an optimizer: memory between the elements of a view, gradients that are
shared or expanded, nothing to do, state from elsewhere, and how many launches there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import through_a_file
from optimizers import UNIT
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter
from torch.optim import lr_scheduler

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"amsgrad": True, "betas": (0.9, 0.9)},
    {"maximize": True, "capturable": True},
]


def constraint_of(name: str, columns: int = 4) -> Any:
    upper = torch.arange(columns) + 1.0
    return {
        "none": None,
        "interval": UNIT,
        "lower": constraints.positive,
        "tensors": co.Bounded(torch.zeros(columns), torch.where(upper == 2, torch.inf, upper)),
        "simplex": constraints.simplex,
        "simplex, dim 0": co.Simplex(0),
    }[name]


NAMES = ["none", "interval", "lower", "tensors", "simplex", "simplex, dim 0"]


def start(name: str, *shape: int) -> Tensor:
    return torch.softmax(torch.randn(shape), 0 if name.endswith("0") else -1)


# --- Against torch.optim.Adam itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_box_is_adam_and_clamp_with_every_option(options: dict[str, Any], dtype: torch.dtype) -> None:
    """50 steps of torch.optim.Adam and ``clamp_``, bounds by element among them."""
    bounds: list[tuple[Any, Any]] = [(0.0, 1.0), (0.25, None), (torch.zeros(4), torch.arange(4) / 4 + 0.25)]
    given = [constraints.interval(0.0, 1.0), constraints.greater_than(0.25), constraints.interval(*bounds[2])]
    starts = [torch.rand(3, 4).to(dtype).clamp(0.25, 0.25) for _ in bounds]
    ours = [{"params": [Parameter(s.clone())], "constraint": c} for s, c in zip(starts, given, strict=True)]
    theirs = [Parameter(s.clone()) for s in starts]
    more = {key: value for key, value in options.items() if key != "capturable"}
    optimizer, adam = ProjectedAdam(ours, lr=0.05, **options), torch.optim.Adam(theirs, lr=0.05, **more)
    for _ in range(50):
        for group, q in zip(ours, theirs, strict=True):
            q.grad = (torch.randn(3, 4) * torch.logspace(-2, 1, 4)).to(dtype)
            group["params"][0].grad = q.grad.clone()  # type: ignore[index]
        optimizer.step()
        adam.step()
        for group, q, (lower, upper) in zip(ours, theirs, bounds, strict=True):
            with torch.no_grad():
                q.clamp_(lower, upper)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(group["params"][0], q, atol=tolerance, rtol=tolerance)  # type: ignore[index]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("name", ["none", "interval", "tensors"])
def test_gradients_of_any_size_move_a_box_as_adam_does(name: str, eps: float, amsgrad: bool) -> None:
    """Those whose squares overflow stop an element for good, those of 0 without an eps make it NaN."""
    least = -17 if eps == 0 else -44  # whose squares have all their digits
    grad = torch.cat([torch.logspace(least, 19, 63 - least), torch.logspace(21, 38, 16), torch.zeros(1)])[:, None]
    grad = (grad * torch.tensor([1.0, -1.0, 1.0, -1.0])).contiguous()
    options: dict[str, Any] = {"lr": 1e-2, "eps": eps, "amsgrad": amsgrad}
    bounds = {"none": (-10.0, 10.0), "interval": (0.0, 1.0), "tensors": (0.0, constraint_of("tensors").upper)}[name]
    p, q = Parameter(torch.full_like(grad, 0.5)), Parameter(torch.full_like(grad, 0.5))
    ours = ProjectedAdam([p], constraint=constraint_of(name), **options)
    theirs = torch.optim.Adam([q], foreach=False, **options)
    for factor in (1.0, 1e-3, -0.5):
        p.grad, q.grad = grad * factor, grad * factor
        ours.step()
        theirs.step()
        with torch.no_grad():
            q.clamp_(*(torch.as_tensor(bound) for bound in bounds))
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, equal_nan=True)
    assert (p[-1].isnan().all() if eps == 0 else (p[-1] == 0.5).all()) and (p[-2] == 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_to_adam_and_comes_back_with_a_constraint_too(kind: type[Any], name: str) -> None:
    """Moments and counts are taken over; raw, of which Adam knows nothing, is derived anew where it is missing."""
    p = Parameter(start(name, 4, 4))
    ours = kind([p], lr=0.01, constraint=constraint_of(name))
    for _ in range(3):
        p.grad = torch.randn(4, 4)
        ours.step()
    q = Parameter(p.detach().clone())
    adam = torch.optim.Adam([q])
    adam.load_state_dict(through_a_file(ours.state_dict()))
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(adam.state[q][key], ours.state[p][key])
    assert adam.param_groups[0]["lr"] == 0.01
    q.grad = torch.randn(4, 4)
    adam.step()
    with torch.no_grad():
        q.copy_(p)
    state = adam.state_dict()
    state["state"][0].pop("raw", None)
    back = kind([q], lr=0.5, constraint=constraint_of(name))
    back.load_state_dict(through_a_file(state))
    ours.load_state_dict(through_a_file(state))
    for each, leaf in ((back, q), (ours, p)):
        leaf.grad = torch.ones(4, 4)
        each.step()
    assert ours.state[p]["step"] == back.state[q]["step"] == 5
    torch.testing.assert_close(p, q)


def test_a_tensor_as_learning_rate_is_scheduled(kind: type[Any]) -> None:
    """Schedules write into the tensor."""
    leaves = [Parameter(torch.full((4,), 0.5)) for _ in range(2)]
    optimizers = [kind([p], lr=lr, constraint=UNIT) for p, lr in zip(leaves, (torch.tensor(0.1), 0.1), strict=True)]
    schedules = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for _ in range(4):
        for p, optimizer, schedule in zip(leaves, optimizers, schedules, strict=True):
            p.grad = torch.ones(4)
            optimizer.step()
            schedule.step()
    assert float(optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.1 / 16)
    torch.testing.assert_close(*leaves)


# --- One launch -------------------------------------------------------------------------------------------------------


def test_one_launch_for_each_dtype(kind: type[Any]) -> None:
    """Of all groups, constraints, options, sizes and layouts."""
    groups: list[dict[str, Any]] = []
    for i in range(200):
        name, dtype = NAMES[i % 6], [torch.float32, torch.bfloat16][i % 2]
        value = start(name, 4 + i % 3, 4).to(dtype)
        value = torch.zeros(0, 4, dtype=dtype) if i % 50 == 7 and "0" not in name else value
        p = Parameter(value if i % 4 else value.t().contiguous().t())
        p.grad = torch.ones_like(p)
        groups.append({"params": [p], "constraint": constraint_of(name), "lr": i * 1e-4, "amsgrad": i % 7 == 0})
    optimizer = kind(groups)
    for _ in range(2):
        optimizer.step()
        assert sorted(len(launch.indices) for launch in optimizer._prepared.launches) == [100, 100]


# --- Nothing to do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_group_with_lr_zero_beside_one_without(kind: type[Any], name: str) -> None:
    still, moving = (Parameter(start(name, 4, 4)) for _ in range(2))
    before = still.detach().clone()
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 0.1}]
    optimizer = kind(groups, constraint=constraint_of(name), weight_decay=0.1, decoupled_weight_decay=True)
    for _ in range(5):
        for p in (still, moving):
            p.grad = torch.randn(4, 4)
        optimizer.step()
    rounding = 0 if kind is ProjectedAdam and "simplex" not in name else 2e-6
    torch.testing.assert_close(still.detach(), before, atol=rounding, rtol=0)
    assert not torch.equal(moving, before)
    assert (optimizer.state[still]["exp_avg"] != 0).all()


def test_what_is_frozen_has_no_state_and_does_not_move(kind: type[Any]) -> None:
    frozen, p, unused = (Parameter(torch.full((3,), 0.5)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = kind([frozen, p, unused], constraint=UNIT)
    (p.sum() + frozen.sum()).backward()
    optimizer.step()
    assert set(optimizer.state) == {p}
    assert (frozen == 0.5).all() and (unused == 0.5).all() and (p < 0.5).all()
    frozen.requires_grad_()
    optimizer.zero_grad()
    (p.sum() + frozen.sum()).backward()
    optimizer.step()
    assert [float(optimizer.state[each]["step"]) for each in (frozen, p)] == [1, 2]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["tensors", "simplex"])
def test_tensors_without_elements_under_every_constraint(kind: type[Any], name: str, place: int) -> None:
    full, alone = ([Parameter(torch.full((3, 4), 0.25)) for _ in range(2)] for _ in range(2))
    empty = Parameter(torch.zeros(0, 4))
    mixed = [*full[:place], empty, *full[place:]]
    ours, theirs = (kind(each, lr=0.1, amsgrad=True, constraint=constraint_of(name)) for each in (mixed, alone))
    for t in range(4):
        for p, q in zip(full, alone, strict=True):
            p.grad = torch.randn(3, 4)
            q.grad = p.grad.clone()
        empty.grad = None if t == 1 else torch.zeros(0, 4)
        ours.step()
        theirs.step()
    assert all(map(torch.equal, full, alone))
    assert ours.state[empty]["step"] == 3 and ours.state[empty]["exp_avg"].shape == (0, 4)
    fresh = kind(mixed, constraint=constraint_of(name))
    fresh.load_state_dict(through_a_file(ours.state_dict()))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_not_a_bit_between_the_elements_of_a_view_changes(kind: type[Any], name: str, dtype: torch.dtype) -> None:
    """Rows and columns of one matrix, of two optimizers, with NaN in between."""
    memory = torch.full((11, 13), torch.nan, dtype=dtype)
    views = [memory[1:9:2, 2:12:3], memory[2:10:2, 3:13:3]]
    for view in views:
        view.copy_(start(name, 4, 4))
    params = [Parameter(view) for view in views]
    inside = torch.zeros(11, 13, dtype=torch.bool)
    inside[1:9:2, 2:12:3] = inside[2:10:2, 3:13:3] = True
    dense = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizers = [[kind([p], lr=0.01, constraint=constraint_of(name)) for p in each] for each in (params, dense)]
    for t in range(3):
        for p, q, one, other in zip(params, dense, *optimizers, strict=True):
            wide = torch.randn(4, 8, dtype=dtype)
            p.grad = wide[:, ::2] if t else wide[:1, :1].expand(4, 4)
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
            one.step()
            other.step()
    assert memory[~inside].isnan().all()
    assert all(p.data_ptr() == view.data_ptr() for p, view in zip(params, views, strict=True))
    for p, q in zip(params, dense, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)


def test_a_gradient_is_not_written_to(kind: type[Any]) -> None:
    """Also where several parameters have one and the same, in whatever layout, and where it is scaled."""
    shared = torch.randn(4, 8)
    before = shared.clone()
    params = [Parameter(torch.full((4, 4), 0.5)) for _ in range(3)]
    params[0].grad, params[1].grad, params[2].grad = shared[:, ::2], shared[:, ::2], shared[:1, :1].expand(4, 4)
    optimizer = kind(params, lr=0.1, weight_decay=0.1, maximize=True, constraint=UNIT)
    optimizer.grad_scale = torch.tensor(4.0)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(shared, before)
    assert torch.equal(params[0], params[1])


def test_a_projected_parameter_that_others_moved_outside_comes_back() -> None:
    """Nothing is remembered of it, and so it is no error, as with ``clamp_``."""
    p = Parameter(torch.full((3,), 0.5))
    optimizer = ProjectedAdam([p], lr=0.1, constraint=UNIT)
    p.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        p.copy_(torch.tensor([-3.0, 0.5, 7.0]))
    optimizer.step()
    assert p[0] == 0 and 0.3 < p[1] < 0.5 and p[2] == 1
