"""Memory of an optimizer's state: laid out as its parameter, in huge pages where the system grants them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._plans import _compiled
from ._sharding import local


def fresh(state: Tensor) -> Tensor:
    """``state``, whose memory is its own and has not been written to yet."""
    memory = local(state)
    if _compiled is not None and memory.device.type == "cpu":
        _compiled.ask_for_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())
    return state


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return fresh(torch.empty_like(p, dtype=dtype, requires_grad=False)).zero_()


def laid_out(p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, on p's device and in memory as ``torch.empty_like(p)``; itself if it is so already."""
    stride = torch.empty_like(local(p), device="meta").stride()
    if value.dtype == dtype and value.device == p.device and local(value).stride() == stride:
        return value
    return fresh(torch.empty_like(p, dtype=dtype, requires_grad=False)).copy_(value)
