"""``simplex``, in place of ``torch.softmax``."""

from __future__ import annotations

import torch
from torch import Tensor

import constrained_ops as co

from .harness import LENGTHS, OURS, rows, transform

MOVED = (2, 3, 4)  # raw -> x; grad_x, raw -> grad_raw; along, grad_x, raw -> second gradient


def eager(raw: Tensor) -> Tensor:
    return torch.softmax(raw, -1)


def ours(raw: Tensor) -> Tensor:
    return co.simplex(raw)


def eager_dim0(raw: Tensor) -> Tensor:
    return torch.softmax(raw, 0)


def ours_dim0(raw: Tensor) -> Tensor:
    return co.simplex(raw, 0)


ROWS = {"torch.softmax": eager, OURS: ours}
COLUMNS = {"torch.softmax": eager_dim0, OURS: ours_dim0}

JOBS = [
    transform(0, "simplex", "rows of 2 to 65 536", rows(LENGTHS), ROWS, MOVED),
    transform(1, "simplex", "rows of 2 to 65 536", rows(LENGTHS), ROWS, MOVED, headline=True),
    transform(2, "simplex", "rows of 4 to 65 536", rows((4, 32, 1024, 65536)), ROWS, MOVED),
    transform(0, "simplex_dim0", "along the first dimension", [(32, 32768)], COLUMNS, MOVED, grows=1),
    transform(1, "simplex_dim0", "along the first dimension", [(32, 32768)], COLUMNS, MOVED, grows=1),
]
