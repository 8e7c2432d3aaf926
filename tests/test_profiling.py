"""Every operator and every step is in a profile under its own name, forward and backward, whichever backend runs.

NVTX sees what profilers see: ``torch.autograd.profiler.emit_nvtx`` hears of the same ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

import constrained_ops as co
from constrained_ops import _library

PREFIX = f"{_library.NAMESPACE}::"

# Of every transform in _library: the value and, where there is one, the log-determinant; with floats and with tensors.
USES: dict[str, list[Callable[[Tensor, bool], Any]]] = {
    "bounded": [
        lambda raw, log_det: co.bounded(raw, -1.0, 2.0, return_log_det=log_det),
        lambda raw, log_det: co.bounded(raw, raw.detach() - 1, raw.detach() + 1, return_log_det=log_det),
    ],
    "exponential": [lambda raw, log_det: co.positive(raw, kind="exp", return_log_det=log_det)],
    "simplex": [lambda raw, _: co.simplex(raw)],
    "projection": [
        lambda x, _: co.project_simplex(x),
        lambda x, _: co.project_simplex(x, weight=x.detach().square() + 1),
    ],
    "ilr": [lambda raw, log_det: co.simplex(raw, kind="ilr", return_log_det=log_det)],
    "stick_breaking": [lambda raw, log_det: co.simplex(raw, kind="stick_breaking", return_log_det=log_det)],
}


def names_in(run: Callable[[], Any]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        run()
    return {event.key for event in watched.key_averages()}


def ours_in(run: Callable[[], Any]) -> set[str]:
    return {name for name in names_in(run) if name.startswith(PREFIX)}


def kernels_of(transform: str) -> set[str]:
    return {f"{PREFIX}{transform}_{kernel.partition('.')[0]}" for kernel in _library.TRANSFORMS[transform]}


def check(transform: str) -> None:
    kernels, name = _library.TRANSFORMS[transform], f"{PREFIX}{transform}"
    for use in USES[transform]:
        for log_det in (False, True) if "forward_log_det" in kernels else (False,):
            check_use(use, log_det, name, "double_backward" in kernels)


def check_use(use: Callable[[Tensor, bool], Any], log_det: bool, name: str, twice: bool) -> None:
    raw = torch.randn(4, 5, requires_grad=True)
    values: list[Tensor] = []

    def forward() -> None:
        result = use(raw, log_det)
        values.append(sum(t.square().sum() for t in result) if log_det else result.square().sum())

    assert ours_in(forward) == {f"{name}_forward{'_log_det' if log_det else ''}"}
    assert ours_in(lambda: values[0].backward(retain_graph=True)) == {f"{name}_backward"}
    if twice:  # a projection's second order is its first again
        (grad,) = torch.autograd.grad(values[0], raw, create_graph=True)
        assert f"{name}_double_backward" in ours_in(grad.square().sum().backward)


@pytest.mark.parametrize("transform", _library.TRANSFORMS)
def test_operators(device: str, transform: str) -> None:
    check(transform)


@pytest.mark.parametrize("transform", _library.TRANSFORMS)
def test_operators_of_a_backend_asked_for(backend: str, transform: str) -> None:
    check(transform)


def test_every_operator_has_a_case_here() -> None:
    """An operator that is new to ``_library`` is to be seen by the tests above, or by name here."""
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(PREFIX)}
    seen = set().union(*(kernels_of(transform) for transform in USES))
    assert registered == seen | {f"{PREFIX}step"}


def test_the_page_names_what_there_is() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "profiling.md").read_text(encoding="utf-8")
    registered = {name.removeprefix(PREFIX).partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert set(re.findall(rf"{PREFIX}(\w+)", page)) - {"bounded"} <= registered
    folders = [*root.glob("csrc/cuda/*.cuh"), *root.glob("constrained_ops/triton/*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in folders)
    kernels = set(re.findall(r"\w+_kernel\b", page))
    assert kernels >= {"linear_kernel", "row_kernel", "bijection_kernel", "step_kernel", "elementwise_kernel"}
    assert kernels <= set(re.findall(r"(\w+_kernel)\(", sources))


OPTIMIZERS = [co.optim.ProjectedAdam, co.optim.ReparametrizedAdam]


def check_step(kind: type[Any]) -> None:
    groups = [
        {"params": [Parameter(torch.full((3, 4), 0.25))], "constraint": constraints.simplex},
        {"params": [Parameter(torch.full((8,), 0.5, dtype=torch.float64))], "constraint": constraints.unit_interval},
    ]
    optimizer = kind(groups, lr=0.01)
    for group in groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        optimizer.step()
    ranges = [event for event in watched.events() if event.name in (f"{PREFIX}step", whole := of_step(kind))]
    outer = [event for event in ranges if event.name == whole]
    inner = [event for event in ranges if event.name != whole]
    assert len(outer) == 1 and len(inner) == 2  # a launch for each dtype
    assert all(event.cpu_parent is outer[0] for event in inner)


def of_step(kind: type[Any]) -> str:
    """As torch names the steps of its own optimizers."""
    return f"Optimizer.step#{kind.__name__}.step"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps(device: str, kind: type[Any]) -> None:
    check_step(kind)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_of_a_backend_asked_for(backend: str, kind: type[Any]) -> None:
    check_step(kind)


@pytest.fixture
def triton_plan(triton_interpreter: None) -> Iterator[Any]:
    from test_step import DEVICE, gradients, make_slot

    from constrained_ops.optim._tables import TritonPlan

    slots = [make_slot("interval", (5,), (torch.float32, torch.float32), DEVICE)]
    yield TritonPlan(slots), gradients(slots)


def test_steps_of_triton(triton_plan: Any) -> None:
    from test_step import GROUPS

    plan, grads = triton_plan
    assert ours_in(lambda: plan.run(grads, GROUPS)) == {f"{PREFIX}step"}


@pytest.mark.parametrize("transform", _library.TRANSFORMS)
def test_operators_of_triton(triton_interpreter: None, transform: str) -> None:
    """Asked for by name, past the dispatcher; and by the dispatcher on a GPU, which ``test_operators`` sees."""
    with co.backend("triton"):
        raw = torch.randn(2, 3, requires_grad=True)
        assert ours_in(lambda: USES[transform][0](raw, False)) == {f"{PREFIX}{transform}_forward"}


def test_nothing_is_recorded_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch._C._profiler, "_RecordFunctionFast", unwanted)
    p = Parameter(torch.full((8,), 0.5))
    p.grad = torch.ones_like(p)
    for kind in OPTIMIZERS:
        kind([p], constraint=constraints.unit_interval).step()
    with co.backend("reference"):
        co.bounded(p, 0.0, 1.0)
