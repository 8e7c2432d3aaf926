"""``simplex`` of the kinds that are bijections, in place of what PyTorch offers or one writes in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

import constrained_ops as co

from .harness import OURS, Shape, rows, transform

ROWS = rows((4, 32, 128, 1024, 65536))  # of x
MOVED = (2, 3, 4)  # raw -> x; grad_x, raw -> grad_raw; along, grad_x, raw -> second gradient


def one_shorter(shape: Shape) -> list[Tensor]:
    return [torch.randn(*shape[:-1], shape[-1] - 1)]


def eager_ilr(raw: Tensor) -> Tensor:
    n = torch.arange(1, raw.shape[-1] + 1, dtype=raw.dtype, device=raw.device)
    w = raw * (n * (n + 1)).rsqrt()
    return torch.softmax(-pad(w.cumsum(-1), (1, 0)) - pad(n * w, (1, 0)), -1)


def ours_ilr(raw: Tensor) -> Tensor:
    return co.simplex(raw, kind="ilr")


def ours_stick_breaking(raw: Tensor) -> Tensor:
    return co.simplex(raw, kind="stick_breaking")


ILR = {"eager": eager_ilr, OURS: ours_ilr}
STICKS = {"torch.distributions": torch.distributions.StickBreakingTransform(), OURS: ours_stick_breaking}

JOBS = [
    # In long rows the sums of the eager lines have lost digits.
    *(transform(order, "ilr", "isometric log-ratios", ROWS, ILR, MOVED, one_shorter, atol=1e-4) for order in (0, 1, 2)),
    *(transform(order, "stick_breaking", "stick-breaking", ROWS, STICKS, MOVED, one_shorter) for order in (0, 1)),
]
