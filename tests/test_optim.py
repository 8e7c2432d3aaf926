"""Where the optimizers go, step by step: against torch.optim.Adam, against an oracle in float64, and to the optimum."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam import Adam, project_by_sorting
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam
from constrained_ops.optim._reference import FLOOR

OPTIMIZERS = [ProjectedAdam, ReparametrizedAdam]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "betas and eps": {"betas": (0.8, 0.95), "eps": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.9)},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "all": {
        "amsgrad": True,
        "maximize": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "betas": (0.7, 0.8),
    },
}


pytestmark = pytest.mark.usefixtures("backend")  # every implementation takes every test


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients whose sizes differ from element to element, so that no two are preconditioned alike."""
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[-1])).to(dtype)


def set_grads(params: list[Any], like: list[Any] | None = None) -> None:
    for i, p in enumerate(params):
        p.grad = like[i].grad.clone() if like else noise(*p.shape, dtype=p.dtype)


def copy_of(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def close(got: Tensor, want: Tensor, ulps: float, scale: float = 0.0) -> None:
    """Within so many units of rounding of ``want``, or of ``scale`` where that is larger."""
    eps = torch.finfo(got.dtype).eps
    error = (got.detach().double() - want.detach().double()).abs()
    allowed = ulps * eps * want.detach().double().abs().clamp(min=scale)
    assert (error <= allowed).all(), f"{(error / (eps * want.double().abs().clamp(min=scale))).max():.3g} units"


# --- No constraint: Adam ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_constraint_it_is_adam(kind: type[Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    """100 steps; in 16 bits with state in the same dtype, each step from the state that Adam is in."""
    ours = [Parameter(torch.randn(shape).to(dtype)) for shape in [(3, 4), (5,)]]
    theirs = copy_of(ours)
    sixteen = torch.finfo(dtype).bits == 16
    optimizer = kind(ours, lr=1e-2, **options, **({"state_dtype": dtype} if sixteen else {}))
    adam = torch.optim.Adam(theirs, lr=1e-2, fused=sixteen, **options)
    for _ in range(100):
        set_grads(ours)
        set_grads(theirs, like=ours)
        optimizer.step()
        adam.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q, 1 if sixteen else 100, scale=1.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state, wanted = optimizer.state[p][name], adam.state[q][name]
                scale = torch.finfo(dtype).smallest_normal if sixteen else float(wanted.abs().max())
                if sixteen and name == "exp_avg":  # where its terms cancel, what is left is the rounding of float32
                    scale = 2 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps * float(wanted.abs().max())
                close(state, wanted, 1 if sixteen else 100, scale)
                if sixteen:
                    state.copy_(wanted)
            if sixteen:
                p.data.copy_(q)
    assert [float(optimizer.state[p]["step"]) for p in ours] == [100.0] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_have_state_in_float32_unless_told_otherwise(dtype: torch.dtype) -> None:
    p = Parameter(torch.randn(4, 8).to(dtype))
    optimizer, oracle = ProjectedAdam([p], lr=1e-2), Adam(lr=1e-2)
    for _ in range(20):
        set_grads([p])
        want, _ = oracle.step(p.grad, p.detach())
        optimizer.step()
        close(p, want, 0.51, scale=torch.finfo(dtype).smallest_normal)
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
        close(optimizer.state[p]["exp_avg_sq"], oracle.v, 100)


# --- Boxes: Adam, then clamp ------------------------------------------------------------------------------------------

INF = float("inf")


def tensor_bounds() -> tuple[Tensor, Tensor]:
    return torch.tensor([-0.5, -INF, 0.0, -INF]), torch.tensor([0.5, 0.25, INF, INF])


def boxes() -> dict[str, tuple[Any, Any, Any]]:
    """Constraint, lower, upper."""
    lower, upper = tensor_bounds()
    column = torch.tensor([[-0.5], [0.0], [0.25]])
    return {
        "interval": (constraints.interval(-0.5, 0.25), -0.5, 0.25),
        "unit interval": (constraints.unit_interval, 0.0, 1.0),
        "nonnegative": (constraints.nonnegative, 0.0, INF),
        "greater than": (constraints.greater_than(-0.25), -0.25, INF),
        "less than": (constraints.less_than(0.125), -INF, 0.125),
        "independent": (constraints.independent(constraints.interval(0.0, 0.5), 1), 0.0, 0.5),
        "tensors": (constraints.interval(lower, upper), lower, upper),
        "a tensor and a float": (co.Bounded(column, 0.5), column, 0.5),
        "positive": (co.Positive(0.125), 0.125, INF),
    }


@pytest.mark.parametrize("box", boxes())
def test_boxes_are_adam_and_clamp(box: str, dtype: torch.dtype) -> None:
    constraint, lower, upper = boxes()[box]
    lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in (lower, upper))
    start = torch.randn(3, 4).double().clamp(lower, upper).to(dtype)
    p, oracle = Parameter(start.clone()), Adam(lr=0.05)
    optimizer = ProjectedAdam([p], lr=0.05, constraint=constraint)
    clamped = 0
    for _ in range(30):
        set_grads([p])
        free, _ = oracle.step(p.grad, p.detach())
        want = free.clamp(lower, upper)
        optimizer.step()
        close(p, want, 0.51 if torch.finfo(dtype).bits == 16 else 8, scale=0.1)
        assert ((lower <= p) & (p <= upper)).all()
        clamped += int((want != free).sum())
    assert clamped > 0


def test_a_bound_is_the_nearest_number_of_the_dtype_as_in_clamp(dtype: torch.dtype) -> None:
    p = Parameter(torch.full((3,), 0.1, dtype=torch.float64).to(dtype))
    optimizer = ProjectedAdam([p], lr=1.0, constraint=constraints.interval(-0.3, 0.1))
    p.grad = torch.tensor([-1.0, 1.0, 0.0]).to(dtype)
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([0.1, -0.3, 0.1], dtype=torch.float64).to(dtype))


# --- The simplex: Adam, then the projection in its metric -------------------------------------------------------------


def assert_optimal(x: Tensor, y: Tensor, d: Tensor, tolerance: float) -> None:
    """The KKT conditions of the projection of y: feasible, and d (y - x) one number where x > 0, nowhere more."""
    x, y, d = x.double(), y.double(), d.double()
    assert (x >= 0).all()
    assert ((x.sum(-1) - 1).abs() <= tolerance).all()
    pull = d * (y - x)
    multiplier = torch.where(x > 0, pull, -INF).amax(-1, keepdim=True)
    slack = tolerance * (d.amax(-1, keepdim=True) + d)
    assert (torch.where(x > 0, (pull - multiplier).abs() <= slack, pull <= multiplier + slack)).all()


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
@pytest.mark.parametrize("columns", [1, 2, 5, 33])
def test_a_simplex_is_adam_and_the_projection(columns: int, metric: str, dtype: torch.dtype) -> None:
    p = Parameter(torch.softmax(torch.randn(6, columns), -1).to(dtype))
    options = {"lr": 0.05, "amsgrad": columns == 5, "weight_decay": 0.1}
    optimizer = ProjectedAdam([p], constraint=constraints.simplex, metric=metric, **options)
    oracle = Adam(**options, floor=FLOOR if metric == "adam" else 0.0)
    sixteen = torch.finfo(dtype).bits == 16
    for _ in range(30):
        p.grad = noise(6, columns, dtype=dtype)
        p.grad[:, columns // 2 + 1 :] *= 1e-5  # below the floor
        y, d = oracle.step(p.grad, p.detach())
        d = d if metric == "adam" else torch.ones_like(d)
        want = project_by_sorting(y, d)
        optimizer.step()
        close(p, want, 0.51 if sixteen else 64, scale=1 / columns if not sixteen else 0.1)
        assert_optimal(p.detach(), y, d, 64 * torch.finfo(dtype).eps)
    assert columns == 1 or (p == 0).any()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_simplex_along_another_dimension(dim: int) -> None:
    p = Parameter(torch.softmax(torch.randn(3, 4, 5), dim))
    q = Parameter(p.detach().movedim(dim, -1).clone())
    for x, constraint in ((p, co.Simplex(dim)), (q, constraints.simplex)):
        optimizer = ProjectedAdam([x], lr=0.05, constraint=constraint)
        torch.manual_seed(1)
        for _ in range(10):
            g = noise(3, 4, 5)
            x.grad = g if x is p else g.movedim(dim, -1).clone()
            optimizer.step()
    torch.testing.assert_close(p.detach().movedim(dim, -1), q.detach(), atol=1e-6, rtol=0)


def test_a_coordinate_that_never_saw_a_gradient_does_not_absorb_all() -> None:
    """With d = eps it would take up what all others lose, to the last digit; a thousandth of the largest d it is."""
    p = Parameter(torch.full((1, 4), 0.25))
    optimizer = ProjectedAdam([p], lr=0.01, constraint=constraints.simplex)
    p.grad = torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    optimizer.step()
    y, u = torch.tensor([[0.24, 0.24, 0.24, 0.25]]).double(), torch.tensor([[1.0, 0.5, 0.25, 250.0]]).double()
    torch.testing.assert_close(p.detach().double(), y + u * 0.03 / u.sum(), atol=1e-6, rtol=0)


# --- Optima are fixed points ------------------------------------------------------------------------------------------

PROBLEMS, SIZE = 24, 10


def quadratics(box: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random (Q, c, optimum) of 1/2 x'Qx + c'x over the simplex or [0, 1]: c is what makes the optimum one (KKT)."""
    a = torch.randn(PROBLEMS, SIZE, SIZE, dtype=torch.float64) * 10 ** torch.rand(PROBLEMS, 1, SIZE).double()
    q = a.mT @ a / SIZE + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    inside, rise = torch.rand(PROBLEMS, SIZE) < 0.5, torch.rand(PROBLEMS, SIZE).double() * 3
    inside[:, 0] = True
    if box:
        at_upper = ~inside & (torch.rand(PROBLEMS, SIZE) < 0.5)
        x = torch.where(inside, torch.rand(PROBLEMS, SIZE).double(), at_upper.double())
        gradient = torch.where(inside, 0.0, torch.where(at_upper, -rise, rise))
    else:
        x = torch.where(inside, torch.rand(PROBLEMS, SIZE).double() + 0.05, 0.0)
        x = x / x.sum(-1, keepdim=True)
        gradient = torch.randn(PROBLEMS, 1, dtype=torch.float64) + torch.where(inside, 0.0, rise)
    return q, gradient - (q @ x[..., None])[..., 0], x


def linear() -> tuple[Tensor, Tensor, Tensor]:
    c = torch.stack([torch.randperm(SIZE) for _ in range(PROBLEMS)]).double() / SIZE + torch.randn(PROBLEMS, 1).double()
    return torch.zeros(PROBLEMS, SIZE, SIZE).double(), c, torch.nn.functional.one_hot(c.argmin(-1), SIZE).double()


def gap_after(
    problem: tuple[Tensor, Tensor, Tensor], constraint: Any, metric: str, steps: int, sigma: float = 0.0
) -> Tensor:
    """f - f*, relative to what it was at the start; steps decline to nothing."""
    q, c, best = problem

    def f(x: Tensor) -> Tensor:
        return ((q @ x[..., None])[..., 0] / 2 + c).mul(x).sum(-1)

    x = Parameter(torch.full((PROBLEMS, SIZE), 1 / SIZE))
    start = f(x.detach().double())
    optimizer = ProjectedAdam([x], lr=0.1, constraint=constraint, metric=metric)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(1e-6, 1 - t / steps) ** 3)
    q32, c32, spread = q.float(), c.float(), sigma * torch.linspace(0.1, 3, SIZE)
    for _ in range(steps):
        x.grad = (q32 @ x.detach()[..., None])[..., 0] + c32 + spread * torch.randn(PROBLEMS, SIZE)
        optimizer.step()
        schedule.step()
    return (f(x.detach().double()) - f(best)) / (start - f(best))


@pytest.mark.parametrize("make", [lambda: quadratics(box=False), linear], ids=["quadratic", "linear"])
def test_on_the_simplex_the_metric_of_adam_reaches_the_optimum_and_the_euclidean_does_not(
    make: Callable[[], tuple[Tensor, Tensor, Tensor]],
) -> None:
    problem = make()
    assert gap_after(problem, constraints.simplex, "adam", 1200).max() < 1e-6
    assert gap_after(problem, constraints.simplex, "euclidean", 1200).median() > 1e-3


@pytest.mark.parametrize("make", [lambda: quadratics(box=False), linear], ids=["quadratic", "linear"])
def test_so_it_is_with_noise(make: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
    problem = make()
    ours, euclidean = (gap_after(problem, constraints.simplex, metric, 1000, 0.1) for metric in ("adam", "euclidean"))
    assert ours.median() < 1e-3
    assert euclidean.median() > 10 * ours.median()


def test_in_a_box_the_optimum_is_reached() -> None:
    problem = quadratics(box=True)
    assert gap_after(problem, constraints.unit_interval, "adam", 1500).max() < 1e-6
    assert gap_after(problem, constraints.unit_interval, "adam", 1000, 0.5).median() < 1e-2


# --- The reparametrised step: autograd through the transform, and Adam on raw -----------------------------------------

ROWS, COLUMNS = 3, 4


def transforms() -> dict[str, tuple[Any, Callable[[Tensor], Tensor]]]:
    lower, upper = tensor_bounds()
    ramp = torch.arange(4.0)
    return {
        "both bounds": (constraints.interval(-1.0, 2.5), lambda raw: co.bounded(raw, -1.0, 2.5)),
        "lower": (constraints.positive, co.positive),
        "upper": (constraints.less_than(3.0), lambda raw: co.bounded(raw, -INF, 3.0)),
        "tensors": (constraints.interval(lower, upper), lambda raw: co.bounded(raw, lower, upper)),
        "exp": (co.Positive(0.5, kind="exp"), lambda raw: co.positive(raw, 0.5, kind="exp")),
        "exp with a tensor": (co.Positive(ramp, kind="exp"), lambda raw: co.positive(raw, ramp, kind="exp")),
        "simplex": (constraints.simplex, co.simplex),
        "simplex, dim 0": (co.Simplex(0), lambda raw: co.simplex(raw, 0)),
    }


@pytest.fixture(params=transforms())
def transform(backend: str, request: pytest.FixtureRequest) -> tuple[Any, Callable[[Tensor], Tensor]]:
    return transforms()[request.param]


@pytest.mark.parametrize(
    ("options", "dtype"), [("plain", torch.float32), ("all", torch.float64)], indirect=["options"], ids=str
)
def test_the_trajectory_is_that_of_adam_on_raw(
    transform: tuple[Any, Callable[[Tensor], Tensor]], options: dict[str, Any], dtype: torch.dtype
) -> None:
    constraint, forward = transform
    start = torch.randn(ROWS, COLUMNS, dtype=dtype)
    x = Parameter(forward(start))
    optimizer = ReparametrizedAdam([x], lr=1e-2, constraint=constraint, **options)
    raw = Parameter(optimizer_raw(optimizer, x))
    torch.testing.assert_close(forward(raw), x)
    adam = torch.optim.Adam([raw], lr=1e-2, **options)
    target = forward(torch.randn(ROWS, COLUMNS, dtype=dtype))
    sign = -1 if options.get("maximize") else 1
    for _ in range(1000):
        for leaf, value, each in ((x, x, optimizer), (raw, forward(raw), adam)):
            leaf.grad = None
            (sign * ((value - target) ** 2).sum()).backward()
            each.step()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(optimizer.state[x]["raw"], raw.detach(), atol=2e4 * eps, rtol=2e4 * eps)
    torch.testing.assert_close(x.detach(), forward(raw.detach()), atol=2e4 * eps, rtol=2e4 * eps)


def optimizer_raw(optimizer: ReparametrizedAdam, x: Parameter) -> Tensor:
    """The raw that the optimizer starts from: what a step with lr = 0 leaves, the moments set back."""
    group = optimizer.param_groups[0]
    lr, group["lr"], x.grad = group["lr"], 0.0, torch.zeros_like(x)
    optimizer.step()
    group["lr"] = lr
    raw: Tensor = optimizer.state[x]["raw"].clone()
    optimizer.state[x] = {"raw": optimizer.state[x]["raw"]} | {
        "step": torch.zeros(()), "exp_avg": torch.zeros_like(raw), "exp_avg_sq": torch.zeros_like(raw),
    }  # fmt: skip
    if group["amsgrad"]:
        optimizer.state[x]["max_exp_avg_sq"] = torch.zeros_like(raw)
    return raw


def test_each_step_is_that_of_adam_on_raw(
    transform: tuple[Any, Callable[[Tensor], Tensor]], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """All options and dtypes: one step at a time, against the derivative in float64 by autograd."""
    constraint, forward = transform
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = Parameter(forward(torch.randn(ROWS, COLUMNS)).to(dtype))
    optimizer, oracle = ReparametrizedAdam([x], lr=1e-2, constraint=constraint, **options), Adam(lr=1e-2, **options)
    raw = optimizer_raw(optimizer, x).double()
    for _ in range(10):
        x.grad = noise(ROWS, COLUMNS, dtype=dtype)
        leaf = raw.clone().requires_grad_()
        (g,) = torch.autograd.grad(forward(leaf), leaf, x.grad.double())
        want, _ = oracle.step(g, raw)
        optimizer.step()
        got = optimizer.state[x]["raw"]
        assert got.dtype == compute
        close(got, want, 2000, scale=1.0)  # Adam's first steps divide a derivative's rounding error by the derivative
        # Two units of |x| or of the distance to the nearer bound, whichever is larger (test_accuracy): about 1 here.
        sixteen = torch.finfo(dtype).bits == 16
        close(x, forward(got.double()), 0.51 if sixteen else 2, scale=0.1 if sixteen else 1.0)
        raw = got.double()
        oracle.m, oracle.v = optimizer.state[x]["exp_avg"].double(), optimizer.state[x]["exp_avg_sq"].double()


def test_values_on_and_next_to_the_bounds_are_strictly_inside_after_a_step(dtype: torch.dtype) -> None:
    x = Parameter(torch.tensor([0.0, 0.25, 1.0]).to(dtype))
    optimizer = ReparametrizedAdam([x], lr=1e-3, constraint=constraints.unit_interval)
    for _ in range(3):
        x.grad = torch.tensor([1.0, 1.0, -1.0]).to(dtype)
        optimizer.step()
        assert ((x > 0) & (x < 1)).all()


# --- Someone else writes to the parameter -----------------------------------------------------------------------------


def test_raw_follows_what_others_write() -> None:
    x = Parameter(torch.full((4,), 0.5))
    optimizer = ReparametrizedAdam([x], lr=1e-2, constraint=constraints.unit_interval)
    for _ in range(3):
        x.grad = torch.ones(4)
        optimizer.step()
    raw = optimizer.state[x]["raw"].clone()
    with torch.no_grad():
        x[1] = 0.875
    x.grad = torch.zeros(4)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    after = optimizer.state[x]["raw"]
    assert torch.equal(after[[0, 2, 3]], raw[[0, 2, 3]])  # where nobody wrote, not a digit is lost
    torch.testing.assert_close(after[1], torch.logit(torch.tensor(0.875)))
    torch.testing.assert_close(x.detach()[1], torch.tensor(0.875))


def test_a_new_tensor_behind_a_parameter_is_noticed() -> None:
    x, p = Parameter(torch.full((4,), 0.5)), Parameter(torch.full((4,), 0.5))
    for leaf, kind in ((x, ReparametrizedAdam), (p, ProjectedAdam)):
        optimizer = kind([leaf], lr=1e-2, constraint=constraints.unit_interval)
        for _ in range(2):
            leaf.grad = torch.ones(4)
            optimizer.step()
        old = leaf.data
        before = old.clone()
        leaf.data = torch.full((4,), 0.75)
        optimizer.step()
        assert torch.equal(old, before)
        assert ((leaf > 0.73) & (leaf < 0.75)).all()


def test_a_value_written_outside_is_an_error_and_nothing_changes() -> None:
    x, y = Parameter(torch.full((4,), 0.5)), Parameter(torch.full((2,), 0.5))
    optimizer = ReparametrizedAdam([("y", y), ("x", x)], lr=1e-2, constraint=constraints.unit_interval)
    set_grads([x, y])
    optimizer.step()
    with torch.no_grad():
        x[2] = 1.5
    before = [t.clone() for t in (x, y, *optimizer.state[x].values(), *optimizer.state[y].values())]
    with pytest.raises(ValueError, match=r"^ReparametrizedAdam: parameter 1 \('x'\) of group 0 must lie in \[0.0, 1.0\]"
                       r", got 1.5$"):  # fmt: skip
        optimizer.step()
    after = [x, y, *optimizer.state[x].values(), *optimizer.state[y].values()]
    assert all(map(torch.equal, before, after))


def test_the_step_counts_as_a_write_for_autograd() -> None:
    """A graph that saved the parameter must not be differentiated with its new value."""
    for kind in OPTIMIZERS:
        x = Parameter(torch.full((4,), 0.5))
        optimizer = kind([x], constraint=constraints.unit_interval)
        for _ in range(2):
            loss = (x * x).sum()
            loss.backward(retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# --- Layouts ----------------------------------------------------------------------------------------------------------


def layouts() -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """value -> (tensor of that value in some layout, the memory around it)."""

    def strided(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.full((t.shape[0] * 2 + 1, t.shape[1] * 3 + 2), 7.0, dtype=t.dtype)
        view = memory[1::2, 2::3]
        return view.copy_(t), memory

    def transposed(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = t.t().contiguous()
        return memory.t(), memory

    def unaligned(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.full((t.numel() + 3,), 7.0, dtype=t.dtype)
        return memory[1:-2].view(t.shape).copy_(t), memory

    return {
        "contiguous": lambda t: (t.clone(), t),
        "strided": strided,
        "transposed": transposed,
        "unaligned": unaligned,
    }


@pytest.mark.parametrize("constraint", [None, constraints.unit_interval, constraints.simplex, co.Simplex(0)], ids=repr)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_layouts_of_parameter_and_gradient(kind: type[Any], constraint: Any) -> None:
    value, grads = torch.softmax(torch.randn(5, 4), 0 if isinstance(constraint, co.Simplex) else -1), noise(3, 5, 4)
    grads[2] = grads[2, :1, :1]
    want = Parameter(value.clone())
    optimizer = kind([want], lr=1e-2, constraint=constraint)
    for g in grads:
        want.grad = g.clone()
        optimizer.step()
    for name, place in layouts().items():
        for grad_name, place_grad in layouts().items():
            data, memory = place(value)
            with torch.no_grad():
                outside = memory.clone().as_strided(data.shape, data.stride(), data.storage_offset())
                around = memory.sum() - outside.sum()
            p = Parameter(data)
            assert p.stride() == data.stride() and p.data_ptr() == data.data_ptr()
            optimizer = kind([p], lr=1e-2, constraint=constraint)
            for i, g in enumerate(grads):
                p.grad = g[:1, :1].expand(5, 4) if i == 2 and grad_name != "contiguous" else place_grad(g)[0]
                optimizer.step()
            torch.testing.assert_close(p.detach(), want.detach(), atol=1e-6, rtol=1e-6, msg=f"{name}, {grad_name}")
            if name in ("strided", "unaligned"):
                assert float(memory.sum() - p.detach().sum()) == pytest.approx(float(around), abs=1e-3)


def test_nothing_outside_a_strided_view_is_written() -> None:
    memory = torch.full((9, 10), 0.5)
    p = Parameter(memory[1::2, 2::3])
    for kind in OPTIMIZERS:
        optimizer = kind([p], lr=1e-2, constraint=constraints.unit_interval)
        p.grad = torch.ones(4, 3)
        optimizer.step()
    inside = torch.zeros(9, 10, dtype=torch.bool)
    inside[1::2, 2::3] = True
    assert (memory[inside] < 0.5).all()
    assert (memory[~inside] == 0.5).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("places", [(0,), (1,), (3,), (0, 2, 4)])
def test_parameters_without_elements_are_harmless_anywhere(kind: type[Any], places: tuple[int, ...]) -> None:
    full = [Parameter(torch.full((3, n + 1), 0.5)) for n in range(3)]
    alone = copy_of(full)
    mixed = list(full)
    for place in places:
        mixed.insert(place, Parameter(torch.zeros(2, 0, 3)))
    groups = [{"params": mixed[:2]}, {"params": mixed[2:]}]
    ours, theirs = (kind(each, lr=1e-2, constraint=constraints.unit_interval) for each in (groups, alone))
    for _ in range(3):
        set_grads(mixed)
        set_grads(alone, like=full)
        ours.step()
        theirs.step()
    assert all(map(torch.equal, full, alone))


def test_scalars_are_parameters_too() -> None:
    for kind in OPTIMIZERS:
        p, q = Parameter(torch.tensor(0.5)), Parameter(torch.tensor(1.0))
        optimizer = kind([{"params": [p], "constraint": constraints.unit_interval},
                          {"params": [q], "constraint": constraints.simplex}], lr=1.0)  # fmt: skip
        for _ in range(3):
            p.grad, q.grad = torch.tensor(1.0), torch.tensor(5.0)
            optimizer.step()
        assert 0 <= p < 0.3
        assert q == 1


# --- All in one optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_mixed_groups_go_where_each_would_go_alone(kind: type[Any]) -> None:
    """Constraints, options, dtypes, sizes, lr = 0, frozen parameters and missing gradients, which come and go."""
    recipes: list[dict[str, Any]] = [
        {"constraint": constraints.unit_interval, "weight_decay": 0.1},
        {"constraint": None, "lr": 0.3},
        {"constraint": constraints.simplex, "amsgrad": True},
        {"constraint": co.Positive(kind="exp"), "lr": 0.0},
        {"constraint": constraints.positive, "maximize": True, "betas": (0.5, 0.5)},
        {"constraint": co.Simplex(0), "decoupled_weight_decay": True, "weight_decay": 0.5},
    ]
    together: list[dict[str, Any]] = []
    alone: list[tuple[Any, list[Parameter]]] = []
    for i, recipe in enumerate(recipes):
        dtypes = [torch.float32, torch.float64, torch.bfloat16]
        params = [Parameter(torch.softmax(torch.randn(7 + i, 5), 0 if i == 5 else -1).to(dtype)) for dtype in dtypes]
        params.append(Parameter(params[0].detach().clone(), requires_grad=False))
        together.append({"params": params, **recipe})
        copies = copy_of(params)
        alone.append((kind(copies, **recipe), copies))
    optimizer = kind(together, lr=1e-3)
    for t in range(8):
        for group, (single, copies) in zip(together, alone, strict=True):
            for j, (p, q) in enumerate(zip(group["params"], copies, strict=True)):
                missing = not p.requires_grad or ((j + t) % 3 == 0 and t > 4)
                p.grad = None if missing else noise(*p.shape, dtype=p.dtype)
                q.grad = None if missing else p.grad.clone()
            single.step()
        optimizer.step()
        for group, (_, copies) in zip(together, alone, strict=True):
            for p, q in zip(group["params"], copies, strict=True):
                assert torch.equal(p, q)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_lr_zero_leaves_parameters_where_they_are(kind: type[Any]) -> None:
    p = Parameter(torch.rand(50))
    before = p.detach().clone()
    optimizer = kind([p], lr=0.0, constraint=constraints.unit_interval)
    for _ in range(5):
        set_grads([p])
        optimizer.step()
    torch.testing.assert_close(p.detach(), before, atol=1e-6 if kind is ReparametrizedAdam else 0, rtol=0)
    assert (optimizer.state[p]["exp_avg"] != 0).all()


def test_backends_may_change_between_steps(backend: str) -> None:
    p = Parameter(torch.rand(50))
    optimizer = ProjectedAdam([p], lr=1e-2, constraint=constraints.unit_interval)
    for name in (backend, "reference", backend):
        with co.backend(name) if name else contextlib.nullcontext():
            set_grads([p])
            optimizer.step()
    assert optimizer.state[p]["step"] == 3
