"""All parameters of a model from one vector, in place of a transform for each.

A step is forward and backward, with ``torch.cat`` of all parameters in place of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import constraints

import constrained_ops as co

from .harness import OURS, Job, Shape, Step, assert_close, copy_step

# (values, gradient of all) -> a step, which returns the gradient to all raws
Peer = Callable[[list[Tensor], Tensor], Step]


def step_of(leaves: list[Tensor], parts: Callable[[], Sequence[Tensor]], grad: Tensor) -> Step:
    def step() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        torch.cat(list(parts())).backward(grad)
        return tuple(leaf.grad for leaf in leaves if leaf.grad is not None)

    return step


def each_by_itself(values: list[Tensor], grad: Tensor) -> Step:
    raws = [torch.logit((x + 1) / 3).requires_grad_() for x in values]
    return step_of(raws, lambda: [-1.0 + 3.0 * torch.sigmoid(raw) for raw in raws], grad)


def flat(values: list[Tensor], grad: Tensor) -> Step:
    model = nn.ParameterList(values)
    vector = co.FlatParameters(model, {name: constraints.interval(-1.0, 2.0) for name, _ in model.named_parameters()})
    theta = vector.initial()
    return step_of([theta], lambda: list(vector.constrain(theta).values()), grad)


@dataclass(frozen=True)
class FlatJob:
    """As :class:`.harness.Job`; the first dimension of a shape counts parameters."""

    name: str
    about: str
    shapes: Sequence[Shape]
    peers: Mapping[str, Peer]
    moved: Sequence[int]
    grows: int = 0

    chosen_shapes = Job.chosen_shapes

    def steps(self, shape: Shape, device: str, with_compile: bool) -> dict[str, Step]:
        """The steps of all peers, agreement asserted, and of the copy."""
        torch.manual_seed(0)
        count, *each = shape
        values = [3 * torch.rand(each, device=device).clamp(1e-3, 1 - 1e-3) - 1 for _ in range(count)]
        grad = torch.randn((count * each[0], *each[1:]), device=device)
        steps = {peer: make(values, grad) for peer, make in self.peers.items()}
        wanted = torch.cat(steps["eager"]())
        for peer, step in steps.items():
            assert_close(f"{self.name} {shape}: {peer} and eager differ\n", torch.cat(step()), wanted)
        return {**steps, "copy_": copy_step(self, torch.ones(shape, device=device))}


JOBS = [
    FlatJob(
        "flat",
        "many small parameters from one vector, forward + backward",
        [(20, 64), (200, 64), (2000, 64)],
        {"eager": each_by_itself, OURS: flat},
        moved=(2, 3),
    )
]
