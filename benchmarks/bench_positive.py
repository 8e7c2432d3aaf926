"""``positive``, in place of ``torch.nn.functional.softplus``."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

import constrained_ops as co

from .harness import OURS, Function, optional, transform


def eager(raw: Tensor) -> Tensor:
    return softplus(raw)


def ours(raw: Tensor) -> Tensor:
    return co.positive(raw)


PEERS: dict[str, Function] = {"F.softplus": eager}
if gpytorch := optional("gpytorch.constraints"):
    PEERS["gpytorch"] = gpytorch.Positive().transform
PEERS[OURS] = ours
SIZES = [(1024,), (2**16,), (2**20,), (2**24,)]
MOVED = (2, 3, 4)  # raw -> x; grad_x, raw -> grad_raw; along, grad_x, raw -> second gradient

JOBS = [transform(order, "positive", "above 0", SIZES, PEERS, MOVED, headline=order == 1) for order in (0, 1, 2)]
