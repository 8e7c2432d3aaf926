"""One vector for a whole model: layout, values, gradients, log-determinant, and those who walk on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, through_a_file
from scipy.optimize import minimize
from test_selective_gradients import Kernels
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import constraints
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import constrained_ops as co

F64 = torch.float64


class Model(nn.Module):
    """Of every family, out of order, with the odd shapes between them."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        kinds = {"dtype": dtype, "device": DEVICE}
        self.weight = nn.Parameter(torch.randn(3, 2, **kinds))
        self.mix = nn.Parameter(torch.rand(4, 3, **kinds).softmax(-1))
        self.scale = nn.Parameter(torch.rand((), **kinds) + 0.5)
        self.empty = nn.Parameter(torch.empty(0, 2, **kinds))
        self.rate = nn.Parameter(torch.rand(5, **kinds) * 0.8 + 0.1)
        self.columns = nn.Parameter(torch.rand(3, 2, **kinds).softmax(0))
        self.offset = nn.Parameter(torch.rand(2, **kinds) + 1)
        self.width = nn.Parameter(torch.rand(2, 2, **kinds) + 0.1)
        self.broken = nn.Parameter(torch.rand(4, **kinds).softmax(-1))
        self.frozen = nn.Parameter(torch.ones(2, **kinds), requires_grad=False)

    def forward(self) -> Tensor:
        return sum((p * torch.arange(1, p.numel() + 1, device=p.device).view(p.shape)).sin().sum() for p in self._all())

    def _all(self) -> list[Tensor]:
        return [p for p in self.parameters() if p.requires_grad or p is not self.frozen]


CONSTRAINTS: dict[str, Any] = {
    "mix": constraints.simplex,
    "scale": constraints.positive,
    "rate": constraints.unit_interval,
    "empty": constraints.positive,
    "columns": co.Simplex(0, kind="ilr"),
    "offset": co.Bounded(torch.tensor([-math.inf, 0.5]), torch.tensor([3.0, math.inf])),
    "width": co.Positive(0.05, kind="exp"),
    "broken": co.Simplex(kind="stick_breaking"),
}


def flat_model(**options: Any) -> tuple[Model, co.FlatParameters]:
    torch.manual_seed(0)
    model = Model()
    return model, co.FlatParameters(model, CONSTRAINTS, **options)


# --- Values ---------------------------------------------------------------------------------------------------------


def test_the_vector_of_a_model_gives_its_parameters_back() -> None:
    model, flat = flat_model()
    theta = flat.initial()
    assert theta.is_leaf and theta.requires_grad and theta.shape == (flat.numel,) == (6 + 8 + 1 + 5 + 4 + 2 + 4 + 3,)
    x = flat.constrain(theta)
    assert list(x) == [name for name, p in model.named_parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(x[name], p.detach())
            assert x[name].dtype == p.dtype and x[name].shape == p.shape
    assert sum(part.stop - part.start for part in flat.slices.values()) == flat.numel
    assert sorted(i for part in flat.slices.values() for i in range(flat.numel)[part]) == list(range(flat.numel))


def test_each_parameter_depends_on_its_part_alone() -> None:
    _, flat = flat_model()
    jacobian = jacrev(flat.constrain)(flat.initial().detach())
    for name, part in flat.slices.items():
        rows = jacobian[name].reshape(-1, flat.numel)
        outside = torch.ones(flat.numel, dtype=torch.bool, device=DEVICE)
        outside[part] = False
        assert (rows[:, outside] == 0).all() and ((rows[:, part] != 0).any(0)).all()


def test_values_are_those_of_the_transforms() -> None:
    _, flat = flat_model()
    theta = torch.randn(flat.numel, dtype=F64, device=DEVICE) * 3
    x, raw = flat.constrain(theta), {name: theta[part] for name, part in flat.slices.items()}
    assert torch.equal(x["weight"], raw["weight"].view(3, 2))
    assert torch.equal(x["scale"], co.positive(raw["scale"]).view(()))
    assert torch.equal(x["rate"], co.bounded(raw["rate"], 0.0, 1.0))
    assert torch.equal(x["width"], co.positive(raw["width"], 0.05, kind="exp").view(2, 2))
    assert torch.equal(x["mix"], co.simplex(raw["mix"].view(4, 2), kind="ilr"))
    assert torch.equal(x["columns"], co.simplex(raw["columns"].view(2, 2), kind="ilr").T)
    assert torch.equal(x["broken"], co.simplex(raw["broken"], kind="stick_breaking"))
    offset = CONSTRAINTS["offset"]
    assert torch.equal(x["offset"], co.bounded(raw["offset"], offset.lower.to(DEVICE), offset.upper.to(DEVICE)))


@pytest.mark.parametrize("far", [20.0, 1e4, math.inf])
def test_mixed_dtypes_stay_strictly_inside(far: float) -> None:
    model = nn.Module()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        model.register_parameter(f"box_{name}", nn.Parameter(torch.full((2,), 0.5, dtype=dtype, device=DEVICE)))
        model.register_parameter(f"mix_{name}", nn.Parameter(torch.full((2,), 0.5, dtype=dtype, device=DEVICE)))
    sets = {name: constraints.simplex if "mix" in name else constraints.unit_interval for name, _ in _named(model)}
    flat = co.FlatParameters(model, sets)
    assert flat.dtype == torch.float32
    for sign in (-1, 1):
        theta = torch.full((flat.numel,), sign * far, device=DEVICE, requires_grad=True)
        for name, x in flat.constrain(theta).items():
            assert x.dtype == model.get_parameter(name).dtype
            if "box" in name or math.isfinite(far):  # infinite logits are no point of a simplex
                assert (x > 0).all()
            if "box" in name:
                assert (x < 1).all()
    theta = flat.initial()
    x = flat.constrain(theta)
    x["box_bfloat16"].sum().backward()
    assert torch.equal(theta.grad[flat.slices["box_bfloat16"]], torch.full((2,), 0.25, device=DEVICE))


def test_theta_of_another_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must hold the parameters' "):
        flat_model(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'float64'"):
        flat_model(dtype="float64")
    model32 = Model(torch.float32)
    flat = co.FlatParameters(model32, {"rate": constraints.unit_interval}, dtype=F64)
    theta = flat.initial()
    x = flat.constrain(theta)
    assert theta.dtype == F64 and all(t.dtype == torch.float32 for t in x.values())
    sum(t.sum() for t in x.values()).backward()
    assert theta.grad.dtype == F64


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def test_a_value_on_a_bound_becomes_a_finite_raw() -> None:
    model = nn.Module()
    model.p = nn.Parameter(torch.tensor([0.0, 0.5, 1.0], device=DEVICE))
    flat = co.FlatParameters(model, {"p": constraints.unit_interval})
    theta = flat.initial()
    assert theta.isfinite().all()
    torch.testing.assert_close(flat.constrain(theta)["p"], model.p.detach())


def test_all_views_of_one_family_are_one_kernel_forward_and_one_backward() -> None:
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.rand(3, 2, device=DEVICE)) for i in range(50)})
    flat = co.FlatParameters(model, {name: constraints.positive for name, _ in _named(model)})
    theta = flat.initial()
    with Kernels() as kernels:
        x = flat.constrain(theta)
        torch.stack(list(x.values())).sum().backward()
    assert [name for name, _ in kernels.ran] == ["bounded_forward", "bounded_backward"]
    assert len({t.untyped_storage().data_ptr() for t in x.values()}) == 1


# --- Derivatives ----------------------------------------------------------------------------------------------------


def test_the_gradient_arrives_where_vector_to_parameters_cuts_the_graph() -> None:
    model, flat = flat_model()
    theta = flat.initial()
    functional_call(model, flat.constrain(theta), ()).backward()
    assert theta.grad is not None and (theta.grad != 0).all()

    vector = parameters_to_vector(model.parameters()).detach().requires_grad_()
    vector_to_parameters(vector, model.parameters())
    model().backward()
    assert vector.grad is None


def test_derivatives() -> None:
    _, flat = flat_model()
    theta = flat.initial()

    def everything(theta: Tensor) -> tuple[Tensor, ...]:
        x, log_det = flat.constrain(theta, return_log_det=True)
        return *(t for t in x.values() if t.numel()), log_det

    assert gradcheck(everything, theta)
    assert gradgradcheck(everything, theta)


def test_log_det_is_that_of_the_jacobian() -> None:
    """Of a simplex all coordinates but the last count, along its own dimension."""
    _, flat = flat_model()
    theta = torch.randn(flat.numel, dtype=F64, device=DEVICE)

    def square(theta: Tensor) -> Tensor:
        x = flat.constrain(theta)
        cut = {"mix": x["mix"][:, :-1], "columns": x["columns"][:-1], "broken": x["broken"][:-1]}
        return torch.cat([(x | cut)[name].reshape(-1) for name in flat.slices])

    _, log_det = flat.constrain(theta, return_log_det=True)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacrev(square)(theta)).logabsdet)


def test_func_transforms_and_compile() -> None:
    _, flat = flat_model()
    thetas = torch.randn(3, flat.numel, dtype=F64, device=DEVICE)
    together = vmap(flat.constrain)(thetas)
    for i, theta in enumerate(thetas):
        for name, x in flat.constrain(theta).items():
            torch.testing.assert_close(together[name][i], x)

    def energy(theta: Tensor) -> Tensor:
        x, log_det = flat.constrain(theta, return_log_det=True)
        return x["mix"].pow(2).sum() + x["rate"].sum() * x["scale"] + log_det

    second = hessian(energy)(thetas[0])
    torch.testing.assert_close(second, second.T)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(thetas[0]), energy(thetas[0]))


# --- Models ---------------------------------------------------------------------------------------------------------


def test_tied_weights_have_one_part() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).to(DEVICE)
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.abs_()
    flat = co.FlatParameters(model, {"1.weight": constraints.positive})
    assert flat.numel == 9 and list(flat.slices) == ["0.weight"]
    theta = flat.initial()
    x = flat.constrain(theta)
    inputs = torch.randn(2, 3, device=DEVICE)
    out = functional_call(model, x, inputs)
    torch.testing.assert_close(out, inputs @ x["0.weight"].T @ x["0.weight"].T)
    with pytest.raises(ValueError, match=r"1\.weight and 0\.weight are one parameter"):
        co.FlatParameters(model, {"0.weight": constraints.positive, "1.weight": constraints.positive})


def test_load_writes_all_but_the_frozen() -> None:
    model, flat = flat_model()
    frozen = model.frozen.detach().clone()
    theta = torch.randn(flat.numel, dtype=F64, device=DEVICE)
    flat.load_(theta)
    for name, x in flat.constrain(theta).items():
        assert torch.equal(model.get_parameter(name), x)
    assert torch.equal(model.frozen, frozen) and model.rate.requires_grad
    torch.testing.assert_close(flat.initial().detach(), theta)


def test_theta_survives_saving_and_a_new_model() -> None:
    _, flat = flat_model()
    theta = torch.randn(flat.numel, dtype=F64, device=DEVICE)
    other = co.FlatParameters(Model(), CONSTRAINTS)
    for name, x in other.constrain(through_a_file(theta)).items():
        assert torch.equal(x, flat.constrain(theta)[name])


def test_a_model_without_trainable_parameters() -> None:
    flat = co.FlatParameters(nn.ReLU())
    theta = flat.initial()
    x, log_det = flat.constrain(theta, return_log_det=True)
    assert theta.shape == (0,) and x == {} and log_det == 0


# --- Who walks on it ------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Weights, rates and a floor, whose best values are known: those of ``target``."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((3,), 1 / 3, dtype=F64, device=DEVICE))
        self.rate = nn.Parameter(torch.full((2,), 0.5, dtype=F64, device=DEVICE))
        self.shift = nn.Parameter(torch.zeros(2, dtype=F64, device=DEVICE))

    def forward(self) -> Tensor:
        target = torch.tensor([0.6, 0.3, 0.1, 0.2, 0.9, -1.0, 2.0], dtype=F64, device=DEVICE)
        return (torch.cat([self.mix, self.rate, self.shift]) - target).pow(2).sum()


SETS = {"mix": constraints.simplex, "rate": constraints.unit_interval}


@pytest.mark.parametrize("walker", ["Adam", "LBFGS", "SciPy"])
def test_optimizers_reach_the_optimum(walker: str) -> None:
    model = Mixture()
    flat = co.FlatParameters(model, SETS)
    theta = flat.initial()

    def loss(theta: Tensor) -> Tensor:
        return functional_call(model, flat.constrain(theta), ())

    if walker == "SciPy":

        def value_and_gradient(numbers: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            at = torch.from_numpy(numbers).to(DEVICE).requires_grad_()
            value = loss(at)
            (gradient,) = torch.autograd.grad(value, at)
            return value.item(), gradient.cpu().numpy()

        found = minimize(value_and_gradient, theta.detach().cpu().numpy(), jac=True, method="L-BFGS-B", tol=1e-14)
        theta = torch.from_numpy(found.x).to(DEVICE)
    else:
        optimizer: Any = (
            torch.optim.Adam([theta], lr=0.1)
            if walker == "Adam"
            else torch.optim.LBFGS([theta], line_search_fn="strong_wolfe")
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(theta)
            value.backward()
            return value

        for _ in range(400 if walker == "Adam" else 10):
            optimizer.step(closure)
    flat.load_(theta)
    assert model().item() < 1e-9
    torch.testing.assert_close(model.rate.detach().cpu(), torch.tensor([0.2, 0.9], dtype=F64), atol=1e-4, rtol=0)


def test_hamiltonian_monte_carlo() -> None:
    """Leapfrog keeps the energy, and draws have the moments of Gamma and Dirichlet: the log-det is right."""
    torch.manual_seed(0)
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(1, dtype=F64))
    model.mix = nn.Parameter(torch.full((3,), 1 / 3, dtype=F64))
    flat = co.FlatParameters(model, {"scale": constraints.positive, "mix": constraints.simplex})
    shape, rate, concentration = 3.0, 2.0, torch.tensor([2.0, 3.0, 5.0], dtype=F64)

    def potential(theta: Tensor) -> Tensor:
        x, log_det = flat.constrain(theta, return_log_det=True)
        gamma = (shape - 1) * x["scale"].log().sum() - rate * x["scale"].sum()
        return -(gamma + ((concentration - 1) * x["mix"].log()).sum() + log_det)

    chains = 256
    slope, energy = vmap(torch.func.grad(potential)), vmap(potential)
    theta = flat.initial().detach().expand(chains, -1) + 0.1 * torch.randn(chains, flat.numel, dtype=F64)
    draws, accepted = [], 0.0
    for draw in range(60):
        p, q = torch.randn_like(theta), theta
        before = energy(q) + p.pow(2).sum(-1) / 2
        p = p - 0.1 * slope(q)
        for step in range(10):
            q = q + 0.2 * p
            p = p - (0.1 if step == 9 else 0.2) * slope(q)
        change = energy(q) + p.pow(2).sum(-1) / 2 - before
        accept = torch.rand(chains, dtype=F64).log() < -change
        accepted += accept.double().mean().item() / 60
        theta = torch.where(accept[:, None], q, theta)
        if draw >= 20:
            draws.append(vmap(flat.constrain)(theta))
    assert accepted > 0.9
    scale = torch.cat([d["scale"] for d in draws])
    mix = torch.cat([d["mix"] for d in draws])
    assert abs(scale.mean().item() - shape / rate) < 0.05
    assert abs(scale.var().item() - shape / rate**2) < 0.1
    torch.testing.assert_close(mix.mean(0), concentration / 10, atol=0.01, rtol=0)


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    model, flat = flat_model()
    with pytest.raises(KeyError, match=r"'weigth' is no parameter of the module.*'weight'"):
        co.FlatParameters(model, {"weigth": constraints.positive})
    with pytest.raises(NotImplementedError, match="supported are interval"):
        co.FlatParameters(model, {"weight": constraints.lower_cholesky})
    with pytest.raises(ValueError, match=r"theta must have shape \(33,\), torch.float64.*got \(3,\), torch.float64"):
        flat.constrain(torch.zeros(3, dtype=F64, device=DEVICE))
    with pytest.raises(ValueError, match=r"got \(33,\), torch.float32"):
        flat.constrain(torch.zeros(33, device=DEVICE))
    with pytest.raises(TypeError, match="theta must be a Tensor, got list"):
        flat.constrain([0.0] * 33)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="count must be float16"):
        module = nn.Module()
        module.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        co.FlatParameters(module)
    module = nn.ParameterDict({"here": torch.ones(2, device=DEVICE), "there": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match=r"on one device, got .*there on meta"):
        co.FlatParameters(module)
    softmax = co.FlatParameters(model, {"mix": co.Simplex()})
    with pytest.raises(ValueError, match=r'mix: .*"ilr"'):
        softmax.constrain(softmax.initial(), return_log_det=True)


def test_a_value_outside_is_named_and_nothing_is_written() -> None:
    model, flat = flat_model()
    with torch.no_grad():
        model.rate[2] = -3.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"rate must lie in \[0.0, 1.0\], got -3.0"):
        flat.initial()
    with pytest.raises(ValueError, match="theta must have shape"):
        flat.load_(torch.zeros(5, dtype=F64, device=DEVICE))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
