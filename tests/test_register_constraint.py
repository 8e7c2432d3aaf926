"""One line keeps a parameter in a set: register_constraint, and all that torch.nn.utils.parametrize does with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from constrained_modules import (
    LOWER,
    UNIT,
    UPPER,
    Symmetric,
    assert_unchanged,
    constrained,
    everywhere,
    layer,
    look,
    train,
)
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_ops as co


class Count(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


# --- Registering ------------------------------------------------------------------------------------------------------


@everywhere
def test_the_value_stays_and_is_trained_inside(constraint: Any, shown: str, value: Tensor) -> None:
    module = layer(value)
    weight = module.weight
    wanted = weight.detach().clone()
    assert co.register_constraint(module, "weight", constraint) is module
    transform = module.parametrizations.weight[0]
    assert repr(transform) == shown
    assert (transform is constraint) == isinstance(constraint, nn.Module)
    torch.testing.assert_close(module.weight, wanted)
    assert module.parametrizations.weight.original is weight
    optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(4, 3)).square().sum().backward()
        assert weight.grad.abs().sum() > 0
        optimizer.step()
    if shown != "Bounded(lower=-inf, upper=inf)":
        assert constraint_of(constraint)(module.weight).all()
    assert not torch.allclose(module.weight, wanted)


def constraint_of(given: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(given, co.Positive):
        return constraints.positive.check
    if isinstance(given, co.Simplex):
        return lambda x: constraints.simplex.check(x.movedim(given.dim, -1))
    return given.check


@pytest.mark.parametrize(
    "constraint", [None, constraints.real, constraints.real_vector, constraints.interval(-math.inf, math.inf)]
)
def test_where_every_value_is_allowed_nothing_is_registered(constraint: Any) -> None:
    module = layer()
    before = look(module)
    assert co.register_constraint(module, "weight", constraint) is module
    assert not parametrize.is_parametrized(module)
    assert_unchanged(before, module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    module = constrained(constraints.interval(0.1, 0.9), torch.tensor([0.1, 0.3, 0.9]), dtype=dtype)
    assert module.weight.dtype == module.parametrizations.weight.original.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        module.weight, layer(torch.tensor([0.1, 0.3, 0.9]), dtype).weight, rtol=eps, atol=2 * eps
    )
    assert ((module.weight.double() > 0.1) & (module.weight.double() < 0.9)).all()


def test_a_scalar_and_an_empty_parameter() -> None:
    module = nn.Module()
    module.scalar = nn.Parameter(torch.tensor(2.0))
    module.empty = nn.Parameter(torch.empty(0, 3))
    for name in ("scalar", "empty"):
        co.register_constraint(module, name, constraints.positive)
    torch.testing.assert_close(module.scalar, torch.tensor(2.0))
    assert module.empty.shape == (0, 3)


def test_a_frozen_parameter_stays_frozen() -> None:
    module = layer()
    module.weight.requires_grad_(False)
    co.register_constraint(module, "weight", UNIT)
    assert not module.weight.requires_grad
    module.parametrizations.weight.original.requires_grad_()
    assert module.weight.requires_grad


def test_a_buffer() -> None:
    module = nn.BatchNorm1d(3)
    co.register_constraint(module, "running_var", constraints.greater_than(0.25))
    assert "running_var" not in dict(module.named_buffers())
    assert "parametrizations.running_var.original" in dict(module.named_buffers())
    assert not module.running_var.requires_grad
    torch.testing.assert_close(module.running_var, torch.ones(3))
    module.running_var = torch.full((3,), 4.0)
    torch.testing.assert_close(module.eval()(torch.full((1, 3), 2.0)), torch.ones(1, 3), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"^Positive: value must lie in \[0.25, inf\], got 0.0$"):
        module.running_var = torch.zeros(3)
    parametrize.remove_parametrizations(module, "running_var")
    assert "running_var" in dict(module.named_buffers())
    torch.testing.assert_close(module.running_var, torch.full((3,), 4.0))


def test_bounds_that_are_learned() -> None:
    upper = nn.Parameter(torch.tensor(2.0))
    module = constrained(co.Bounded(0.0, upper), 1.0)
    assert "parametrizations.weight.0.upper" in dict(module.named_parameters())
    module.weight.sum().backward()
    torch.testing.assert_close(upper.grad, torch.tensor(4.5))  # sigmoid(0) for each of 9


def test_the_transform_takes_the_modules_mode() -> None:
    transform = co.Positive()
    module = layer().eval()
    co.register_constraint(module, "weight", transform)
    assert not transform.training


def test_several_on_one_module_and_one_on_several() -> None:
    module, shared = layer(), co.Positive(0.1)
    with torch.no_grad():
        module.bias.fill_(2.0)
    for name in ("weight", "bias"):
        co.register_constraint(module, name, shared)
    torch.testing.assert_close(module.bias, torch.full((3,), 2.0))
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.5))
    parametrize.remove_parametrizations(module, "weight")
    assert not parametrize.is_parametrized(module, "weight")
    assert parametrize.is_parametrized(module, "bias")
    assert module(torch.ones(3)).shape == (3,)


def test_a_module_without_values_yet() -> None:
    saved = constrained(constraints.positive).state_dict()
    with torch.device("meta"):
        module = co.register_constraint(nn.Linear(3, 3), "weight", constraints.positive)
    assert module.weight.is_meta
    module.to_empty(device="cpu").load_state_dict(saved)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.5))


@pytest.mark.parametrize(
    "make", [lambda bound: co.Bounded(bound, 0.9), co.Positive, lambda bound: constraints.interval(bound, 0.9)]
)
def test_bounds_without_values_yet_are_loaded(make: Any) -> None:
    def bound() -> Tensor:
        return torch.tensor([0.1, 0.2, 0.3])

    with torch.device("meta"):
        module: Any = co.register_constraint(nn.Linear(3, 3), "weight", make(bound()))
    module.load_state_dict(constrained(make(bound())).state_dict(), assign=True)
    assert torch.equal(module.parametrizations.weight[0].lower, bound())
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.5))


# --- What is rejected, and changes nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "value", "error", "message"),
    [
        (UNIT, [0.5, 2.0, -3.0], ValueError, "weight must lie in [0.0, 1.0], got -3.0"),
        (constraints.positive, [0.5, math.nan, 1.0], ValueError, "weight must lie in [0.0, inf], got nan"),
        (constraints.interval(LOWER, UPPER), [0.0, 0.0, 5.0], ValueError, "weight must lie in [-inf, 2.0], got 5.0"),
        (co.Bounded(0.0, 0.25), [0.5, 0.1, 0.1], ValueError, "weight must lie in [0.0, 0.25], got 0.5"),
        (
            constraints.simplex,
            [0.5, 0.5, 0.5],
            ValueError,
            "weight must be non-negative and sum to 1.0 along dim 1, got a sum of 1.5",
        ),
        (co.Simplex(2), 0.5, IndexError, "dim must be from -2 to 1 for weight of shape (3, 3), got 2"),
        (
            constraints.interval(2.0, 1.0),
            0.5,
            ValueError,
            "lower must be less than upper, got lower=2.0 and upper=1.0",
        ),
        (
            constraints.greater_than(torch.zeros(4)),
            0.5,
            ValueError,
            "lower must broadcast to the shape of weight; lower has shape (4,), weight (3, 3)",
        ),
        (Symmetric(), 0.5, TypeError, "constraint must be an object of torch.distributions.constraints, got Symmetric"),
    ],
)
def test_what_does_not_fit_changes_nothing(constraint: Any, value: Any, error: type[Exception], message: str) -> None:
    module = layer(torch.tensor(value))
    before = look(module)
    with pytest.raises(error, match=f"^register_constraint: {re.escape(message)}$"):
        co.register_constraint(module, "weight", constraint)
    assert_unchanged(before, module)


@pytest.mark.parametrize(
    "constraint",
    [constraints.lower_cholesky, constraints.boolean, constraints.integer_interval(0, 3), constraints.cat([])],
)
def test_an_unknown_constraint_is_named_with_what_is_supported(constraint: Any) -> None:
    module = layer()
    before = look(module)
    message = (
        f"^{re.escape(f'register_constraint: constraint {constraint} is not supported; supported are ')}interval, "
    )
    with pytest.raises(
        NotImplementedError, match=message + r".*simplex.*constrained_ops\.Bounded, Positive and Simplex$"
    ):
        co.register_constraint(module, "weight", constraint)
    assert_unchanged(before, module)


def test_a_name_that_is_none() -> None:
    for module, name in ((layer(), "weigth"), (nn.Linear(3, 3, bias=False), "bias"), (layer(), "in_features")):
        with pytest.raises(ValueError, match=f"^register_constraint: Linear has no parameter or buffer '{name}'$"):
            co.register_constraint(module, name, UNIT)


def test_integers() -> None:
    module = nn.BatchNorm1d(3)
    message = "num_batches_tracked must be float16, bfloat16, float32 or float64, got torch.int64"
    with pytest.raises(TypeError, match=f"^register_constraint: {message}$"):
        co.register_constraint(module, "num_batches_tracked", constraints.positive)


def test_a_second_constraint_would_not_reach_its_whole_set() -> None:
    module = constrained(constraints.positive)
    before = look(module)
    message = (
        "weight is constrained already, by Positive(lower=0.0, kind='softplus'); call remove_parametrizations first"
    )
    with pytest.raises(ValueError, match=f"^register_constraint: {re.escape(message)}$"):
        co.register_constraint(module, "weight", UNIT)
    assert_unchanged(before, module)
    parametrize.remove_parametrizations(module, "weight")
    co.register_constraint(module, "weight", UNIT)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.5))


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_symmetric_then_positive() -> None:
    value = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    module = layer(value)
    parametrize.register_parametrization(module, "weight", Symmetric())
    co.register_constraint(module, "weight", constraints.positive)
    torch.testing.assert_close(module.weight, value)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        module(torch.randn(8, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(module.weight, module.weight.T)
    assert (module.weight > 0).all()
    module.weight = value
    torch.testing.assert_close(module.weight, value)


def test_positive_then_symmetric() -> None:
    """PyTorch's own registration goes on working on top of ours."""
    module = constrained(constraints.positive, 2.0)
    parametrize.register_parametrization(module, "weight", Symmetric())
    module.weight = torch.full((3, 3), 3.0).fill_diagonal_(1.0)
    assert torch.equal(module.weight, module.weight.T)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 3.0).fill_diagonal_(1.0))


def test_a_chain_whose_value_lies_outside_changes_nothing() -> None:
    module = layer(torch.tensor([-1.0, -2.0, 3.0]).diag())
    parametrize.register_parametrization(module, "weight", Symmetric())
    before = look(module)
    with pytest.raises(ValueError, match=r"^register_constraint: weight must lie in \[0.0, inf\], got -2.0$"):
        co.register_constraint(module, "weight", constraints.positive)
    assert_unchanged(before, module)


def test_a_chain_without_a_right_inverse_changes_nothing() -> None:
    class Doubled(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return 2 * raw

    module = layer()
    parametrize.register_parametrization(module, "weight", Doubled())
    before = look(module)
    with pytest.raises(RuntimeError, match="parametrization Doubled does not implement right_inverse"):
        co.register_constraint(module, "weight", constraints.positive)
    assert_unchanged(before, module)


# --- Reading, assigning, removing -------------------------------------------------------------------------------------


@everywhere
def test_assignment_sets_the_value(constraint: Any, shown: str, value: Tensor) -> None:
    module = constrained(constraint, value)
    other = layer(value).weight.detach().flip(0)
    original = module.parametrizations.weight.original
    module.weight = other
    torch.testing.assert_close(module.weight, other)
    assert module.parametrizations.weight.original is original


def test_assignment_of_a_value_on_the_bound_moves_inside() -> None:
    module = constrained()
    module.weight = torch.tensor([0.0, 0.5, 1.0]).expand(3, 3)
    assert module.parametrizations.weight.original.isfinite().all()
    assert ((module.weight > 0) & (module.weight < 1)).all()
    torch.testing.assert_close(module.weight, torch.tensor([0.0, 0.5, 1.0]).expand(3, 3), atol=1e-6, rtol=0)


def test_assignment_of_a_value_outside_names_it_and_changes_nothing() -> None:
    module = constrained(constraints.interval(0.25, 0.75))
    before = look(module)
    with pytest.raises(ValueError, match=r"^Bounded: value must lie in \[0.25, 0.75\], got 0.875$"):
        module.weight = torch.full((3, 3), 0.875)
    assert_unchanged(before, module)


def test_cached_works_once() -> None:
    module = constrained()
    with Count() as count:
        assert module.weight is not module.weight
        assert count.seen == 2 * ["bounded_forward.default"]
        with parametrize.cached():
            first = module.weight
            assert len(count.seen) == 3
            assert module.weight is first
            assert len(count.seen) == 3
        assert module.weight is not first
        assert len(count.seen) == 4


def test_cached_gradients_add_up() -> None:
    module = constrained()
    original = module.parametrizations.weight.original
    x = torch.randn(2, 3)
    (expected,) = torch.autograd.grad(module(module(x)).sum(), original)
    with parametrize.cached():
        module(module(x)).sum().backward()
    torch.testing.assert_close(original.grad, expected)


@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_removal(leave_parametrized: bool) -> None:
    module = layer()
    weight = module.weight
    co.register_constraint(module, "weight", UNIT)
    assert parametrize.is_parametrized(module)
    assert parametrize.is_parametrized(module, "weight")
    assert not parametrize.is_parametrized(module, "bias")
    assert parametrize.type_before_parametrizations(module) is nn.Linear
    train(module, torch.optim.SGD(module.parameters(), lr=1.0))
    x, raw = module.weight.detach().clone(), module.parametrizations.weight.original.detach().clone()
    assert not torch.allclose(x, raw)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized)
    assert not parametrize.is_parametrized(module)
    assert type(module) is nn.Linear
    assert module.weight is weight and isinstance(weight, nn.Parameter)
    assert torch.equal(weight, x if leave_parametrized else raw)
    assert set(module.state_dict()) == {"weight", "bias"}


def test_register_and_remove_and_register_again() -> None:
    module = layer()
    reference = {name: value.clone() for name, value in module.state_dict().items()}
    for constraint in (UNIT, constraints.positive, constraints.interval(LOWER, 1.0)):
        co.register_constraint(module, "weight", constraint)
        parametrize.remove_parametrizations(module, "weight")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, reference[name])


def test_parametrizations_move_to_another_module() -> None:
    module, other = constrained(value=0.25), layer()
    parametrize.transfer_parametrizations_and_params(module, other)
    torch.testing.assert_close(other.weight, torch.full((3, 3), 0.25))
    assert parametrize.is_parametrized(other, "weight")
