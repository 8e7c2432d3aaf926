"""What only a GPU can show: streams, CUDA graphs, no waiting for the device, several devices, more than 2^31 elements.

What a kernel computes is tested elsewhere, on GPUs as on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import implementations, needs_cuda
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

pytestmark = needs_cuda

OPTIMIZERS = [ProjectedAdam, ReparametrizedAdam]


@pytest.fixture(params=[each for each in implementations() if each.id in ("cuda", "triton")], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, device = request.param
    with co.backend(name), torch.device(device):
        yield name


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "bounded": lambda raw: co.bounded(raw, -1.0, 2.5, return_log_det=True),
    "tensor bounds": lambda raw: co.bounded(raw, raw.detach()[0] - 1, raw.detach()[0] + 1),
    "positive": lambda raw: co.positive(raw, 0.5),
    "positive exp": lambda raw: co.positive(raw, kind="exp"),
    "simplex": lambda raw: co.simplex(raw),
    "simplex, dim 0": lambda raw: co.simplex(raw, 0),
    "projection": lambda x: co.project_simplex(x, total=2.0),
    "weighted projection": lambda x: co.project_simplex(x, weight=x.detach().square() + 0.5),
}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """raw -> values, and the gradient of something that depends on each of them."""

    def with_gradient(raw: Tensor) -> tuple[Tensor, ...]:
        values = FUNCTIONS[request.param](raw)
        values = values if isinstance(values, tuple) else (values,)
        (grad,) = torch.autograd.grad(sum(value.cos().sum() for value in values), raw)
        return (*(value.detach() for value in values), grad)

    return with_gradient


def assert_all_close(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def some_groups() -> list[dict[str, Any]]:
    """A parameter of each kind, in groups with options of their own."""
    start = torch.softmax(torch.randn(9, 33), -1)
    return [
        {"params": [Parameter(torch.rand(1000))], "constraint": constraints.unit_interval},
        {"params": [Parameter(start.clone())], "constraint": constraints.simplex, "amsgrad": True},
        {"params": [Parameter(start.t().contiguous())], "constraint": co.Simplex(0), "weight_decay": 0.01},
        {"params": [Parameter(torch.rand(7, 5) + 1)], "constraint": constraints.greater_than(torch.rand(7, 1))},
        {"params": [Parameter(torch.randn(3))], "constraint": None},
    ]


def parameters_of(groups: list[dict[str, Any]]) -> list[Parameter]:
    return [p for group in groups for p in group["params"]]


def copy_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]} for group in groups]


def loss_of(params: list[Parameter], targets: list[Tensor]) -> Tensor:
    return sum(((p - target) ** 2).sum() for p, target in zip(params, targets, strict=True))  # type: ignore[return-value]


# --- Streams ----------------------------------------------------------------------------------------------------------

LONG = 200_000_000  # cycles, a tenth of a second: what does not wait for its stream runs meanwhile


def test_operators_run_on_the_current_stream(function: Any) -> None:
    raw = torch.zeros(64, 40, requires_grad=True)
    function(raw)  # compiled by now
    values = torch.randn(64, 40)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        with torch.no_grad():
            raw.copy_(values)
        got = function(raw)
    torch.cuda.synchronize()
    assert_all_close(got, function(raw))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_runs_on_the_current_stream(kind: type[Any]) -> None:
    groups = some_groups()
    twins = copy_of(groups)
    params, others = parameters_of(groups), parameters_of(twins)
    optimizer, twin = kind(groups, lr=0.01), kind(twins, lr=0.01)
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
    optimizer.step()
    twin.step()
    grads = [torch.randn_like(p) for p in params]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for p, g in zip(params, grads, strict=True):
            p.grad.copy_(g)
        for group in optimizer.param_groups:
            group["lr"] = 0.1  # sent to the device on this stream
        optimizer.step()
    torch.cuda.synchronize()
    for q, g in zip(others, grads, strict=True):
        q.grad.copy_(g)
    for group in twin.param_groups:
        group["lr"] = 0.1
    twin.step()
    assert_all_close(params, others)


# --- Nobody waits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[bool], None]]:
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


def test_operators_do_not_wait_for_the_device(function: Any, waiting_is_an_error: Any) -> None:
    raw = torch.randn(64, 40, requires_grad=True)
    function(raw)
    waiting_is_an_error(True)
    function(raw)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_do_not_wait_for_the_device(kind: type[Any], capturable: bool, waiting_is_an_error: Any) -> None:
    groups = some_groups()
    optimizer = kind(groups, lr=0.01, capturable=capturable)
    for step in range(5):
        waiting_is_an_error(False)
        grads = [torch.randn_like(p) for p in parameters_of(groups)]
        waiting_is_an_error(step > 0)  # plans are made in the first
        for p, g in zip(parameters_of(groups), grads, strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("constraint", [None, constraints.unit_interval, constraints.simplex], ids=str)
def test_a_step_needs_no_memory(kind: type[Any], constraint: Any) -> None:
    p = Parameter(torch.full((2**18, 4), 0.25))
    optimizer = kind([p], constraint=constraint)
    p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 4096


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_graph_of_operators(function: Any) -> None:
    raw = torch.randn(64, 40, requires_grad=True)
    graph, results = captured(lambda: function(raw))
    for _ in range(3):
        with torch.no_grad():
            raw.normal_()
        graph.replay()
        assert_all_close(results, function(raw))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_graph_of_steps(kind: type[Any]) -> None:
    """Replayed with other gradients and another learning rate, it goes where steps go that are not captured."""
    groups = some_groups()
    twins = copy_of(groups)
    params, others = parameters_of(groups), parameters_of(twins)
    lr = torch.tensor(0.05)
    optimizer, twin = kind(groups, lr=lr, capturable=True), kind(twins, lr=0.05)
    for p, q in zip(params, others, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    graph, _ = captured(optimizer.step)
    for _ in range(3):
        twin.step()
    for value in (0.05, 0.01, 0.2, 0.0, 0.1):
        lr.fill_(value)
        for group in twin.param_groups:
            group["lr"] = value
        for p, q in zip(params, others, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        graph.replay()
        twin.step()
        torch.cuda.synchronize()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert {optimizer.state[p]["step"].item() for p in params} == {8.0}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_graph_of_training(kind: type[Any]) -> None:
    """Forward, backward and step in one graph, whose gradients live in its own memory; then steps without it."""
    groups = some_groups()
    twins = copy_of(groups)
    params, others = parameters_of(groups), parameters_of(twins)
    targets = [p.detach().roll(1).clone() for p in params]
    optimizer, twin = kind(groups, lr=0.01, capturable=True), kind(twins, lr=0.01)

    def train(params: list[Parameter], optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(params, targets).backward()
        optimizer.step()

    graph, _ = captured(lambda: train(params, optimizer))
    for _ in range(4):
        graph.replay()
    train(params, optimizer)
    graph.replay()
    torch.cuda.synchronize()
    for _ in range(3 + 4 + 1 + 1):
        train(others, twin)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert {optimizer.state[p]["step"].item() for p in params} == {9.0}


def test_a_graph_outlives_the_plan_that_it_was_captured_from() -> None:
    p = Parameter(torch.full((40, 25), 0.5))
    p.grad = torch.ones_like(p)
    optimizer = ProjectedAdam([p], lr=0.01, constraint=constraints.unit_interval, capturable=True)
    graph, _ = captured(optimizer.step)
    grad, p.grad = p.grad, torch.ones(25, 40).t()  # another layout, and so another plan
    optimizer.step()
    rubbish = [torch.full((64,), math.nan) for _ in range(1000)]  # where the first one's tables were, had they gone
    before = p.detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    assert len(rubbish) == 1000 and grad is not p.grad
    torch.testing.assert_close(p.detach(), before - 0.01, rtol=0, atol=1e-4)


def test_several_graphs_of_one_optimizer() -> None:
    """Captured one after the other, with no step in between, each with gradients of its own."""
    p = Parameter(torch.full((1000,), 0.5))
    grads = [torch.full((1000,), sign) for sign in (1.0, -1.0, 1.0)]
    optimizer = ProjectedAdam([p], lr=0.01, betas=(0.0, 0.0), constraint=constraints.unit_interval, capturable=True)
    graphs = []
    for _ in range(3):
        p.grad = grads[0]
        optimizer.step()
    for grad in grads:
        p.grad = grad
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graphs.append(graph)
    start = p.detach().clone()
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(p.detach(), start - 0.01, rtol=0, atol=1e-4)


def test_a_first_step_is_not_captured() -> None:
    p = Parameter(torch.full((1000,), 0.5))
    p.grad = torch.ones_like(p)
    optimizer = ProjectedAdam([p], constraint=constraints.unit_interval, capturable=True)
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state


# --- Several devices --------------------------------------------------------------------------------------------------

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@several
def test_operators_on_a_device_that_is_not_the_current_one(function: Any) -> None:
    raw = torch.randn(64, 40, device="cuda:0", requires_grad=True)
    other = raw.detach().to("cuda:1").requires_grad_()
    with torch.cuda.device(0):
        results = function(other)
    assert all(result.device.index == 1 for result in results)
    assert_all_close([result.cpu() for result in results], [result.cpu() for result in function(raw)])


@several
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_on_two_devices(kind: type[Any]) -> None:
    params = [Parameter(torch.full((1000,), 0.5, device=f"cuda:{i}")) for i in (0, 1)]
    optimizer = kind(params, lr=0.01, constraint=constraints.unit_interval)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        g = torch.randn(1000, generator=generator, device="cpu")
        for p in params:
            p.grad = g.to(p.device)
        optimizer.step()
    assert torch.equal(params[0].cpu(), params[1].cpu())


# --- Beyond 32 bits ---------------------------------------------------------------------------------------------------

MANY = 2**31 + 2**20


@pytest.fixture
def memory() -> Iterator[Callable[[float], None]]:
    """Skips where fewer bytes are free."""

    def needs(bytes_: float) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < 1.1 * bytes_:
            pytest.skip(f"needs {bytes_ / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")

    yield needs
    torch.cuda.empty_cache()


def ends(t: Tensor) -> Tensor:
    """The first and the last of the first dimension."""
    return torch.cat([t[:1024], t[-1024:]])


def ramp(*shape: int) -> Tensor:
    """bfloat16 numbers in (-4, 4) that differ from place to place."""
    t = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for start in range(0, len(t), 2**26):
        part = t[start : start + 2**26]
        part.copy_((torch.arange(start, start + len(part)) % 1021) / 130 - 3.9)
    return t.view(shape)


def test_more_than_32_bits_of_elements(memory: Any) -> None:
    memory(2 * 6 * MANY)
    raw = ramp(MANY).requires_grad_()
    x = co.bounded(raw, -1.0, 2.0)
    (grad,) = torch.autograd.grad(x, raw, raw.detach())
    small = ends(raw.detach()).requires_grad_()
    want = co.bounded(small, -1.0, 2.0)
    assert torch.equal(ends(x), want)
    assert torch.equal(ends(grad), torch.autograd.grad(want, small, small.detach())[0])
    every_other = raw.detach().view(-1, 2)[:, 1]
    assert torch.equal(ends(co.bounded(every_other, -1.0, 2.0)), ends(x.detach().view(-1, 2)[:, 1]))


@pytest.mark.parametrize("inner", [1, 1024])
def test_more_than_32_bits_of_rows(memory: Any, inner: int) -> None:
    memory(2 * 6 * MANY)
    length = 8
    raw = ramp(MANY // length // inner, length, inner).requires_grad_()
    for function in (lambda t: co.simplex(t, 1), lambda t: co.project_simplex(t, 1)):
        x = function(raw)
        (grad,) = torch.autograd.grad(x, raw, raw.detach())
        small = ends(raw.detach()).requires_grad_()
        want = function(small)
        assert torch.equal(ends(x), want)
        assert torch.equal(ends(grad), torch.autograd.grad(want, small, small.detach())[0])
        del x, grad


@pytest.mark.parametrize(("kind", "bytes_each"), [(ProjectedAdam, 12), (ReparametrizedAdam, 44)])
def test_a_step_of_more_than_32_bits_of_elements(memory: Any, kind: type[Any], bytes_each: int) -> None:
    """A first raw takes plain PyTorch, with all its temporaries."""
    memory(bytes_each * MANY)
    p = Parameter(ramp(MANY))
    g = ramp(MANY).neg_()
    start = ends(p.detach())
    small = Parameter(start.clone())
    for leaf, grad in ((p, g), (small, ends(g))):
        leaf.grad = grad
        optimizer = kind([leaf], lr=0.25, constraint=constraints.interval(-8.0, 8.0), state_dtype=torch.bfloat16)
        for _ in range(2):
            optimizer.step()
        del optimizer
    assert torch.equal(ends(p.detach()), small.detach())
    assert not torch.equal(small.detach(), start)
