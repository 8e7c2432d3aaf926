"""Hooks around a step, and the profiler: the way past torch's wrapper must not be seen, by subclasses neither."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributions import constraints
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from constrained_ops.optim import _base

ONCE = ["global before", "before", "after", "global after"]


def inheriting(kind: type[Any]) -> type[Any]:
    class Inheriting(kind):  # type: ignore[misc]
        pass

    return Inheriting


def calling_super(kind: type[Any]) -> type[Any]:
    class CallingSuper(kind):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return CallingSuper


def decorated(kind: type[Any]) -> type[Any]:
    """With all attributes of the step that it calls, the mark that it looks after its hooks included."""

    class Decorated(kind):  # type: ignore[misc]
        @functools.wraps(kind.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return kind.step(self, *args, **kwargs)

    return Decorated


def decorated_later(kind: type[Any]) -> type[Any]:
    made = calling_super(kind)
    made([Parameter(torch.rand(2))])  # torch puts its wrapper around the step of this class now
    inner = made.step

    @functools.wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    made.step = step
    return made


MAKERS: list[Callable[[type[Any]], type[Any]]] = [lambda kind: kind, inheriting, calling_super, decorated,
                                                  decorated_later]  # fmt: skip


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """What global hooks, and those that ``hook`` has put on an optimizer, were called."""
    names: list[str] = []
    handles = [register_optimizer_step_pre_hook(lambda *_: names.append("global before")),
               register_optimizer_step_post_hook(lambda *_: names.append("global after"))]  # fmt: skip
    yield names
    for handle in handles:
        handle.remove()


def with_grad() -> Parameter:
    p = Parameter(torch.full((4,), 0.5))
    p.grad = torch.ones(4)
    return p


def hook(optimizer: Any, names: list[str]) -> None:
    optimizer.register_step_pre_hook(lambda *_: names.append("before"))
    optimizer.register_step_post_hook(lambda *_: names.append("after"))


@pytest.mark.parametrize("make", MAKERS, ids=["itself", *(make.__name__ for make in MAKERS[1:])])
def test_hooks_run_once(kind: type[Any], make: Callable[[type[Any]], type[Any]], seen: list[str]) -> None:
    made, p = make(kind), with_grad()
    optimizer = made([p], constraint=constraints.unit_interval)
    hook(optimizer, seen)
    for _ in range(2):
        seen.clear()
        optimizer.step()
        assert seen == ONCE
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("make", MAKERS, ids=["itself", *(make.__name__ for make in MAKERS[1:])])
def test_a_profile_has_each_step_once(kind: type[Any], make: Callable[[type[Any]], type[Any]]) -> None:
    optimizer = make(kind)([with_grad()])
    with torch.profiler.profile() as profile:
        optimizer.step()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.step")}
    assert counts == {f"Optimizer.step#{type(optimizer).__name__}.step": 1}


@pytest.mark.parametrize("which", range(4))
def test_one_hook_alone_is_not_overlooked(kind: type[Any], which: int) -> None:
    optimizer = kind([with_grad()])
    register = (
        register_optimizer_step_pre_hook,
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_post_hook,
    )[which]
    names: list[str] = []
    handle = register(lambda *_: names.append("called"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert names == ["called"]


def test_a_hook_sees_the_arguments_and_may_replace_them(kind: type[Any]) -> None:
    optimizer = kind([with_grad()])
    given: list[Any] = []

    def replace(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given.append((args, kwargs))
        return (optimizer, lambda: "replaced"), {}

    optimizer.register_step_pre_hook(replace)
    closure = lambda: "given"  # noqa: E731
    assert optimizer.step(closure) == "replaced"
    assert optimizer.step() == "replaced"
    assert given == [((optimizer, closure), {}), ((optimizer,), {})]


def test_a_hook_that_raises_leaves_the_next_step_alone(kind: type[Any]) -> None:
    p = with_grad()
    optimizer = calling_super(kind)([p])

    def fail(*_: Any) -> None:
        raise RuntimeError("no step")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((4,), 0.5)) and not optimizer.state
    handle.remove()
    names: list[str] = []
    hook(optimizer, names)
    optimizer.step()
    assert names == ["before", "after"]


def test_schedules_and_hooks_together(kind: type[Any], seen: list[str], recwarn: pytest.WarningsRecorder) -> None:
    """A schedule puts a wrapper of its own around the step of its optimizer, and warns if it is not called."""
    optimizer = calling_super(kind)([with_grad()], lr=0.1)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    hook(optimizer, seen)
    for _ in range(2):
        seen.clear()
        optimizer.step()
        schedule.step()
        assert seen == ONCE
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_step_without_hooks_goes_past_the_wrapper(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = kind([with_grad()])
    monkeypatch.setattr(kind, "_watched_step", None)
    optimizer.step()


def test_torchs_wrapper_looks_at_nothing_else() -> None:
    """A torch whose wrapper does more than this needs it in every step: see ``step``, and then add the name here."""
    known = {"cast", "Optimizer", "__class__", "__name__", "torch", "autograd", "profiler", "record_function", "chain",
             "_global_optimizer_pre_hooks", "values", "_optimizer_step_pre_hooks", "isinstance", "tuple", "len",
             "RuntimeError", "_optimizer_step_code", "_optimizer_step_post_hooks",
             "_global_optimizer_post_hooks"}  # fmt: skip
    wrapper: Any = Optimizer.profile_hook_step(lambda self: None)
    assert set(wrapper.__code__.co_names) <= known
    assert _base._global_pre_hooks is _base._torch._global_optimizer_pre_hooks
    assert _base._global_post_hooks is _base._torch._global_optimizer_post_hooks


def test_a_torch_without_these_names_gets_its_wrapper(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "_global_pre_hooks", {0: "unknown"})
    p = with_grad()
    optimizer, names = calling_super(kind)([p]), []
    hook(optimizer, names)
    optimizer.step()
    plain = kind([p])
    plain.step()
    assert names == ["before", "after"]
    assert optimizer.state[p]["step"] == plain.state[p]["step"] == 1


def test_captures_are_looked_for_where_there_is_an_accelerator(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(_base, "_health_check", looked.append)
    for available, times in ((True, 3), (False, 1)):  # the first step does not know yet
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)  # noqa: B023
        optimizer = kind([with_grad()])
        looked.clear()
        for _ in range(3):
            optimizer.step()
        assert looked == [optimizer] * times
