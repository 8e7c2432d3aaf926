"""GPyTorch's constraints on the fused operators: GPyTorch's own checks in our words, its classes as the measure, and
the Mauna Loa series with either.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

import constrained_ops as co

gpytorch = pytest.importorskip("gpytorch")
kernel_tests = pytest.importorskip("gpytorch.test.base_kernel_test_case")
likelihood_tests = pytest.importorskip("gpytorch.test.base_likelihood_test_case")
ours: Any = co.integrations.gpytorch
theirs: Any = gpytorch.constraints

BOUNDS = torch.tensor([[-1.0, 0.0, 0.5]]), torch.tensor([[1.0, 0.25, 3.0]])
CONSTRAINTS: dict[str, Any] = {
    "Interval": lambda package, **options: package.Interval(0.5, 2.0, **options),
    "Interval of tensors": lambda package, **options: package.Interval(*BOUNDS, **options),
    "Interval of lists": lambda package, **options: package.Interval([0.0, 1.0, 2.0], [1.0, 3.0, 5.0], **options),
    "GreaterThan": lambda package, **options: package.GreaterThan(1e-4, **options),
    "GreaterThan of tensors": lambda package, **options: package.GreaterThan(BOUNDS[0], **options),
    "Positive": lambda package, **options: package.Positive(**options),
    "LessThan": lambda package, **options: package.LessThan(3.0, **options),
    "LessThan of tensors": lambda package, **options: package.LessThan(BOUNDS[1], **options),
}


@pytest.fixture(params=CONSTRAINTS)
def make(request: pytest.FixtureRequest) -> Any:
    return CONSTRAINTS[request.param]


def raws(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(4, 3, dtype=dtype)


def test_transform_and_inverse_are_gpytorchs(make: Any) -> None:
    fused, reference, raw = make(ours), make(theirs), raws().requires_grad_()
    assert isinstance(fused, type(reference)) and isinstance(fused, theirs.Interval)
    value = reference.transform(raw)
    torch.testing.assert_close(fused.transform(raw), value)
    torch.testing.assert_close(fused.inverse_transform(value), raw)
    grads = [torch.autograd.grad(each.transform(raw).square().sum(), raw) for each in (fused, reference)]
    torch.testing.assert_close(*grads)
    assert fused.check(value) and fused.check_raw(raw)


def test_values_are_inside_and_those_outside_are_noticed(make: Any) -> None:
    constraint = make(ours)
    lower, upper = constraint
    for dtype in (torch.float32, torch.float64):
        constraint.to(dtype)
        value = constraint.transform(torch.tensor([-90.0, 0.0, 90.0], dtype=dtype))
        assert value.dtype == dtype and (value > lower).all() and (value < upper).all()
        assert constraint.inverse_transform(value).isfinite().all()
        on_bound = torch.where(lower.isinf(), upper, lower).to(dtype)
        assert constraint.inverse_transform(on_bound).isfinite().all()  # GPyTorch's gives inf, and NaN from then on
    beyond = torch.where(lower.isinf(), upper + 1, lower - 1)
    assert not constraint.check(beyond) and not constraint.check_raw(constraint.inverse_transform(beyond))


def test_tensors_of_bounds_may_be_larger_than_the_raw() -> None:
    for name in ("Interval of tensors", "GreaterThan of tensors", "LessThan of tensors"):
        fused, reference, raw = CONSTRAINTS[name](ours), CONSTRAINTS[name](theirs), torch.randn(2, 1)
        torch.testing.assert_close(fused.transform(raw), reference.transform(raw))
        torch.testing.assert_close(
            fused.inverse_transform(fused.transform(raw)), raw.expand(2, 3), rtol=1e-4, atol=1e-5
        )


def test_initial_value(make: Any) -> None:
    value = make(theirs).transform(torch.zeros(1, 3))
    fused, reference = make(ours, initial_value=value), make(theirs, initial_value=value)
    torch.testing.assert_close(fused.initial_value, reference.initial_value)
    assert make(ours).initial_value is None
    kernel = gpytorch.kernels.RBFKernel(ard_num_dims=3, lengthscale_constraint=fused)
    torch.testing.assert_close(kernel.lengthscale.detach(), value.expand(1, 3))


def test_no_transform_enforces_nothing(make: Any) -> None:
    """As BoTorch has it, whose optimizer gets the bounds."""
    constraint, raw = make(ours, transform=None), raws()
    assert not constraint.enforced and make(ours).enforced
    assert constraint.transform(raw) is raw and constraint.inverse_transform(raw) is raw


def test_another_transform_is_left_to_gpytorch() -> None:
    raw = raws()
    for name in ("GreaterThan", "Positive", "LessThan"):
        fused, reference = (
            CONSTRAINTS[name](package, transform=torch.exp, inv_transform=torch.log) for package in (ours, theirs)
        )
        value = reference.transform(raw)
        assert torch.equal(fused.transform(raw), value)
        assert torch.equal(fused.inverse_transform(value), reference.inverse_transform(value))


def test_bounds_that_are_none() -> None:
    for bounds in (
        (1.0, 1.0),
        (2.0, 1.0),
        (0.0, math.inf),
        (-math.inf, 0.0),
        (torch.zeros(2), torch.tensor([1.0, 0.0])),
    ):
        for package in (ours, theirs):
            with pytest.raises(ValueError, match="bounds"):
                package.Interval(*bounds)
    got = "^Interval: bounds must be finite, got lower_bound=0.0 and upper_bound=inf; "
    with pytest.raises(ValueError, match=got):
        ours.Interval(0.0, math.inf)


def test_repr_is_gpytorchs(make: Any) -> None:
    fused = make(ours)
    if isinstance(fused, theirs.LessThan) and fused.upper_bound.numel() > 1:
        assert repr(fused).startswith("LessThan(")  # where GPyTorch raises
    else:
        assert repr(fused) == repr(make(theirs))


def test_state_dicts_both_ways_and_bounds_with_them() -> None:
    """GPyTorch's state_dicts carry bounds, and loading sets them."""
    raw = torch.randn(3)
    for load, save in ((ours, theirs), (theirs, ours)):
        for old, new in (
            (load.Interval(0.0, 1.0), save.Interval(-2.0, 3.0)),
            (load.GreaterThan(0.0), save.GreaterThan(5.0)),
            (load.LessThan(0.0), save.LessThan(-5.0)),
        ):
            assert list(old.state_dict()) == list(new.state_dict())
            before = old.transform(raw)
            old.load_state_dict(new.state_dict())
            torch.testing.assert_close(old.transform(raw), new.transform(raw))
            assert not torch.allclose(old.transform(raw), before)


def test_bounds_written_to_are_read_again() -> None:
    constraint, raw = ours.Interval(0.0, 1.0), torch.zeros(2)
    assert constraint.transform(raw)[0] == 0.5
    constraint.upper_bound.fill_(3.0)
    assert constraint.transform(raw)[0] == 1.5
    constraint.lower_bound = torch.tensor(1.0)
    assert constraint.transform(raw)[0] == 2.0
    assert constraint.double().transform(raw.double())[0] == 2.0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda constraint: pickle.loads(pickle.dumps(constraint))])
def test_copies_and_pickles(make: Any, clone: Any) -> None:
    constraint, raw = make(ours), raws()
    constraint.transform(raw)
    other = clone(constraint)
    assert torch.equal(other.transform(raw), constraint.transform(raw)) and other._fused
    other.upper_bound = other.upper_bound + 1
    other.lower_bound = other.lower_bound + 1
    if not isinstance(constraint, theirs.Positive):
        assert not torch.equal(other.transform(raw), constraint.transform(raw))


def test_func_and_compile(make: Any) -> None:
    constraint, raw = make(ours), raws()
    wanted = make(theirs).transform(raw)
    torch.testing.assert_close(torch.vmap(constraint.transform)(raw.unsqueeze(0))[0], wanted)
    torch.testing.assert_close(torch.compile(constraint.transform, fullgraph=True, backend="aot_eager")(raw), wanted)


# --- Kernels and likelihoods ---------------------------------------------------------------------------------------


def test_a_kernels_lengthscale() -> None:
    kernel = gpytorch.kernels.RBFKernel(ard_num_dims=2, lengthscale_constraint=ours.Interval(0.0, 2.0))
    kernel.lengthscale = 0.5
    torch.testing.assert_close(kernel.lengthscale.detach(), torch.full((1, 2), 0.5))
    kernel.initialize(lengthscale=torch.tensor([0.25, 1.5]))
    torch.testing.assert_close(kernel.lengthscale.detach(), torch.tensor([[0.25, 1.5]]))
    kernel.initialize(raw_lengthscale=torch.zeros(1, 2))
    torch.testing.assert_close(kernel.lengthscale.detach(), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernel.lengthscale = 3.0
    kernel.lengthscale = 2.0  # on the bound: GPyTorch's raw would be inf
    assert kernel.raw_lengthscale.isfinite().all()


def test_register_constraint_on_what_exists() -> None:
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.PeriodicKernel())
    kernel.base_kernel.register_constraint("raw_period_length", ours.Interval(0.5, 1.5, initial_value=1.25))
    kernel.register_constraint("raw_outputscale", ours.GreaterThan(0.5))
    torch.testing.assert_close(kernel.base_kernel.period_length.item(), 1.25)
    assert kernel.outputscale.item() == pytest.approx(0.5 + math.log(2))
    names = dict(kernel.named_constraints())
    assert isinstance(names["base_kernel.raw_period_length_constraint"], ours.Interval)
    assert kernel.constraint_for_parameter_name("raw_outputscale") is names["raw_outputscale_constraint"]


def test_priors_and_sampling_from_them() -> None:
    kernel = gpytorch.kernels.RBFKernel(
        lengthscale_prior=gpytorch.priors.UniformPrior(0.25, 0.75), lengthscale_constraint=ours.Interval(0.0, 1.0)
    )
    kernel.sample_from_prior("lengthscale_prior")
    assert 0.25 < kernel.lengthscale.item() < 0.75


def test_likelihoods_and_means() -> None:
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=ours.GreaterThan(1e-3))
    likelihood.noise = 0.25
    assert likelihood.noise.item() == pytest.approx(0.25)
    mean = gpytorch.means.ConstantMean(constant_constraint=ours.LessThan(2.0))
    mean.constant = torch.tensor(1.5)
    assert mean.constant.item() == pytest.approx(1.5)


# GPyTorch's own tests of kernels and likelihoods, of those that it installs.


class TestRBFKernel(kernel_tests.BaseKernelTestCase, unittest.TestCase):  # type: ignore[misc]
    def create_kernel_no_ard(self, **options: Any) -> Any:
        return gpytorch.kernels.RBFKernel(lengthscale_constraint=ours.Positive(), **options)

    def create_kernel_ard(self, num_dims: int, **options: Any) -> Any:
        constraint = ours.Interval(0.01, 5.0)
        return gpytorch.kernels.RBFKernel(ard_num_dims=num_dims, lengthscale_constraint=constraint, **options)


class TestPeriodicKernel(kernel_tests.BaseKernelTestCase, unittest.TestCase):  # type: ignore[misc]
    def create_kernel_no_ard(self, **options: Any) -> Any:
        constraints = {
            "period_length_constraint": ours.Interval(0.1, 5.0),
            "lengthscale_constraint": ours.GreaterThan(1e-3),
        }
        return gpytorch.kernels.PeriodicKernel(**constraints, **options)


class TestGaussianLikelihood(likelihood_tests.BaseLikelihoodTestCase, unittest.TestCase):  # type: ignore[misc]
    def create_likelihood(self) -> Any:
        return gpytorch.likelihoods.GaussianLikelihood(noise_constraint=ours.GreaterThan(1e-4))


# --- Mauna Loa -----------------------------------------------------------------------------------------------------


def mauna_loa() -> tuple[torch.Tensor, torch.Tensor]:
    """Years since 1980 and ppmv less their mean, over which the model has another one."""
    lines = (Path(__file__).parent / "data" / "mauna_loa_co2.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if line[0].isdigit()]
    years = torch.tensor([int(year) + (int(month) - 0.5) / 12 for year, month, _ in rows], dtype=torch.float64)
    co2 = torch.tensor([float(value) for *_, value in rows], dtype=torch.float64)
    return years - 1980, co2 - co2.mean()


class CO2(gpytorch.models.ExactGP):  # type: ignore[misc]
    """Trend, season, irregularities and noise (Rasmussen and Williams, section 5.4.3), constrained by ``package``."""

    def __init__(self, package: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=package.GreaterThan(1e-4))
        super().__init__(x, y, likelihood)
        kernels = gpytorch.kernels

        def scaled(kernel: Any) -> Any:
            return kernels.ScaleKernel(kernel, outputscale_constraint=package.Positive())

        self.mean_module = gpytorch.means.ConstantMean(constant_constraint=package.LessThan(50.0))
        trend = kernels.RBFKernel(lengthscale_constraint=package.GreaterThan(10.0))
        season = kernels.PeriodicKernel(
            period_length_constraint=package.Interval(0.5, 1.5), lengthscale_constraint=package.Positive()
        ) * kernels.RBFKernel(lengthscale_constraint=package.Positive())
        irregular = kernels.RQKernel(
            lengthscale_constraint=package.Interval(0.05, 20.0), alpha_constraint=package.Interval(1e-3, 100.0)
        )
        self.covar_module = scaled(trend) + scaled(season) + scaled(irregular)
        self.double()
        trend.lengthscale, self.covar_module.kernels[0].outputscale = 50.0, 1000.0
        season.kernels[0].period_length, season.kernels[1].lengthscale = 1.0, 50.0

    def forward(self, x: torch.Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def train(package: Any, steps: int = 30) -> tuple[Any, float, float]:
    """The model, and its log marginal likelihood per observation before and after L-BFGS, by Cholesky's method."""
    x, y = mauna_loa()
    model = CO2(package, x, y).train()
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def negative() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -likelihood(model(x), y)
        loss.backward()
        return loss

    with gpytorch.settings.fast_computations(False, False, False):
        start = negative().item()
        optimizer.step(negative)
        return model, -start, -negative().item()


def test_mauna_loa_reaches_the_same_marginal_likelihood() -> None:
    fused, start, reached = train(ours)
    reference, same_start, wanted = train(theirs)
    assert start == pytest.approx(same_start, rel=1e-9) and reached > start + 0.5
    assert reached == pytest.approx(wanted, abs=1e-4)
    assert fused.covar_module.kernels[1].base_kernel.kernels[0].period_length.item() == pytest.approx(1, abs=0.01)
    for (name, value), (_, want) in zip(fused.state_dict().items(), reference.state_dict().items(), strict=True):
        assert value.shape == want.shape, name
    reference.load_state_dict(fused.state_dict())
    x, y = mauna_loa()
    with gpytorch.settings.fast_computations(False, False, False):
        again = gpytorch.mlls.ExactMarginalLogLikelihood(reference.likelihood, reference)(reference.train()(x), y)
    assert again.item() == pytest.approx(reached, rel=1e-9)


# --- The package ---------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
import constrained_ops as co
assert "gpytorch" not in sys.modules
sys.modules["gpytorch"] = None
try:
    co.integrations.gpytorch
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_gpytorch_the_error_says_how_to_install_it() -> None:
    outcome = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "pip install" in outcome.stdout and "constrained_ops[gpytorch]" in outcome.stdout


def test_integrations_have_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'botorch'"):
        _ = co.integrations.botorch
