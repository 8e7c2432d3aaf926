"""All parameters of a model from one vector, in place of a transform for each.

A run is forward and backward, with ``torch.cat`` of all parameters in place of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import constrained_ops as co

from .harness import OURS, Job, Shape, Step

Inputs = tuple[list[Tensor], Tensor]  # values, gradient of all


def inputs(shape: Shape) -> Inputs:
    """The first dimension counts parameters."""
    count, *each = shape
    values = [3 * torch.rand(each).clamp(1e-3, 1 - 1e-3) - 1 for _ in range(count)]
    return values, torch.randn((count * each[0], *each[1:]))


def step_of(leaves: list[Tensor], parts: Callable[[], Iterable[Tensor]], grad: Tensor) -> Step:
    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        x = torch.cat(list(parts()))
        x.backward(grad)
        return x

    def results() -> list[Tensor]:
        return [run().detach(), torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])]

    return Step(run, results)


def each_by_itself(inputs: Inputs) -> Step:
    raws = [torch.logit((x + 1) / 3).requires_grad_() for x in inputs[0]]
    return step_of(raws, lambda: (-1.0 + 3.0 * torch.sigmoid(raw) for raw in raws), inputs[1])


def flat(inputs: Inputs) -> Step:
    model = nn.ParameterList(inputs[0])
    vector = co.FlatParameters(model, {name: constraints.interval(-1.0, 2.0) for name, _ in model.named_parameters()})
    theta = vector.initial()
    return step_of([theta], lambda: vector.constrain(theta).values(), inputs[1])


JOBS = [
    Job(
        "flat",
        "many small parameters from one vector, forward + backward",
        [(20, 64), (200, 64), (2000, 64)],
        inputs,
        {"eager": each_by_itself, OURS: flat},
        moved=(2, 3),
        quick=[(200, 64)],
    )
]
