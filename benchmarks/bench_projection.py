"""``project_simplex``, in place of other packages' sparsemax, and of the sort that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

import constrained_ops as co

from .harness import LENGTHS, LIGER, OURS, Function, Shape, optional, rows, transform


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


PEERS: dict[str, Function] = {"sort": sorting}
if entmax := optional("entmax"):
    PEERS["entmax.sparsemax"] = entmax.sparsemax
if torch.cuda.is_available() and (liger := optional("liger_kernel.transformers.functional")):
    PEERS[LIGER] = liger.liger_sparsemax
PEERS[OURS] = ours
WEIGHTED = {"sort": sorting_weighted, OURS: ours_weighted}
SOME = rows((20, 256, 8192))
MOVED = (2, 3)  # x -> y; grad_y, y -> grad_x
WEIGHTED_MOVED = (3, 6)  # x, weight -> y; grad_y, y, weight, x -> two gradients
NEAR = "rows whose support is most of them"

JOBS = [
    transform(0, "projection", "rows of 2 to 65 536", rows(LENGTHS), PEERS, MOVED, with_compile=False),
    transform(1, "projection", "rows of 2 to 65 536", rows(LENGTHS), PEERS, MOVED, with_compile=False),
    transform(1, "projection_near", NEAR, SOME, PEERS, MOVED, near_the_simplex),
    transform(1, "projection_weighted", "a weight for each element", SOME, WEIGHTED, WEIGHTED_MOVED, with_weights),
]
