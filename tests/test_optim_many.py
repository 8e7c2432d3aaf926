"""Many small parameters: checked and inverted together, and still each by its own name, with its own state."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import OPTIMIZERS
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_ops as co
from constrained_ops.optim import ReparametrizedAdam, _many


def bounds(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    lower = -torch.rand(shape)
    return lower, torch.where(torch.rand(shape) < 0.3, torch.inf, lower + 3)


SHAPES = [(3, 4), (4,), (2, 0, 4), (5, 4), (), (3, 4), (1, 4), (3, 2, 4)]
FAMILIES: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "unit interval": lambda shape: constraints.unit_interval,
    "greater than": lambda shape: constraints.greater_than(-1.0),
    "exp": lambda shape: co.Positive(-0.5, kind="exp"),
    "tensors": lambda shape: co.Bounded(*bounds(shape)),
    "simplex": lambda shape: co.Simplex(-1),
    "simplex, dim 0": lambda shape: co.Simplex(0),
}


def start(name: str, shape: tuple[int, ...]) -> Tensor:
    if not name.startswith("simplex"):
        return torch.rand(shape)
    dim = 0 if name.endswith("0") else -1
    return torch.softmax(torch.randn(shape), dim)


def groups() -> list[dict[str, Any]]:
    """One for each parameter, families mixed, in two dtypes."""
    made = []
    for shape in SHAPES:
        for name, constraint in FAMILIES.items():
            for dtype in (torch.float32, torch.bfloat16):
                value = start(name, shape).to(dtype)
                if name == "unit interval" and len(shape) == 2:
                    value = value.t().contiguous().t()
                made.append({"params": [Parameter(value)], "constraint": constraint(shape)})
    return made


def test_raws_are_what_each_alone_would_have() -> None:
    together = groups()
    starts = [group["params"][0].detach().clone() for group in together]
    optimizer = ReparametrizedAdam(together, lr=0.0)
    for group in together:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    for group, value in zip(optimizer.param_groups, starts, strict=True):
        (p,) = group["params"]
        alone = Parameter(value)
        alone.grad = torch.ones_like(p)
        single = ReparametrizedAdam([alone], lr=0.0, constraint=group["constraint"])
        single.step()
        raw = optimizer.state[p]["raw"]
        torch.testing.assert_close(raw, single.state[alone]["raw"], atol=1e-6, rtol=1e-6)
        assert raw.stride() == torch.empty_like(p).stride()


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(6, 4), (6, 9), (6, 1), (6, 4)]
    starts, given = [start(name, shape) for shape in shapes], [FAMILIES[name](shape) for shape in shapes]
    others = [start(name, shape) for shape in shapes]

    def raws() -> list[Tensor]:
        """After a first step, and another one before which somebody wrote to some elements or rows."""
        params = [Parameter(value.clone()) for value in starts]
        groups = [{"params": [p], "constraint": c} for p, c in zip(params, given, strict=True)]
        optimizer = ReparametrizedAdam(groups, lr=0.0)
        found = []
        for written in ((slice(0, 0),), (slice(None), -1) if name == "simplex, dim 0" else (2,)):
            with torch.no_grad():
                for p, other in zip(params, others, strict=True):
                    p[written] = other[written]
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            found += [optimizer.state[p]["raw"].clone() for p in params]
        return found

    want = raws()
    for together in (20, 7, 1):
        monkeypatch.setattr(_many, "TOGETHER", together)
        torch.testing.assert_close(raws(), want, atol=1e-6, rtol=1e-6)


class Sizes(TorchDispatchMode):
    """The sizes of the memory that operators allocate, by its address: the last tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and not t.is_meta:
                storage = t.untyped_storage()
                self.largest[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("name", FAMILIES)
def test_a_first_step_and_one_after_a_write_need_no_memory_that_grows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the state. A simplex along another dimension than the last is copied, to and fro."""
    monkeypatch.setattr(_many, "TOGETHER", 64)
    p = Parameter(start(name, (64, 64)))
    p.grad = torch.zeros_like(p)
    constraint = FAMILIES[name]((64, 64))
    bounds = [constraint.lower, constraint.upper] if name == "tensors" else []
    optimizer = ReparametrizedAdam([p], constraint=constraint)
    for write in (False, True):
        if write:
            with torch.no_grad():
                p.copy_(start(name, (64, 64)))
        with Sizes() as sizes:
            optimizer.step()
        known = {t.data_ptr() for t in (p, p.grad, *bounds, *optimizer.state[p].values())}
        large = [size for at, size in sizes.largest.items() if at not in known and size > 4 * 64]
        assert len(large) <= write + 2 * (name == "simplex, dim 0"), large  # the new raw, before it takes its place


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_tensors_have_memory_of_their_own(kind: type[Any]) -> None:
    """Saving, moving or freeing one must not carry the others along."""
    params = [Parameter(torch.rand(4)) for _ in range(10)]
    optimizer = kind(params, constraint=constraints.unit_interval, amsgrad=True)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    tensors = [t for p in params for t in optimizer.state[p].values()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_of_many_that_is_outside_is_named(kind: type[Any], name: str) -> None:
    shapes = [(6, 4) if name == "simplex, dim 0" else (n + 1, 4) for n in range(40)]
    starts = [start(name, shape) for shape in shapes]
    starts[17].view(-1)[2], starts[30].view(-1)[3] = -7.5, torch.nan
    made = [{"params": [(f"p{n}", Parameter(value))], "constraint": FAMILIES[name](tuple(value.shape))}
            for n, value in enumerate(starts)]  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: parameter 0 \('p17'\) of group 17 must .*, got -7.5$"):
        kind(made)
    if name != "tensors":
        params = [("good", Parameter(starts[0])), *((f"p{n}", Parameter(value)) for n, value in enumerate(starts))]
        message = rf"^{kind.__name__}: parameter 18 \('p17'\) of group 0 must .*, got -7.5$"
        with pytest.raises(ValueError, match=message):
            kind(params, constraint=FAMILIES[name](()))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_written_among_many_gets_a_new_raw_and_the_others_keep_theirs(name: str) -> None:
    params = [Parameter(start(name, (6, 4))) for _ in range(30)]
    optimizer = ReparametrizedAdam([{"params": [p], "constraint": FAMILIES[name]((6, 4))} for p in params], lr=0.1)

    def step(scale: float = 0.0) -> None:
        for p in params:
            p.grad = scale * torch.randn(6, 4)
        optimizer.step()

    for _ in range(3):
        step(scale=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [optimizer.state[p]["raw"].clone() for p in params]
    value, written = start(name, (6, 4)), torch.zeros(6, 4, dtype=torch.bool)
    written[(slice(None), 3) if name == "simplex, dim 0" else 2] = True
    with torch.no_grad():
        params[11].copy_(torch.where(written, value, params[11]))
    step()
    for index, (p, raw) in enumerate(zip(params, before, strict=True)):
        changed = optimizer.state[p]["raw"] != raw
        assert torch.equal(changed, written) if index == 11 else not changed.any()
    torch.testing.assert_close(params[11].detach()[written], value[written])
    with torch.no_grad():
        params[29].fill_(-7.5)
        params[5].copy_(value)
    before = [t.clone() for p in params for t in (p, *optimizer.state[p].values())]
    with pytest.raises(ValueError, match=r"^ReparametrizedAdam: parameter 0 of group 29 must .*, got -7.5$"):
        step()
    assert all(map(torch.equal, before, [t for p in params for t in (p, *optimizer.state[p].values())]))


def test_a_write_after_a_step_that_was_skipped_is_noticed() -> None:
    """A step that mixed precision skips writes nothing, and must not be counted as one."""
    p = Parameter(torch.full((4,), 0.5, device="cpu"))
    optimizer = ReparametrizedAdam([p], lr=0.0, constraint=constraints.unit_interval, capturable=True)
    p.grad = torch.zeros(4)
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    with torch.no_grad():
        p.fill_(0.75)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.75))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["unit interval", "tensors", "simplex"])
def test_thousands_of_tiny_parameters_take_no_seconds(kind: type[Any], name: str) -> None:
    """To check and to invert: against what torch.optim.Adam takes for its construction and first step alone."""

    def seconds(make: Callable[[list[Parameter]], Any]) -> float:
        params = [Parameter(start(name, (4,))) for _ in range(400)]
        for p in params:
            p.grad = torch.ones(4)
        begin = time.perf_counter()
        make(params).step()
        return time.perf_counter() - begin

    constraint = FAMILIES[name]((4,))
    ours, adam = lambda p: kind(p, constraint=constraint), lambda p: torch.optim.Adam(p, fused=True)
    ratios = [seconds(ours) / seconds(adam) for _ in range(3)]
    assert min(ratios) < 15
