"""Reading an attribute that ``torch.nn.utils.parametrize`` keeps in an interval."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import constrained_ops as co

from .harness import OURS, Job, Peer, Shape, Step


class Sigmoid(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return -1.0 + 3.0 * torch.sigmoid(raw)

    def right_inverse(self, x: Tensor) -> Tensor:
        return torch.logit((x + 1) / 3)


def inside(shape: Shape) -> Tensor:
    return 3 * torch.rand(shape).clamp(1e-3, 1 - 1e-3) - 1


def read(parametrization: Callable[[], nn.Module]) -> Peer:
    def peer(value: Tensor) -> Step:
        owner = nn.Module()
        owner.x = nn.Parameter(value.clone())
        parametrize.register_parametrization(owner, "x", parametrization())
        return Step(lambda: owner.x, lambda: [owner.x.detach()])

    return peer


JOBS = [
    Job(
        "read",
        "reading a parametrized attribute, its graph recorded",
        [(8,), (1024,), (2**16,), (2**20,)],
        inside,
        {"eager": read(Sigmoid), OURS: read(lambda: co.Bounded(-1.0, 2.0))},
        moved=(2,),
    )
]
