"""One line keeps a parameter in a set: register_constraint, and all that torch.nn.utils.parametrize does with it."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import through_a_file
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_ops as co

UNIT = constraints.unit_interval
LOWER, UPPER = torch.tensor([-1.0, 0.0, -math.inf]), torch.tensor([1.0, math.inf, 2.0])

# constraint -> the module that it becomes, and a value inside, up to shape (3, 3)
CONSTRAINTS: dict[str, tuple[Any, str, Tensor]] = {
    "interval": (constraints.interval(-1.0, 2.0), "Bounded(lower=-1.0, upper=2.0)", torch.tensor(1.5)),
    "unit_interval": (UNIT, "Bounded(lower=0.0, upper=1.0)", torch.tensor(0.25)),
    "half_open_interval": (
        constraints.half_open_interval(0, 3),
        "Bounded(lower=0, upper=3)",
        torch.tensor([0.0, 1.0, 2.0]),
    ),
    "positive": (constraints.positive, "Positive(lower=0.0, kind='softplus')", torch.tensor(3.0)),
    "nonnegative": (constraints.nonnegative, "Positive(lower=0.0, kind='softplus')", torch.tensor([0.0, 1.0, 2.0])),
    "greater_than": (constraints.greater_than(-2.0), "Positive(lower=-2.0, kind='softplus')", torch.tensor(-1.0)),
    "less_than": (constraints.less_than(2.0), "Bounded(lower=-inf, upper=2.0)", torch.tensor(-30.0)),
    "tensors": (
        constraints.interval(LOWER, UPPER),
        "Bounded(lower=tensor of shape (3,), upper=tensor of shape (3,))",
        torch.tensor([0.0, 5.0, -5.0]),
    ),
    "one tensor": (
        constraints.greater_than(torch.tensor([0.0, 1.0, 2.0])),
        "Bounded(lower=tensor of shape (3,), upper=inf)",
        torch.tensor(2.5),
    ),
    "simplex": (constraints.simplex, "Simplex(dim=-1, kind='softmax')", torch.tensor([0.5, 0.25, 0.25])),
    "independent": (
        constraints.independent(constraints.simplex, 1),
        "Simplex(dim=-1, kind='softmax')",
        torch.eye(3) * 0.7 + 0.1,
    ),
    "Bounded": (co.Bounded(-math.inf, math.inf), "Bounded(lower=-inf, upper=inf)", torch.tensor(-3.0)),
    "Positive": (co.Positive(kind="exp"), "Positive(lower=0.0, kind='exp')", torch.tensor(3.0)),
    "Simplex": (co.Simplex(0), "Simplex(dim=0, kind='softmax')", torch.tensor(1 / 3)),
}
everywhere = pytest.mark.parametrize(("constraint", "shown", "value"), CONSTRAINTS.values(), ids=CONSTRAINTS)


class Symmetric(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.triu() + raw.triu(1).T

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


def layer(value: Any = 0.5, dtype: torch.dtype = torch.float32, size: int = 3) -> Any:
    module = nn.Linear(size, size, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.as_tensor(value))
    return module


def constrained(constraint: Any = UNIT, value: Any = 0.5, **options: Any) -> Any:
    return co.register_constraint(layer(value, **options), "weight", constraint)


def train(module: Any, optimizer: Any, steps: int = 3) -> None:
    """Towards a weight of 0.9."""
    for _ in range(steps):
        optimizer.zero_grad()
        (module.weight - 0.9).square().sum().backward()
        optimizer.step()


def look(module: nn.Module) -> Any:
    """All that a failed registration must leave alone."""
    values = {name: value.clone() for name, value in module.state_dict().items()}
    return type(module), str(module), {name: id(p) for name, p in module.named_parameters()}, values


def assert_unchanged(before: Any, module: nn.Module) -> None:
    after = look(module)
    assert after[:3] == before[:3]
    torch.testing.assert_close(after[3], before[3], rtol=0, atol=0, equal_nan=True)


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


# --- Optimizers -------------------------------------------------------------------------------------------------------

ADAMS = [torch.optim.Adam, co.optim.ReparametrizedAdam, co.optim.ProjectedAdam]


@pytest.mark.parametrize("kind", ADAMS)
def test_an_optimizer_made_before_or_after(kind: Any) -> None:
    before, after = layer(), layer()
    early = kind(before.parameters(), lr=0.1)
    for module in (before, after):
        co.register_constraint(module, "weight", UNIT)
    late = kind(after.parameters(), lr=0.1)
    for module, optimizer in ((before, early), (after, late)):
        train(module, optimizer, 50)
    assert torch.equal(before.weight, after.weight)
    torch.testing.assert_close(before.weight, torch.full((3, 3), 0.9), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ADAMS)
def test_an_optimizer_in_use_follows_registration_and_removal(kind: Any) -> None:
    """Its parameter changes its memory under it, twice."""
    ours, theirs = layer(), layer()
    optimizers = [kind(ours.parameters(), lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1)]
    for change in (
        lambda module: module,
        lambda module: co.register_constraint(module, "weight", constraints.interval(0.0, 2.0)),
        lambda module: parametrize.remove_parametrizations(module, "weight"),
    ):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            train(change(module), optimizer)
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=1e-5)


def test_lbfgs_trains_it() -> None:
    module = constrained()
    optimizer = torch.optim.LBFGS([module.parametrizations.weight.original], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (module.weight - 0.9).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.9), atol=1e-3, rtol=0)


# --- Saving and copying -----------------------------------------------------------------------------------------------


@everywhere
def test_a_state_dict_goes_both_ways(constraint: Any, shown: str, value: Tensor) -> None:
    """Into a module that is parametrized alike, and back to a plain one."""
    module, other = constrained(copy.deepcopy(constraint), value), constrained(copy.deepcopy(constraint), value)
    with torch.no_grad():
        module.parametrizations.weight.original.normal_()
    other.load_state_dict(through_a_file(module.state_dict()))
    assert torch.equal(other.weight, module.weight)
    wanted = module.weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight")
    plain = nn.Linear(3, 3)
    plain.load_state_dict(through_a_file(module.state_dict()))
    assert torch.equal(plain.weight, wanted)


def test_keys_of_a_state_dict() -> None:
    raw = {"bias", "parametrizations.weight.original"}
    assert set(constrained(UNIT).state_dict()) == raw
    bounds = {"parametrizations.weight.0.lower", "parametrizations.weight.0.upper"}
    assert set(constrained(constraints.interval(LOWER, UPPER), 0.5).state_dict()) == raw | bounds


def test_a_checkpoint_of_a_plain_module_is_loaded_before_registration() -> None:
    plain, module = layer(0.25), constrained()
    with pytest.raises(RuntimeError, match=r'Missing key.*"parametrizations\.weight\.original"'):
        module.load_state_dict(plain.state_dict())
    module = layer()
    module.load_state_dict(plain.state_dict())
    co.register_constraint(module, "weight", UNIT)
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.25))


KEY = "parametrizations.weight.0.upper"


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_other_bounds_in_a_state_dict_are_an_error_and_do_not_arrive(options: dict[str, Any]) -> None:
    saved = constrained(co.Bounded(0.0, torch.tensor([1.0, 2.0, 3.0]))).state_dict()
    module = constrained(co.Bounded(0.0, torch.tensor([1.0, 4.0, 5.0])))
    given = copy.deepcopy(saved)
    message = f"{KEY} is 2.0 in the state_dict and 4.0 in the module, whose bounds are not loaded"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        module.load_state_dict(saved, **options)
    assert module.parametrizations.weight[0].upper.tolist() == [1.0, 4.0, 5.0]
    assert all(torch.equal(saved[key], given[key]) for key in given)


def test_ways_out_when_bounds_differ() -> None:
    old = constrained(co.Bounded(0.0, torch.tensor(2.0)))
    module = constrained(co.Bounded(0.0, torch.tensor(4.0)))
    without = {key: value for key, value in old.state_dict().items() if key != KEY}
    module.load_state_dict(without, strict=False)  # raw as it was: the value changes with the bound
    torch.testing.assert_close(module.weight, 2 * old.weight)
    module.parametrizations.weight[0].upper.fill_(2.0)  # the saved bound
    module.load_state_dict(old.state_dict())
    torch.testing.assert_close(module.weight, old.weight)
    parametrize.remove_parametrizations(module, "weight")  # and then the new one: the value stays
    co.register_constraint(module, "weight", co.Bounded(0.0, torch.tensor(4.0)))
    torch.testing.assert_close(module.weight, old.weight)


def test_a_bound_that_was_rounded_to_another_dtype_is_the_same() -> None:
    bound = torch.tensor([0.7, 0.8, 0.9])
    for here, there in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        saved = constrained(co.Bounded(0.0, bound)).to(there).state_dict()
        module = constrained(co.Bounded(0.0, bound)).to(here)
        own = module.parametrizations.weight[0].upper.clone()
        module.load_state_dict(saved)
        assert own.dtype == here
        assert torch.equal(module.parametrizations.weight[0].upper, own)


def test_a_bound_of_another_shape_is_pytorchs_error() -> None:
    saved = constrained(co.Bounded(0.0, torch.ones(3, 3))).state_dict()
    with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(KEY)}"):
        constrained(co.Bounded(0.0, torch.ones(3))).load_state_dict(saved)


@pytest.mark.parametrize("bound", [nn.Parameter(torch.tensor(1.0)), torch.tensor(1.0, requires_grad=True)], ids=type)
def test_a_bound_that_is_learned_is_loaded(bound: Tensor) -> None:
    module, twin = constrained(co.Bounded(0.0, bound)), constrained(co.Bounded(0.0, nn.Parameter(torch.tensor(3.0))))
    module.load_state_dict(twin.state_dict())
    assert bound.item() == 3.0
    torch.testing.assert_close(module.weight, twin.weight)


def test_bounds_are_copies_of_what_was_given() -> None:
    """Two modules, their optimizers and the caller may have been given one tensor."""
    bound = torch.tensor([1.0, 2.0, 3.0])
    one, other = constrained(co.Bounded(0.0, bound)), constrained(constraints.interval(0.0, bound))
    one.parametrizations.weight[0].upper.mul_(2)
    assert bound.tolist() == other.parametrizations.weight[0].upper.tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(one.weight, 2 * other.weight)


def test_deepcopy_goes_its_own_way() -> None:
    module = constrained(constraints.interval(LOWER, UPPER))
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, module.weight)
    before = look(module)
    train(twin, torch.optim.SGD(twin.parameters(), lr=1.0))
    twin.parametrizations.weight[0].lower.fill_(-5.0)
    assert_unchanged(before, module)
    assert not torch.allclose(twin.weight, module.weight)
    parametrize.remove_parametrizations(twin, "weight")
    assert parametrize.is_parametrized(module)


def test_pickling_is_pytorchs_refusal() -> None:
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        pickle.dumps(constrained())


def test_the_model_changes_its_dtype() -> None:
    module = constrained(constraints.interval(torch.zeros(3), 1.0), 0.25).double()
    assert module.weight.dtype == torch.float64
    torch.testing.assert_close(module.weight, torch.full((3, 3), 0.25, dtype=torch.float64), atol=1e-6, rtol=0)
    assert module.bfloat16().weight.dtype == torch.bfloat16


# --- Autocast, compilers, torch.func ----------------------------------------------------------------------------------

SOME = ["interval", "tensors", "positive", "Positive", "simplex"]
some = pytest.mark.parametrize(("constraint", "shown", "value"), [CONSTRAINTS[name] for name in SOME], ids=SOME)


@some
def test_autocast(constraint: Any, shown: str, value: Tensor) -> None:
    """As for a plain layer of the same weight: the product is rounded, the weight and its gradient are not."""
    module = constrained(constraint, value)
    plain = layer(module.weight.detach())
    plain.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})
    x = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each(x) for each in (module, plain)]
        assert module.weight.dtype == torch.float32
        for y in outputs:
            y.float().square().sum().backward()
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    raw = module.parametrizations.weight.original
    (expected,) = torch.autograd.grad(module.weight, raw, plain.weight.grad)
    assert raw.grad.dtype == torch.float32
    torch.testing.assert_close(raw.grad, expected)


@some
def test_compile_in_one_graph(constraint: Any, shown: str, value: Tensor) -> None:
    torch._dynamo.reset()
    module, x = constrained(constraint, value), torch.randn(4, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outcomes = []
    for each in (module, compiled):
        module.zero_grad()
        y = each(x)
        y.square().sum().backward()
        outcomes.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [True, False])
@some
def test_export(constraint: Any, shown: str, value: Tensor, strict: bool) -> None:
    module, x = constrained(constraint, value), torch.randn(4, 3)
    exported = torch.export.export(module, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), module(x))
    with torch.no_grad():
        module.parametrizations.weight.original.zero_()
    again = exported.module()
    again.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(again(x), module(x))


def test_functional_call_takes_raws_from_outside() -> None:
    module, x = constrained(), torch.randn(4, 3)
    raws = torch.randn(5, 3, 3)

    def loss(raw: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"parametrizations.weight.original": raw}, x).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(raws)
    for raw, grad in zip(raws, grads, strict=True):
        leaf = raw.clone().requires_grad_()
        weight = co.bounded(leaf, 0.0, 1.0)
        (expected,) = torch.autograd.grad(nn.functional.linear(x, weight, module.bias.detach()).square().sum(), leaf)
        torch.testing.assert_close(grad, expected)
