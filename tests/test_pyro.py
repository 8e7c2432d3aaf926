"""Pyro on the fused transforms: NUTS, SVI, guides and the store of parameters give what they give without."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from constrained_ops import distributions

pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro import infer  # noqa: E402
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal  # noqa: E402
from pyro.infer.mcmc.util import initialize_model  # noqa: E402

WITH_AND_WITHOUT: list[Callable[[], Any]] = [distributions.installed, contextlib.nullcontext]


@pytest.fixture(autouse=True)
def clean_and_double() -> Iterator[None]:
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


COUNTS = torch.tensor([12.0, 3.0, 30.0, 5.0]).double()
SUCCESSES, TRIALS = torch.tensor(14.0).double(), 20
WAITING = torch.tensor([0.5, 1.25, 0.25, 2.0, 0.75]).double()
BOUNDS = torch.tensor([-1.0, 2.0]).double(), 3.0


def model() -> None:
    """One site of each constraint, conjugate, so that the posterior is known."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    pyro.sample("counts", dist.Multinomial(int(COUNTS.sum()), weights), obs=COUNTS)
    probability = pyro.sample("probability", dist.Beta(2.0, 2.0))
    pyro.sample("successes", dist.Binomial(TRIALS, probability), obs=SUCCESSES)
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("waiting", dist.Exponential(rate), obs=WAITING)
    pyro.sample("flat", dist.Uniform(*BOUNDS).to_event(1))


POSTERIOR = {
    "weights": dist.Dirichlet(1 + COUNTS),
    "probability": dist.Beta(2 + SUCCESSES, 2 + TRIALS - SUCCESSES),
    "rate": dist.Gamma(7.0, 1 + WAITING.sum()),
    "flat": dist.Uniform(*BOUNDS),
}


def potential() -> tuple[dict[str, Tensor], Any]:
    pyro.set_rng_seed(1)
    parameters, function, *_ = initialize_model(model)
    return parameters, function


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_potential_that_hmc_follows_is_the_same(scale: float) -> None:
    """Value and gradient at the same unconstrained parameters, Pyro's transforms being taken when it is made."""
    results = []
    for context in WITH_AND_WITHOUT:
        with context():
            parameters, function = potential()
        parameters = {name: (scale * raw).detach().requires_grad_() for name, raw in parameters.items()}
        energy = function(parameters)
        results.append((energy, *torch.autograd.grad(energy, list(parameters.values()))))
    torch.testing.assert_close(*results)


def test_jit_compile_traces_them() -> None:
    with distributions.installed():
        pyro.set_rng_seed(1)
        parameters, compiled, *_ = initialize_model(model, jit_compile=True, skip_jit_warnings=True)
        _, function = potential()
    other = {name: (raw + 0.5).requires_grad_() for name, raw in parameters.items()}
    for at in (parameters, other):
        torch.testing.assert_close(compiled(at), function(at))


def nuts(samples: int = 80, warmup: int = 40) -> dict[str, Tensor]:
    pyro.set_rng_seed(0)
    kernel = infer.NUTS(model, max_tree_depth=3)
    chain = infer.MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
    chain.run()
    return chain.get_samples()


def test_nuts_gives_the_posterior_with_and_without() -> None:
    """Means and standard deviations against the exact ones, within five standard errors of 40 independent samples."""
    for context in WITH_AND_WITHOUT:
        with context():
            drawn = nuts()
        for name, exact in POSTERIOR.items():
            error = exact.stddev / 40**0.5
            assert ((drawn[name].mean(0) - exact.mean).abs() < 5 * error).all(), name
            assert ((drawn[name].std(0) - exact.stddev).abs() < 5 * error).all(), name
            assert exact.support.check(drawn[name]).all()


def guide() -> None:
    """The family of the posterior, its parameters constrained."""

    def positive(name: str, start: Tensor) -> Tensor:
        return pyro.param(name, start, constraint=constraints.positive)

    share = pyro.param("share", torch.full((4,), 0.25), constraint=constraints.simplex)
    total = pyro.param("total", torch.tensor(20.0), constraint=constraints.greater_than(1.0))
    pyro.sample("weights", dist.Dirichlet(total * share))
    mean = pyro.param("mean", torch.tensor(0.5), constraint=constraints.unit_interval)
    size = positive("size", torch.tensor(10.0))
    pyro.sample("probability", dist.Beta(size * mean, size * (1 - mean)))
    shape = positive("shape", torch.tensor(4.0))
    pyro.sample("rate", dist.Gamma(shape, positive("inverse scale", torch.tensor(4.0))))
    pyro.sample("flat", dist.Uniform(*BOUNDS).to_event(1))


def svi(guide: Any, steps: int) -> dict[str, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = infer.Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    inference = infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / steps)}), loss)
    for _ in range(steps):
        inference.step()
    return {name: value.detach() for name, value in pyro.get_param_store().items()}


def test_svi_with_constrained_parameters_gives_the_posterior_with_and_without() -> None:
    """The same steps, as the maps are the same; and the exact posterior, which the guide's family has."""
    results = []
    for context in WITH_AND_WITHOUT:
        with context():
            results.append(svi(guide, steps=150))
    fused, wanted = results
    for name in wanted:
        torch.testing.assert_close(fused[name], wanted[name], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(fused["share"], POSTERIOR["weights"].mean, rtol=0.05, atol=0.01)
    torch.testing.assert_close(fused["mean"], POSTERIOR["probability"].mean, rtol=0.03, atol=0)
    torch.testing.assert_close(fused["shape"] / fused["inverse scale"], POSTERIOR["rate"].mean, rtol=0.05, atol=0)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_take_the_same_steps_with_and_without(make: Any) -> None:
    results = []
    for context in WITH_AND_WITHOUT:
        with context():
            automatic = make(model)
            parameters = svi(automatic, steps=20)
            results.append((parameters, automatic.median()))
    torch.testing.assert_close(*results)


def test_saved_parameters_mean_the_same_with_and_without() -> None:
    for save, load in (WITH_AND_WITHOUT, WITH_AND_WITHOUT[::-1]):
        with save():
            wanted = svi(guide, steps=3)
            saved = io.BytesIO()
            torch.save(pyro.get_param_store().get_state()["params"], saved)
        with load():
            svi(guide, steps=1)
            store, saved_params = pyro.get_param_store(), torch.load(io.BytesIO(saved.getvalue()))
            for name, raw in saved_params.items():
                store._params[name].data.copy_(raw)
            torch.testing.assert_close(dict(store.items()), wanted)


def test_a_start_on_the_boundary_stays_finite_and_can_move() -> None:
    with distributions.installed():
        pyro.param("p", torch.tensor([0.0, 1.0]), constraint=constraints.unit_interval)
        pyro.param("w", torch.tensor([1.0, 0.0, 0.0]), constraint=constraints.simplex)
        for value in pyro.get_param_store()._params.values():
            assert value.isfinite().all()
