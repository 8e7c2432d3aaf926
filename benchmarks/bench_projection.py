"""``project_simplex``, in place of ``entmax.sparsemax`` where that is installed, and of the sort that it is made of."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

import constrained_ops as co

from .harness import OURS, Job, Shape

NUMBERS = 2**20
SHAPES = [(NUMBERS // k, k) for k in (4, 8, 20, 64, 256, 1024, 8192, 65536)]


def sorting(x: Tensor) -> Tensor:
    """As Held, Wolfe and Crowder (1974) have it."""
    ordered = x.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = (ordered * torch.arange(1, x.shape[-1] + 1, device=x.device) > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, count - 1) / count).clamp(min=0)


def sorting_weighted(x: Tensor, weight: Tensor) -> Tensor:
    ratio, order = (x * weight).sort(-1, descending=True)
    u = 1 / weight
    bounds = (x.gather(-1, order).cumsum(-1) - 1) / u.gather(-1, order).cumsum(-1)
    last = (ratio > bounds).sum(-1, keepdim=True) - 1
    return (x - bounds.gather(-1, last) * u).clamp(min=0)


def ours(x: Tensor) -> Tensor:
    return co.project_simplex(x)


def ours_weighted(x: Tensor, weight: Tensor) -> Tensor:
    return co.project_simplex(x, weight=weight)


def near_the_simplex(shape: Shape) -> list[Tensor]:
    """Near their projections, of which seven in ten are not 0; none so near to 0 that rounding decides."""
    y = (torch.rand(shape) + 0.1) * (torch.rand(shape) < 0.7)
    y = y / y.sum(-1, keepdim=True)
    return [torch.where(y > 0, y, (torch.rand(shape) + 0.1) / -shape[-1])]


def with_weights(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape), torch.rand(shape) + 0.5]


PEERS = {"eager": sorting, OURS: ours}
if find_spec("entmax"):
    PEERS = {"eager": sorting, "entmax": import_module("entmax").sparsemax, OURS: ours}

JOBS = [
    Job(
        "projection",
        "rows, from many short ones to few long ones, forward + backward",
        shapes=SHAPES,
        peers=PEERS,
        moved=(2, 3),  # x -> y; grad_y, y -> grad_x
    ),
    Job(
        "projection_near",
        "rows whose support is most of them, forward + backward",
        shapes=SHAPES[2::2],
        peers=PEERS,
        moved=(2, 3),
        leaves=near_the_simplex,
    ),
    Job(
        "projection_weighted",
        "a weight for each element, forward + backward to x and weight",
        shapes=SHAPES[2::2],
        peers={"eager": sorting_weighted, OURS: ours_weighted},
        moved=(3, 6),  # x, weight -> y; grad_y, y, weight, x -> two gradients
        leaves=with_weights,
    ),
]
