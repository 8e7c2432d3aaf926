"""A constrained optimum is a fixed point in the metric of Adam, and not in the Euclidean one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

from constrained_ops.optim import ProjectedAdam

pytestmark = pytest.mark.usefixtures("backend")


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


def linear(box: bool) -> tuple[Tensor, Tensor, Tensor]:
    c = torch.stack([torch.randperm(SIZE) for _ in range(PROBLEMS)]).double() / SIZE + torch.randn(PROBLEMS, 1).double()
    best = (c < 0).double() if box else torch.nn.functional.one_hot(c.argmin(-1), SIZE).double()
    return torch.zeros(PROBLEMS, SIZE, SIZE).double(), c, best


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
    assert (x >= 0).all() and (x <= 1).all()  # a point outside may well be lower
    if constraint is constraints.simplex:
        torch.testing.assert_close(x.detach().sum(-1), torch.ones(PROBLEMS), atol=1e-6, rtol=0)
    return (f(x.detach().double()) - f(best)) / (start - f(best))


quadratic_and_linear = pytest.mark.parametrize("make", [quadratics, linear])


@quadratic_and_linear
def test_on_the_simplex_the_metric_of_adam_reaches_the_optimum_and_the_euclidean_does_not(
    make: Callable[[bool], tuple[Tensor, Tensor, Tensor]],
) -> None:
    problem = make(False)
    assert gap_after(problem, constraints.simplex, "adam", 1200).max() < 1e-6
    assert gap_after(problem, constraints.simplex, "euclidean", 1200).median() > 1e-3


@quadratic_and_linear
def test_so_it_is_with_noise(make: Callable[[bool], tuple[Tensor, Tensor, Tensor]]) -> None:
    problem = make(False)
    ours, euclidean = (gap_after(problem, constraints.simplex, metric, 1000, 0.1) for metric in ("adam", "euclidean"))
    assert ours.median() < 1e-3
    assert euclidean.median() > 10 * ours.median()


@quadratic_and_linear
def test_in_a_box_the_optimum_is_reached(make: Callable[[bool], tuple[Tensor, Tensor, Tensor]]) -> None:
    problem = make(True)
    assert gap_after(problem, constraints.unit_interval, "adam", 1500).max() < 1e-6
    assert gap_after(problem, constraints.unit_interval, "adam", 1000, 0.5).median() < 1e-2
