"""Reading an attribute that ``torch.nn.utils.parametrize`` keeps in an interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import constrained_ops as co

from .harness import OURS, Job, Shape, Step, assert_close, copy_step


class Sigmoid(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return -1.0 + 3.0 * torch.sigmoid(raw)

    def right_inverse(self, x: Tensor) -> Tensor:
        return torch.logit((x + 1) / 3)


@dataclass(frozen=True)
class ReadJob:
    """As :class:`.harness.Job`; a peer makes a parametrization."""

    name: str
    about: str
    shapes: Sequence[Shape]
    peers: Mapping[str, Callable[[], nn.Module]]
    moved: Sequence[int]
    grows: int = 0

    chosen_shapes = Job.chosen_shapes

    def steps(self, shape: Shape, device: str, with_compile: bool) -> dict[str, Step]:
        """The steps of all peers, agreement asserted, and of the copy."""
        torch.manual_seed(0)
        value = 3 * torch.rand(shape, device=device).clamp(1e-3, 1 - 1e-3) - 1
        steps: dict[str, Step] = {}
        for peer, make in self.peers.items():
            steps[peer] = read_step(value, make())
            assert_close(f"{self.name} {shape}: {peer} differs from what was registered\n", steps[peer]()[0], value)
        return {**steps, "copy_": copy_step(self, value)}


def read_step(value: Tensor, parametrization: nn.Module) -> Step:
    owner = nn.Module()
    owner.x = nn.Parameter(value.clone())
    parametrize.register_parametrization(owner, "x", parametrization)
    return lambda: (owner.x,)


JOBS = [
    ReadJob(
        "read",
        "reading a parametrized attribute, its graph recorded",
        [(8,), (1024,), (2**16,), (2**20,)],
        {"eager": Sigmoid, OURS: lambda: co.Bounded(-1.0, 2.0)},
        moved=(2,),
    )
]
