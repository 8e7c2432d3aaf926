"""What the references of the rowwise transforms share."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import next_above


def shifted(v: Tensor, logits: Tensor, dim: int) -> Tensor:
    """v less its value at the row's largest x, so that the mean keeps its digits when one x is nearly 1."""
    v = v.to(logits.dtype)
    if logits.dim() == 0:
        return v - v
    return v - v.gather(dim, logits.argmax(dim, keepdim=True))


def centered(x: Tensor, v: Tensor, dim: int) -> Tensor:
    """v less its mean under x."""
    return v - (x * v).sum(dim, keepdim=True) if x.dim() else v - v


def smallest_positive(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Of ``dtype``, in the dtype and on the device of ``like``."""
    return next_above(torch.zeros((), dtype=like.dtype, device=like.device), dtype)
