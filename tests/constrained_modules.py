"""What tests of register_constraint share: constraints, modules that have one, and whether anything has changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

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
