"""The optimizers as users of torch.optim know them: saving, loading, scaling, scheduling and hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import through_a_file
from optimizers import UNIT, everything, parameters, run, same
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter
from torch.optim import lr_scheduler

import constrained_ops as co
from constrained_ops.optim import ReparametrizedAdam

pytestmark = pytest.mark.usefixtures("backend")


# --- Saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_first", [True, False])
def test_training_goes_on_to_the_bit_after_a_checkpoint(kind: type[Any], dtype: torch.dtype, model_first: bool) -> None:
    params = parameters(dtype)
    optimizer = kind(params, lr=0.5, amsgrad=True, constraint=UNIT)
    run(optimizer, 5)
    checkpoint = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    fresh = parameters(dtype)
    resumed = kind(fresh, constraint=UNIT)
    run(resumed, 2)

    def load_model() -> None:
        with torch.no_grad():
            for p, value in zip(fresh, checkpoint["params"], strict=True):
                p.copy_(value)

    if model_first:
        load_model()
    resumed.load_state_dict(checkpoint["optimizer"])
    if not model_first:
        load_model()
    assert resumed.param_groups[0]["lr"] == 0.5
    for each in (optimizer, resumed):
        run(each, 5, seed=1)
    assert same(everything(optimizer), everything(resumed))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


def test_a_state_dict_says_what_that_of_adam_says(kind: type[Any]) -> None:
    optimizer, adam = kind(parameters(), constraint=UNIT), torch.optim.Adam(parameters())
    for each in (optimizer, adam):
        run(each, 1)
    ours, theirs = optimizer.state_dict(), adam.state_dict()
    extra = {"raw"} if kind is ReparametrizedAdam else set()
    assert set(ours["state"][0]) == set(theirs["state"][0]) | extra
    assert set(ours["param_groups"][0]) == set(theirs["param_groups"][0]) - {"foreach", "fused", "differentiable"}
    step = ours["state"][0]["step"]
    assert step.shape == () and step.dtype == torch.float32 and step.is_cpu and step == 1


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_from_adam_and_back(kind: type[Any], amsgrad: bool) -> None:
    p, q = Parameter(torch.rand(6)), Parameter(torch.rand(6))
    with torch.no_grad():
        q.copy_(p)
    adam = torch.optim.Adam([p], lr=0.01, amsgrad=amsgrad, fused=True)
    run(adam, 3)
    with torch.no_grad():
        q.copy_(p)
    ours = kind([q], lr=0.7, constraint=None)
    ours.load_state_dict(through_a_file(adam.state_dict()))
    assert "fused" not in ours.param_groups[0]
    for each in (adam, ours):
        run(each, 3, seed=1)
    torch.testing.assert_close(q, p, atol=1e-6, rtol=0)
    back = torch.optim.Adam([Parameter(q.detach().clone())])
    back.load_state_dict(through_a_file(ours.state_dict()))
    for each in (adam, back):
        run(each, 3, seed=2)
    torch.testing.assert_close(back.param_groups[0]["params"][0], p, atol=1e-6, rtol=0)


def test_constraints_metric_and_state_dtype_are_the_optimizers_own(kind: type[Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = kind(params, constraint=UNIT, state_dtype=torch.bfloat16)
    run(optimizer, 2)
    other = kind(params, constraint=constraints.interval(-1.0, 2.0))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["constraint"].upper_bound == 2.0
    assert other.param_groups[0]["state_dtype"] is None
    assert other.state[params[0]]["exp_avg"].dtype == torch.float32
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_a_loaded_state_is_a_copy(kind: type[Any]) -> None:
    optimizer = kind(parameters(), constraint=UNIT)
    run(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    run(optimizer, 2)
    for i, values in before["state"].items():
        for name, value in values.items():
            assert torch.equal(state["state"][i][name], value)


def test_parameters_win_over_a_raw_that_does_not_lead_to_them() -> None:
    x = Parameter(torch.full((3,), 0.25))
    optimizer = ReparametrizedAdam([x], constraint=UNIT)
    run(optimizer, 1)
    state = optimizer.state_dict()
    state["state"][0]["raw"] = torch.full((3,), 5.0)
    before = x.detach().clone()
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, 1)
    torch.testing.assert_close(x.detach(), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "constraint",
    [
        lambda: None,
        lambda: UNIT,
        lambda: constraints.interval(torch.zeros(4), torch.ones(4)),
        lambda: co.Bounded(torch.zeros(4), 1.0),
        lambda: co.Positive(kind="exp"),
    ],
    ids=["none", "unit interval", "interval of tensors", "Bounded", "Positive"],
)
def test_copies_of_an_optimizer_go_their_own_way(
    kind: type[Any], how: Callable[[Any], Any], constraint: Callable[[], Any]
) -> None:
    optimizer = kind([Parameter(torch.rand(3, 4))], lr=0.1, constraint=constraint())
    run(optimizer, 3)
    other = how(optimizer)
    frozen = everything(optimizer)
    run(other, 3, seed=1)
    assert same(everything(optimizer), frozen)
    run(optimizer, 3, seed=1)
    assert same(everything(optimizer), everything(other))


SATURATED: dict[str, Any] = {
    "unit interval": UNIT,
    "greater than": constraints.greater_than(0.25),
    "less than": constraints.less_than(0.75),
    "exp": co.Positive(0.0, kind="exp"),
    "by element": constraints.interval(torch.zeros(8), torch.tensor([1.0, 2.0] * 4)),
    "simplex": constraints.simplex,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [5.0, 25.0])
@pytest.mark.parametrize("name", SATURATED)
def test_a_raw_beyond_what_its_parameter_can_tell_is_kept(name: str, lr: float, dtype: torch.dtype) -> None:
    """x says less than raw, and nothing at all next to a bound: whatever looks at both must not take raw from x."""
    value = torch.full((8,), 0.5) if name != "simplex" else torch.full((8,), 0.125)
    steps = 5
    away = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0])

    def more(optimizer: ReparametrizedAdam, direction: float) -> None:
        p = optimizer.param_groups[0]["params"][0]
        p.grad = (direction * away).to(p.dtype)
        optimizer.step()

    optimizer = ReparametrizedAdam([Parameter(value.to(dtype))], lr=lr, constraint=SATURATED[name])
    for _ in range(steps):
        more(optimizer, -1.0)
    untouched, loaded, added, written = (copy.deepcopy(optimizer) for _ in range(4))
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    added.add_param_group({"params": [Parameter(torch.rand(3))], "constraint": None})
    with torch.no_grad():
        written.param_groups[0]["params"][0].mul_(1)
    for _ in range(steps):
        for each in (optimizer, untouched, loaded, added, written):
            more(each, 1.0)
    want = everything(optimizer)
    for each in (untouched, loaded, written):
        assert same(everything(each), want)
    assert same(everything(added)[: len(want) - 2], want[:-2])


def test_state_replaced_by_hand_is_used(kind: type[Any]) -> None:
    """As codes that prune, split or reset parameters do: entries, dictionaries, all of it, or the parameter itself."""
    (p, q), zeros = parameters(), torch.zeros

    def entry(o: Any) -> None:
        o.state[p]["step"] = zeros(())

    def dictionary(o: Any) -> None:
        o.state[p] = {name: value.clone().zero_() for name, value in o.state[p].items() if name != "raw"}

    def clear(o: Any) -> None:
        o.state.clear()

    def parameter(o: Any) -> None:
        state = o.state.pop(p)
        state["step"] = zeros(())
        o.param_groups[0]["params"][0] = p_new
        o.state[p_new] = state

    for change in (entry, dictionary, clear, parameter):
        p_new = Parameter(p.detach().clone())
        optimizer = kind([p, q], constraint=UNIT)
        run(optimizer, 3)
        change(optimizer)
        run(optimizer, 1)
        now = p_new if change is parameter else p
        assert optimizer.state[now]["step"] == 1
        assert set(optimizer.state) == {now, q}


# --- Groups, schedules, hooks, closures -------------------------------------------------------------------------------


def test_groups_override_and_named_parameters_keep_their_names(kind: type[Any]) -> None:
    module = torch.nn.Linear(2, 3)
    groups = [{"params": [("w", module.weight)], "lr": 0.5}, {"params": [("b", module.bias)], "constraint": None}]
    optimizer = kind(groups, lr=0.1, constraint=constraints.interval(-1.0, 1.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["param_names"] == ["w"]
    run(optimizer, 3)
    assert (module.weight.abs() <= 1).all()
    assert "param_names" in optimizer.state_dict()["param_groups"][0]


def test_a_group_added_later_takes_part(kind: type[Any]) -> None:
    p, q = parameters()
    optimizer = kind([p], lr=0.1, constraint=UNIT)
    run(optimizer, 2)
    optimizer.add_param_group({"params": [q], "constraint": constraints.positive})
    before = q.detach().clone()
    run(optimizer, 1)
    assert not torch.equal(q, before)
    assert [optimizer.state[each]["step"].item() for each in (p, q)] == [3, 1]


def test_a_constraint_or_option_may_change_between_steps(kind: type[Any]) -> None:
    p = Parameter(torch.full((4,), 0.9))
    optimizer = kind([p], lr=0.01, constraint=UNIT)
    run(optimizer, 2)
    optimizer.param_groups[0].update(constraint=constraints.interval(0.25, 2.0), amsgrad=True, lr=0.5)
    run(optimizer, 5)
    assert (((p >= 0.25) & (p <= 2)).all() and (p > 1).any()) or (p < 0.4).any()
    assert "max_exp_avg_sq" in optimizer.state[p]


def test_schedules(kind: type[Any]) -> None:
    ours, theirs = (make(parameters()) for make in (lambda p: kind(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)))
    for make in (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ):
        schedules = [make(each) for each in (ours, theirs)]
        for t in range(5):
            for each, schedule in zip((ours, theirs), schedules, strict=True):
                run(each, 1)
                schedule.step(*([1.0 + t] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
            assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
            assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_tensor_as_learning_rate_is_read_in_every_step(kind: type[Any], capturable: bool) -> None:
    p, q = Parameter(torch.full((3,), 0.5)), Parameter(torch.full((3,), 0.5))
    lr = torch.tensor(0.1)
    ours, plain = kind([p], lr=lr, capturable=capturable, constraint=UNIT), kind([q], lr=0.1, constraint=UNIT)
    for value in (0.1, 0.01, 0.0, 0.2):
        lr.fill_(value)
        plain.param_groups[0]["lr"] = value
        for each in (ours, plain):
            run(each, 1)
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_closure_hooks_and_profile(kind: type[Any]) -> None:
    p = Parameter(torch.rand(4))
    optimizer = kind([p], lr=0.1, constraint=UNIT)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        seen.append("closure")
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad(), torch.profiler.profile() as profile:
        before = (p**2).sum()
        loss = optimizer.step(closure)
    assert seen == ["before", "closure", "after"]
    assert loss == before
    assert (p**2).sum() < before
    assert f"Optimizer.step#{kind.__name__}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(kind: type[Any], set_to_none: bool) -> None:
    p = Parameter(torch.rand(4))
    optimizer = kind([p], constraint=UNIT)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        (p**2).sum().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else (p.grad == 0).all()
    optimizer.step()
    assert optimizer.state[p]["step"] == (3 if set_to_none else 4)


def test_no_gradient_at_all_is_no_step(kind: type[Any]) -> None:
    optimizer = kind(parameters(), constraint=UNIT)
    assert optimizer.step() is None
    assert not optimizer.state


def test_both_optimizers_show_their_options(kind: type[Any]) -> None:
    text = repr(kind(parameters(), lr=0.25, constraint=UNIT))
    assert text.startswith(f"{kind.__name__} (") and "lr: 0.25" in text and "constraint: Interval" in text


# --- Mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(kind: type[Any], clip: bool) -> None:
    """Gradients are unscaled inside the step; one that overflowed leaves all as it was, counters included."""
    p, q = Parameter(torch.rand(4)), Parameter(torch.rand(4))
    with torch.no_grad():
        q.copy_(p)
    scaled, plain = kind([p], lr=0.1, constraint=UNIT), kind([q], lr=0.1, constraint=UNIT)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=2.0**10, growth_interval=1)
    for t in range(6):
        for each, leaf in ((scaled, p), (plain, q)):
            each.zero_grad()
            loss = ((leaf - 0.25) ** 2).sum()
            if each is plain:
                loss.backward()
                if t != 3:
                    each.step()
                continue
            scaler.scale(loss).backward()
            if t == 3:
                leaf.grad[1] = float("inf")
            if clip:
                scaler.unscale_(each)
            before = everything(each)
            scaler.step(each)
            scaler.update()
            assert same(before, everything(each)) == (t == 3)
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    assert scaled.state[p]["step"] == 5
    assert not hasattr(scaled, "found_inf")


def test_an_overflow_in_the_very_first_step(kind: type[Any]) -> None:
    p = Parameter(torch.rand(4))
    optimizer = kind([p], constraint=UNIT)
    optimizer.found_inf = torch.tensor(1.0)
    p.grad = torch.full((4,), float("inf"))
    before = everything(optimizer)
    optimizer.step()
    assert same(before, everything(optimizer))


def test_an_overflow_with_counters_on_the_device(kind: type[Any]) -> None:
    p = Parameter(torch.rand(4))
    optimizer = kind([p], constraint=UNIT, capturable=True)
    run(optimizer, 1)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    before = everything(optimizer)
    run(optimizer, 1)
    assert same(before, everything(optimizer))
    optimizer.found_inf.zero_()
    run(optimizer, 1)
    assert optimizer.state[p]["step"] == 2
