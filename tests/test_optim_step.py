"""The compiled step against the reference step: kinds, dtypes, options, sizes, layouts, threads, lengths of run.

On the CPU, and where there is a GPU, there by CUDA and by Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import implementations
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

INF = float("inf")
SIZES = [0, 1, 7, 31, 64, 65, 1000, 100_003]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1, "maximize": True},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9)},
}


def lower_of(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 5 == 3, -INF, -1 - torch.arange(n) % 3)


def upper_of(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 7 == 3, INF, 1.5 + torch.arange(n) % 4)


ELEMENTWISE: dict[str, Callable[[int], Any]] = {
    "none": lambda n: None,
    "interval": lambda n: constraints.interval(-1.0, 1.5),
    "lower": lambda n: constraints.greater_than(-1.0),
    "upper": lambda n: constraints.less_than(1.5),
    "exp": lambda n: co.Positive(-1.0, kind="exp"),
    "finite tensors": lambda n: co.Bounded(lower_of(n).clamp(min=-4), upper_of(n).clamp(max=6)),
    "tensors": lambda n: co.Bounded(lower_of(n), upper_of(n)),
    "a tensor and a float": lambda n: co.Bounded(lower_of(n), 1.5),
    "exp with a tensor": lambda n: co.Positive(lower_of(n).clamp(min=-4), kind="exp"),
}
ROWS = [(0, 3), (1, 1), (5, 1), (64, 4), (33, 31), (3, 129), (2, 5000), (1, 100_003), (100, 257)]
KINDS = [(kind, name) for kind in (ProjectedAdam, ReparametrizedAdam) for name in ELEMENTWISE]


COMPILED = [each for each in implementations() if not each.id.startswith("reference")]
on_the_cpu = pytest.mark.parametrize("compiled", [each for each in COMPILED if each.id == "cpu"], indirect=True)


@pytest.fixture(params=COMPILED, autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As conftest's ``backend``, without the reference."""
    name, device = request.param
    monkeypatch.setattr(Pair, "backends", (name, "reference"))
    with co.backend(name), torch.device(device):
        yield name


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Pair:
    """Two optimizers over equal parameters: one takes the compiled step, the other that of the reference."""

    backends = ("cpu", "reference")

    def __init__(self, kind: type[Any], starts: list[Tensor], given: list[Any], **options: Any) -> None:
        self.params = [[Parameter(start.clone()) for start in starts] for _ in range(2)]
        self.optimizers = [
            kind([{"params": [p], "constraint": c} for p, c in zip(params, given, strict=True)], **options)
            for params in self.params
        ]

    def step(self, grads: list[Tensor]) -> None:
        for params, optimizer, backend in zip(self.params, self.optimizers, self.backends, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            with co.backend(backend):
                optimizer.step()

    def assert_close(self, sixteen: float = 1, full: float = 64) -> None:
        """Parameters and state to so many units of rounding, of 16 bits or of more.

        What was rounded to 16 bits the other way may come back, by weight decay, to state in float32.
        """
        for p, q in zip(*self.params, strict=True):
            states = [optimizer.state[leaf] for optimizer, leaf in zip(self.optimizers, (p, q), strict=True)]
            assert states[0].keys() == states[1].keys()
            for name, got, want in [("param", p, q), *((n, states[0][n], states[1][n]) for n in states[0])]:
                assert got.dtype == want.dtype and got.stride() == want.stride()
                scale = torch.ones(()) if name in ("param", "raw") else want.detach()
                if "exp_avg" in name:  # a sum in which gradients may cancel, or means along a row be taken off
                    v = states[1]["exp_avg_sq"].double()
                    at_most = v.max() if p.dim() > 1 and p.numel() else v
                    scale = v.sqrt().maximum(at_most.sqrt()) if name == "exp_avg" else (v * at_most).sqrt()
                bits = torch.finfo(p.dtype).bits, torch.finfo(got.dtype).bits
                ulps = sixteen if bits[1] == 16 else 4096 if bits[0] == 16 else full
                assert_close(got.detach(), want.detach(), ulps, scale, f"{name} {tuple(p.shape)}")


def assert_close(got: Tensor, want: Tensor, ulps: float, scale: Tensor, what: str) -> None:
    """Within so many units of rounding, of ``want`` or of ``scale`` where that is larger."""
    assert torch.equal(got.isnan(), want.isnan()), what
    assert torch.equal(got.isinf(), want.isinf()), what
    info = torch.finfo(got.dtype)
    got, want = got.double(), want.double()
    error = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num()
    unit = info.eps * want.abs().maximum(scale.double().abs()).clamp(min=info.smallest_normal)
    off = (error / unit).nan_to_num()
    assert got.numel() == 0 or off.max() <= ulps, f"{what}: {off.max():.3g} units"


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 10 ** (2 * torch.rand(shape))).to(dtype)


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_elementwise_steps(kind: type[Any], name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = SIZES if not options else SIZES[:-1]
    pair = Pair(
        kind,
        [(2 * torch.rand(n) - 0.9).to(dtype) for n in sizes],
        [ELEMENTWISE[name](n) for n in sizes],
        lr=0.05,
        **options,
    )
    for _ in range(3):
        pair.step([noise((n,), dtype) for n in sizes])
    pair.assert_close()


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
@pytest.mark.parametrize("constraint", [None, constraints.interval(-1.0, 1.5), constraints.simplex], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_in_sixteen_bits(kind: type[Any], constraint: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    shapes = ROWS if constraint is constraints.simplex else [(n,) for n in SIZES]
    shapes = [shape for shape in shapes if shape[-1] < 100 or len(shape) == 1]  # v underflows in a long softmax's
    starts = [start_on_rows(shape, dtype) if len(shape) == 2 else torch.rand(shape).to(dtype) for shape in shapes]
    pair = Pair(kind, starts, [constraint] * len(shapes), lr=0.01, state_dtype=dtype, **options)
    for _ in range(3):
        pair.step([noise(shape, dtype) for shape in shapes])
    pair.assert_close(4)


def start_on_rows(shape: tuple[int, ...], dtype: torch.dtype, dim: int = -1) -> Tensor:
    return torch.softmax(torch.randn(shape), dim).to(dtype)


@pytest.mark.parametrize("dim", [1, 0])
@pytest.mark.parametrize("kind", ["adam", "euclidean", "softmax"])
def test_steps_along_rows(kind: str, dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [shape if dim else shape[::-1] for shape in ROWS] + ([(3, 40_000), (600, 100)] if dim == 0 else [])
    starts = [start_on_rows(shape, dtype, dim) for shape in shapes]
    more = {} if kind == "softmax" else {"metric": kind}
    optimizer = ReparametrizedAdam if kind == "softmax" else ProjectedAdam
    pair = Pair(optimizer, starts, [co.Simplex(dim)] * len(shapes), lr=0.01, **more, **options)
    for _ in range(3):
        pair.step([noise(shape, dtype) for shape in shapes])
    pair.assert_close(full=512 if kind == "softmax" else 64)
    for p in pair.params[0]:
        assert (p >= 0).all() and (kind != "softmax" or (p > 0).all())
        if torch.finfo(dtype).bits > 16:
            torch.testing.assert_close(p.detach().double().sum(dim), torch.ones(p.sum(dim).shape).double(),
                                   atol=32 * torch.finfo(dtype).eps, rtol=0)  # fmt: skip


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_mixed_lists(kind: type[Any], two_threads: None) -> None:
    """Everything at once, tiny and large, in several dtypes and counts of steps."""
    starts: list[Tensor] = []
    given: list[Any] = []
    for i in range(60):
        shape = [(3,), (17, 5), (4, 1000), (2, 3, 4), (), (200_000,)][i % 6]
        starts.append(torch.softmax(torch.randn(shape), -1 if shape else 0).to(DTYPES[i % 3]))
        given.append([None, constraints.simplex, constraints.unit_interval, constraints.positive][(i // 6) % 4])
    pair = Pair(kind, starts, given, lr=0.01)
    for t in range(5):
        grads = [noise(tuple(start.shape), start.dtype) for start in starts]
        pair.step([None if t == 2 and i % 7 == 3 else g for i, g in enumerate(grads)])  # type: ignore[list-item]
    for (p, q), start in zip(zip(*pair.params, strict=True), starts, strict=True):
        sixteen = torch.finfo(start.dtype).bits == 16
        assert_close(p.detach(), q.detach(), 1 if sixteen else 64, torch.ones(()), str(start.shape))
    assert {float(optimizer.state[p]["step"]) for optimizer in pair.optimizers[:1] for p in pair.params[0]} == {4, 5}


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
@pytest.mark.parametrize("constraint", [None, constraints.unit_interval, co.Simplex(1)], ids=repr)
def test_gradients_in_another_layout(kind: type[Any], constraint: Any, dtype: torch.dtype) -> None:
    starts = [start_on_rows((6, 40), dtype), start_on_rows((4, 5, 6), dtype, 1), start_on_rows((5, 40), dtype)]
    grads = [noise((40, 6), dtype).t(), noise((5, 6, 4), dtype).permute(2, 0, 1), noise((1, 1), dtype).expand(5, 40)]
    pair = Pair(kind, starts, [constraint] * 3, lr=0.01)
    for _ in range(3):
        pair.step(grads)
    pair.assert_close(full=512)


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
@pytest.mark.parametrize("name", ["none", "interval", "lower", "tensors", "simplex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_no_numbers(kind: type[Any], name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    start = start_on_rows((8, 40), dtype)
    given = constraints.simplex if name == "simplex" else None
    if name != "simplex":
        start, given = start.view(-1), ELEMENTWISE[name](320)
    pair = Pair(kind, [start], [given], lr=0.01, **options)
    for t in range(3):
        g = noise((8, 40), dtype)
        if t == 1:
            g[1, 3], g[2, 39], g[3, 0] = float("nan"), INF, -INF
        pair.step([g.view(start.shape)])
    pair.assert_close(full=512)
    assert pair.params[0][0].isnan().any()
    assert not pair.params[0][0].isnan().all()


@on_the_cpu
@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_the_number_of_threads_changes_nothing(kind: type[Any], two_threads: None) -> None:
    shapes = [(100_003,), (7,), (1000, 33), (2, 40_000), (40, 3, 700)]
    given = [constraints.unit_interval, None, constraints.simplex, constraints.simplex, co.Simplex(1)]
    starts = [start_on_rows(shape, torch.float32, 1 if len(shape) == 3 else -1) for shape in shapes]
    # Drawn once: where PyTorch's own threads meet, pow gives other results.
    grads = [[noise(shape, torch.float32) for shape in shapes] for _ in range(3)]
    results = []
    for threads in (1, 2, 5):  # 5: some wait for a core, and others take their work
        torch.set_num_threads(threads)
        params = [Parameter(start.clone()) for start in starts]
        groups = [{"params": [p], "constraint": c} for p, c in zip(params, given, strict=True)]
        optimizer = kind(groups, lr=0.01)
        for drawn in grads:
            for p, grad in zip(params, drawn, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        results.append(params)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@on_the_cpu
def test_two_optimizers_at_once(two_threads: None) -> None:
    def train(seed: int, to: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        p = Parameter(torch.rand(50_000, generator=generator))
        optimizer = ReparametrizedAdam([p], lr=0.01, constraint=constraints.unit_interval)
        for _ in range(20):
            p.grad = torch.randn(50_000, generator=generator)
            optimizer.step()
        to.append(p.detach())

    alone: list[Tensor] = []
    together: list[list[Tensor]] = [[], []]
    for seed in (0, 1):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together[seed])) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, alone, [each[0] for each in together]))


@pytest.mark.parametrize("name", ["none", "interval", "lower", "exp", "simplex"])
@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_long_runs_stay_together(kind: type[Any], name: str) -> None:
    """1000 steps of a least-squares problem, whose gradients follow from where each of the two is."""
    given = constraints.simplex if name == "simplex" else ELEMENTWISE[name](9)
    start = start_on_rows((20, 9), torch.float64)
    target = start_on_rows((20, 9), torch.float64)
    pair = Pair(kind, [start], [given], lr=1e-2)
    for _ in range(1000):
        for params, optimizer, backend in zip(pair.params, pair.optimizers, pair.backends, strict=True):
            params[0].grad = (params[0].detach() - target) * torch.arange(1, 10)
            with co.backend(backend):
                optimizer.step()
    torch.testing.assert_close(pair.params[0][0], pair.params[1][0], atol=1e-11, rtol=0)


def test_overlapping_parameters_are_refused_before_anything_changes() -> None:
    p = Parameter(torch.zeros(1).expand(5))
    optimizer = ProjectedAdam([p], constraint=constraints.unit_interval)
    p.grad = torch.ones(5)
    message = r"^ProjectedAdam: parameter 0 of group 0, of shape \(5,\), overlaps itself in memory$"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert p[0] == 0
    assert not optimizer.state


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_steps_count_as_writes(kind: type[Any]) -> None:
    with_gaps = Parameter(torch.rand(4, 6)[:, ::2])
    params = [Parameter(torch.rand(3)), Parameter(torch.rand(2, 2)), with_gaps]
    optimizer = kind(params, constraint=constraints.unit_interval)
    before = [p._version for p in params]
    for step in range(1, 4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [p._version for p in params] == [version + step for version in before]
        assert not optimizer._prepared.any_written_by_others()
        assert not optimizer._prepared.written_by_others()


@on_the_cpu
@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
@pytest.mark.parametrize("constraint", [None, constraints.unit_interval, constraints.simplex], ids=str)
def test_a_step_needs_no_memory_that_grows_with_the_parameters(kind: type[Any], constraint: Any) -> None:
    p = Parameter(start_on_rows((2**14, 4), torch.float32))
    optimizer = kind([p], constraint=constraint)
    p.grad = torch.ones_like(p)

    def allocated() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        return max((event.cpu_memory_usage for event in profile.events()), default=0)

    optimizer.step()
    assert allocated() <= 64
    with co.backend("reference"):
        optimizer.step()
        assert allocated() >= 4 * p.numel()
