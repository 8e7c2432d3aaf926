"""``bounded``, in place of ``lower + (upper - lower) * torch.sigmoid(raw)``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

import constrained_ops as co

from .harness import OURS, Function, Shape, optional, transform


def eager(raw: Tensor, lower: float | Tensor = -1.0, upper: float | Tensor = 2.0) -> Tensor:
    return lower + (upper - lower) * torch.sigmoid(raw)


def ours(raw: Tensor, lower: float | Tensor = -1.0, upper: float | Tensor = 2.0) -> Tensor:
    return co.bounded(raw, lower, upper)


def with_bounds(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape), -1 - torch.rand(shape), 1 + torch.rand(shape)]


OF_FLOATS: dict[str, Function] = {"eager": eager, "torch.distributions": biject_to(constraints.interval(-1.0, 2.0))}
if gpytorch := optional("gpytorch.constraints"):
    interval = gpytorch.Interval(-1.0, 2.0)

    def gpytorch_interval(raw: Tensor) -> Tensor:
        return interval.to(raw.device).transform(raw) if raw.is_cuda else interval.transform(raw)

    OF_FLOATS["gpytorch"] = gpytorch_interval
OF_FLOATS[OURS] = ours
OF_TENSORS = {"eager": eager, OURS: ours}

SIZES = [(8,), (64,), (1024,), (2**16,), (2**20,), (2**24,)]
MOVED = (2, 3, 4)  # raw -> x; grad_x, raw -> grad_raw; along, grad_x, raw -> second gradient
TENSORS_MOVED = (4, 7)  # raw, lower, upper -> x; grad_x, raw, lower, upper -> three gradients

JOBS = [
    transform(0, "bounded", "bounds that are floats", SIZES, OF_FLOATS, MOVED),
    transform(1, "bounded", "bounds that are floats", SIZES, OF_FLOATS, MOVED, headline=True),
    transform(2, "bounded", "bounds that are floats", SIZES[2::2], OF_FLOATS, MOVED),
    transform(0, "bounded_tensor", "a bound for each element", SIZES[2::2], OF_TENSORS, TENSORS_MOVED, with_bounds),
    transform(1, "bounded_tensor", "a bound for each element", SIZES[2::2], OF_TENSORS, TENSORS_MOVED, with_bounds),
]
