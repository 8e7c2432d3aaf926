"""Constrained modules in a state_dict, as copies and in other dtypes; bounds are checked and not loaded."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from conftest import through_a_file
from constrained_modules import LOWER, UNIT, UPPER, assert_unchanged, constrained, everywhere, layer, look, train
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import parametrize

import constrained_ops as co


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
