"""Where the state of large parameters lies, steps that write the parameter past the caches, and memory of their own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import implementations, through_a_file
from drawn import DTYPES
from optimizers import OPTIMIZERS, everything, run, same
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ReparametrizedAdam, _cpu, _memory

pytestmark = [
    pytest.mark.parametrize("backend", [each for each in implementations() if each.id == "cpu"], indirect=True),
    pytest.mark.usefixtures("backend"),
]
LINE = _memory.LINE
ON_RAW: dict[str, Any] = {
    "interval": constraints.interval(-1.0, 2.0),
    "lower": co.Positive(-1.0),
    "exp": co.Positive(-1.0, kind="exp"),
    "tensors": co.Bounded(torch.tensor(-1.0), torch.tensor(2.0)),
}


def within(value: Tensor, after_a_line: int) -> tuple[Tensor, Tensor]:
    """A copy that begins so many numbers after a line of cache, and the memory around it, which is full of 7."""
    per_line = LINE // value.element_size()
    memory = torch.full((value.numel() + 3 * per_line,), 7.0, dtype=value.dtype)
    begin = -(memory.data_ptr() // value.element_size()) % per_line + per_line + after_a_line
    return memory[begin : begin + value.numel()].copy_(value), memory


@pytest.mark.parametrize("after_a_line", [0, 1, 8])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constraint", ON_RAW.values(), ids=ON_RAW)
def test_past_the_caches_the_same_is_written(
    constraint: Any, dtype: torch.dtype, amsgrad: bool, after_a_line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for numel in (1, 31, 33, 64, 511, 512, 513, 1100, 50_001):
        start, results = (torch.rand(numel) / 2 + 0.2).to(dtype), []
        for cache_bytes in (0, 2**60):
            monkeypatch.setattr(_cpu, "cache_bytes", lambda cache_bytes=cache_bytes: cache_bytes)
            data, memory = within(start, after_a_line)
            optimizer = ReparametrizedAdam([Parameter(data)], lr=0.1, constraint=constraint, amsgrad=amsgrad)
            run(optimizer, 3)
            (launch,) = optimizer._prepared.launches
            assert launch.plan._plan.past_caches == (cache_bytes == 0)
            assert not (data == start).all()
            results.append(everything(optimizer))
            data.fill_(7.0)
            assert (memory == 7).all()
        assert same(*results), numel


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_passes_over_half_of_the_last_cache_goes_past_it(
    kind: type[Any], amsgrad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parameters together: gradient, parameter, moments, and raw."""
    compute = 8 if dtype == torch.float64 else 4
    bytes_each = 2 * dtype.itemsize + (3 if amsgrad else 2) * compute + (compute if kind is ReparametrizedAdam else 0)
    for more in (0, 1):
        monkeypatch.setattr(_cpu, "cache_bytes", lambda more=more: 2 * (12 + 20) * bytes_each - more)
        params = [Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in ((3, 4), (20,))]
        optimizer = kind(params, constraint=constraints.unit_interval, amsgrad=amsgrad)
        run(optimizer, 1)
        (launch,) = optimizer._prepared.launches
        assert launch.plan._plan.past_caches == bool(more)


def test_the_system_tells_how_large_the_last_cache_is() -> None:
    assert 2**18 <= _cpu.cache_bytes() <= 2**34


def place(t: Tensor) -> int:
    return t.data_ptr() // LINE * LINE % _memory.PAGE


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("constraint", [constraints.unit_interval, constraints.simplex, co.Simplex(0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_large_state_begins_elsewhere_in_a_page(
    kind: type[Any], constraint: Any, dtype: torch.dtype, transposed: bool
) -> None:
    value = torch.full((_memory.LARGE // 16, 4), 0.25, dtype=dtype)
    if isinstance(constraint, co.Simplex):
        value = value.t().contiguous()
    if transposed:
        value = value.t().contiguous().t()
    p = Parameter(value)
    optimizer = kind([p], lr=0.1, constraint=constraint, amsgrad=True)
    run(optimizer, 2)
    state = [t for name, t in optimizer.state[p].items() if name != "step"]
    for t in state:
        assert t.shape == p.shape
        assert t.stride() == torch.empty_like(p).stride()
        assert t.untyped_storage().nbytes() == _memory.LARGE + _memory.PAGE
        assert t.is_leaf
        assert not t._is_view()
    assert len({place(t) for t in (p, *state)}) == 1 + len(state)

    copied = copy.deepcopy(optimizer)
    loaded = kind([Parameter(p.detach().clone())], lr=0.1, constraint=constraint)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    before = everything(optimizer)
    for again in (copied, loaded):
        assert same(everything(again), before)
        run(again, 1, seed=1)
    assert same(everything(optimizer), before)
    run(optimizer, 1, seed=1)
    for again in (copied, loaded):
        assert same(everything(again), everything(optimizer))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_smaller_state_has_memory_of_its_size(kind: type[Any]) -> None:
    p = Parameter(torch.full((_memory.LARGE // 4 - 1,), 0.5))
    optimizer = kind([p], constraint=constraints.unit_interval)
    run(optimizer, 1)
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in optimizer.state[p].values())


# Prints how many bytes more than before a step had at its most.
PEAK = """
import re, sys
import torch
import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

def status(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

N = 2**22
F32, BF16 = torch.float32, torch.bfloat16
for kind, shape, dim, dtype, options in [
    (ProjectedAdam, (1, N), 1, F32, {}),
    (ProjectedAdam, (1, N), 1, BF16, {"amsgrad": True}),
    (ProjectedAdam, (1, N), 1, F32, {"metric": "euclidean"}),
    (ProjectedAdam, (N // 4, 4), 0, F32, {}),
    (ProjectedAdam, (N // 4, 4), 0, BF16, {"metric": "euclidean"}),
    (ProjectedAdam, (N // 4, 4), 1, F32, {}),
    (ReparametrizedAdam, (1, N), 1, F32, {}),
    (ReparametrizedAdam, (1, N), 1, BF16, {}),
    (ReparametrizedAdam, (N // 4, 4), 0, F32, {}),
    (ReparametrizedAdam, (N // 4, 4), 1, BF16, {}),
]:
    p = torch.nn.Parameter(torch.full(shape, 1 / shape[dim], dtype=dtype))
    optimizer = kind([p], lr=1e-8, constraint=co.Simplex(dim), **options)
    p.grad = torch.randn(shape).to(dtype)
    for _ in range(2):  # the first one makes the state
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        optimizer.step()
    print(status("VmHWM") - before, kind.__name__, shape, dim, dtype, options)
"""


def test_a_step_takes_no_memory_that_grows_with_the_parameter() -> None:
    """The smallest of these parameters has 8 MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell how much memory a process has had")
    # Fresh memory each time (glibc): what was freed before a step would hide what the step takes.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert [line for line in lines if int(line.split()[0]) > 2**21] == []
