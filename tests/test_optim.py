"""Where the optimizers go, step by step: against torch.optim.Adam and against an oracle in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam import Adam, project_by_sorting
from optimizers import OPTIMIZERS, copy_of, noise, set_grads
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam
from constrained_ops.optim._reference import FLOOR

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
@pytest.mark.parametrize("columns", [1, 2, 4, 5, 8, 16, 33, 40])
def test_a_simplex_is_adam_and_the_projection(columns: int, metric: str, dtype: torch.dtype) -> None:
    p = Parameter(torch.softmax(torch.randn(6, columns), -1).to(dtype))
    options = {"lr": 0.05, "amsgrad": columns in (4, 5, 16, 40), "weight_decay": 0.1}
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


@pytest.mark.parametrize("columns", [2, 3, 4, 8, 16, 31, 32, 33, 100, 300, 1100])
@pytest.mark.parametrize("lr", [1e-2, 1.0, 1e3, 1e8])
def test_a_simplex_that_a_step_leaves_by_far(lr: float, columns: int) -> None:
    torch.manual_seed(0)
    p = Parameter(torch.cat([torch.softmax(3 * torch.randn(6, columns), -1), torch.eye(columns)[:3]]))
    optimizer, oracle = ProjectedAdam([p], lr=lr, constraint=constraints.simplex), Adam(lr=lr, floor=FLOOR)
    for _ in range(4):
        p.grad = noise(*p.shape) * torch.exp(4 * torch.randn(p.shape))
        y, d = oracle.step(p.grad, p.detach())
        want = project_by_sorting(y, d)
        optimizer.step()
        assert ((p.double() - want).abs() <= 4e-7 * (1 + y.abs().amax(-1, keepdim=True))).all()
        assert (p >= 0).all() and ((p.double().sum(-1) - 1).abs() <= 4e-6).all()


@pytest.mark.parametrize("columns", [2, 4, 8, 16, 33])
def test_a_row_of_a_simplex_goes_where_it_would_go_elsewhere(columns: int) -> None:
    """Rows are projected many at a time, of which some take more readings than others."""
    order, like = torch.randperm(150), torch.softmax(3 * torch.randn(150, columns), -1)
    p, q = Parameter(like), Parameter(like[order])
    optimizers = [ProjectedAdam([x], lr=0.1, constraint=constraints.simplex) for x in (p, q)]
    for _ in range(8):
        p.grad = noise(150, columns) * torch.exp(2 * torch.randn(150, 1))
        q.grad = p.grad[order]
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(q, p[order])


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
