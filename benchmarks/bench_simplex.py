"""``simplex``, in place of ``torch.softmax``."""

from __future__ import annotations

import torch
from torch import Tensor

import constrained_ops as co

from .harness import OURS, Job

NUMBERS = 2**20
MOVED = (2, 3)  # raw -> x; grad_x, raw -> grad_raw


def eager(raw: Tensor) -> Tensor:
    return torch.softmax(raw, -1)


def ours(raw: Tensor) -> Tensor:
    return co.simplex(raw)


def eager_dim0(raw: Tensor) -> Tensor:
    return torch.softmax(raw, 0)


def ours_dim0(raw: Tensor) -> Tensor:
    return co.simplex(raw, 0)


JOBS = [
    Job(
        "simplex",
        "rows, from many short ones to few long ones, forward + backward",
        shapes=[(NUMBERS // k, k) for k in (2, 8, 32, 128, 1024, 8192, 65536)],
        peers={"eager": eager, OURS: ours},
        moved=MOVED,
    ),
    Job(
        "simplex_dim0",
        "along the first dimension, forward + backward",
        shapes=[(32, 32768)],
        peers={"eager": eager_dim0, OURS: ours_dim0},
        moved=MOVED,
        grows=1,
    ),
]
