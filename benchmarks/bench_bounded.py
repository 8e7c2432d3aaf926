"""``bounded``, in place of ``lower + (upper - lower) * torch.sigmoid(raw)``."""

from __future__ import annotations

import torch
from torch import Tensor

import constrained_ops as co

from .harness import OURS, Job, Shape


def eager(raw: Tensor, lower: float | Tensor = -1.0, upper: float | Tensor = 2.0) -> Tensor:
    return lower + (upper - lower) * torch.sigmoid(raw)


def ours(raw: Tensor, lower: float | Tensor = -1.0, upper: float | Tensor = 2.0) -> Tensor:
    return co.bounded(raw, lower, upper)


def with_bounds(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape), -1 - torch.rand(shape), 1 + torch.rand(shape)]


PEERS = {"eager": eager, OURS: ours}

JOBS = [
    Job(
        "bounded",
        "bounds that are floats, forward + backward",
        shapes=[(8,), (64,), (1024,), (2**16,), (2**20,), (2**24,)],
        peers=PEERS,
        moved=(2, 3),  # raw -> x; grad_x, raw -> grad_raw
    ),
    Job(
        "bounded_tensor",
        "a bound for each element, forward + backward to raw and both bounds",
        shapes=[(2**20,)],
        peers=PEERS,
        moved=(4, 7),  # raw, lower, upper -> x; grad_x, raw, lower, upper -> three gradients
        leaves=with_bounds,
    ),
]
