"""``simplex`` of the kinds that are bijections, in place of what PyTorch offers or one writes in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

import constrained_ops as co

from .harness import OURS, Job

NUMBERS = 2**20
SHAPES = [(NUMBERS // k, k) for k in (4, 32, 128, 1024, 65536)]  # of x


def one_shorter(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape[:-1], shape[-1] - 1)]


def eager_ilr(raw: Tensor) -> Tensor:
    n = torch.arange(1, raw.shape[-1] + 1, dtype=raw.dtype, device=raw.device)
    w = raw * (n * (n + 1)).rsqrt()
    return torch.softmax(-pad(w.cumsum(-1), (1, 0)) - pad(n * w, (1, 0)), -1)


def ours_ilr(raw: Tensor) -> Tensor:
    return co.simplex(raw, kind="ilr")


torch_distributions = torch.distributions.StickBreakingTransform()


def ours_stick_breaking(raw: Tensor) -> Tensor:
    return co.simplex(raw, kind="stick_breaking")


JOBS = [
    Job(
        "ilr",
        "isometric log-ratios, rows from many short ones to few long ones, forward + backward",
        shapes=SHAPES,
        peers={"eager": eager_ilr, OURS: ours_ilr},
        moved=(2, 3),
        leaves=one_shorter,
    ),
    Job(
        "stick_breaking",
        "stick-breaking, rows from many short ones to few long ones, forward + backward",
        shapes=SHAPES,
        peers={"torch.distributions": torch_distributions, OURS: ours_stick_breaking},
        moved=(2, 3),
        leaves=one_shorter,
        reference="torch.distributions",
    ),
]
