"""Several threads at once, processes forked after use, and ten thousand steps in memory that does not grow."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter
from torch.utils.data import DataLoader, Dataset

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

linux = pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self").exists(), reason="needs Linux")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operators(seed: int, n: int = 40_000) -> list[Tensor]:
    """Values and gradients of every operator, on tensors large enough for several threads."""
    g = torch.Generator().manual_seed(seed)
    results = []
    raw = torch.randn(n // 8, 8, generator=g).requires_grad_()
    weight = torch.rand(n // 8, 8, generator=g) + 0.5
    upper = weight.detach().clone().requires_grad_()
    for x in (
        co.bounded(raw, -1.0, 2.0),
        co.bounded(raw, -1.0, upper),
        co.positive(raw),
        co.positive(raw, kind="exp"),
        co.simplex(raw),
        co.simplex(raw, 0),
        co.project_simplex(raw),
        co.project_simplex(raw, 0),
        co.project_simplex(raw, weight=weight),
        co.bounded_inverse(co.bounded(raw, 0.0, 1.0), 0.0, 1.0),
    ):
        wanted = torch.autograd.grad(x, [raw, upper], weight, allow_unused=True)
        results += [x.detach(), *(t for t in wanted if t is not None)]
    return results


def train(kind: type[Any], seed: int, steps: int = 10) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    starts = [
        torch.rand(40_000, generator=g),
        torch.softmax(torch.randn(5000, 8, generator=g), -1),
        torch.rand(3, generator=g),
    ]
    params = [Parameter(start) for start in starts]
    given = [constraints.unit_interval, constraints.simplex, None]
    optimizer = kind([{"params": [p], "constraint": c} for p, c in zip(params, given, strict=True)], lr=0.01)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach() for p in params]


WORK: list[Callable[[], list[Tensor]]] = [
    lambda: operators(0),
    lambda: operators(1),
    lambda: train(ProjectedAdam, 2),
    lambda: train(ReparametrizedAdam, 3),
]


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_operators_and_optimizers_in_several_threads_at_once() -> None:
    alone = [work() for work in WORK]
    together: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(WORK))

    def run(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            together[i] = WORK[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(WORK))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(together) == list(range(len(WORK)))
    for i, expected in enumerate(alone):
        assert all_equal(together[i], expected), i


def exit_status(pid: int, seconds: float) -> int | None:
    """Of a child; ``None`` if it has not ended in time, in which case it is ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_after_use_computes_the_same() -> None:
    """As data loaders do: torch's threads do not live on in the child, which has to go on alone."""
    expected = [work() for work in WORK]  # in two threads
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # as in a worker of a DataLoader
            status = 0 if all(map(all_equal, (work() for work in WORK), expected)) else 2
        finally:
            os._exit(status)
    assert exit_status(pid, 60) == 0, "not 0: other numbers (2), an exception (1), or it hung (None)"
    assert all_equal(WORK[0](), expected[0])  # the parent is as it was


class Transformed(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([t.reshape(-1) for t in operators(index)])


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader_call_operators() -> None:
    here = [Transformed()[i] for i in range(4)]
    loader = DataLoader(Transformed(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    assert all_equal(list(loader), here)


def resident() -> int:
    """Bytes of memory that this process has."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_ten_thousand_steps_in_flat_memory(kind: type[Any]) -> None:
    starts = [torch.rand(20), torch.softmax(torch.randn(4, 5), -1), torch.rand(()), torch.rand(6, 4)[:, ::2]]
    given = [constraints.unit_interval, constraints.simplex, None, constraints.positive]
    params = [Parameter(start) for start in starts]
    optimizer = kind([{"params": [p], "constraint": c} for p, c in zip(params, given, strict=True)], lr=1e-3)

    def steps(count: int) -> None:
        for t in range(count):
            for p in params:
                p.grad = torch.sin(p.detach() * (t % 7))  # a new tensor in each step
            if t % 50 == 0:
                params[0].grad = None  # a plan made anew
            optimizer.step()

    steps(1000)
    gc.collect()
    before = resident()
    steps(9_000)
    gc.collect()
    assert resident() - before <= 2 << 20  # the plan alone, leaked in each step, would be more
    assert all(p.isfinite().all() for p in params)
    tracemalloc.start()
    try:
        steps(200)
        gc.collect()
        first = tracemalloc.get_traced_memory()[0]
        steps(1000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - first <= 10_000  # bytes of Python objects
    finally:
        tracemalloc.stop()
