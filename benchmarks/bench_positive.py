"""``positive``, in place of ``torch.nn.functional.softplus``."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

import constrained_ops as co

from .harness import OURS, Job


def eager(raw: Tensor) -> Tensor:
    return softplus(raw)


def ours(raw: Tensor) -> Tensor:
    return co.positive(raw)


PEERS = {"eager": eager, OURS: ours}
SHAPES = [(2**20,)]

JOBS = [
    Job(
        "positive",
        "forward + backward",
        shapes=SHAPES,
        peers=PEERS,
        moved=(2, 3),  # raw -> x; grad_x, raw -> grad_raw
    ),
    Job(
        "positive_second_order",
        "forward + backward with create_graph + backward of the gradient",
        shapes=SHAPES,
        peers=PEERS,
        moved=(2, 3, 4),  # as above; along, grad_x, raw -> second gradient
        order=2,
    ),
]
