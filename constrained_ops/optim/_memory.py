"""Memory of an optimizer's state: laid out as its parameter, in huge pages where the system grants them.

A step goes over all tensors of a parameter side by side. If they begin at the same place of a page, they also leave
their pages together, and what is read of one has the low bits of an address to which another was just written, by which
a processor takes it for the same at first. Large tensors therefore begin elsewhere than their parameter and gradient,
each at a place of its own: with 2^24 elements a step on raw takes some 5% less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._plans import _compiled
from ._sharding import like, local

LARGE, PAGE, LINE, APART = 2**22, 4096, 64, 768  # bytes
PLACES = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 3, "raw": 4}


def empty(name: str, p: Tensor, pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """For the state ``name`` of p, a plain tensor: memory of its own, laid out as ``torch.empty_like(pattern)``."""
    size = pattern.numel() * dtype.itemsize
    if _compiled is None or p.device.type != "cpu" or size < LARGE:
        return torch.empty_like(pattern, dtype=dtype, device=p.device)
    memory = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu")
    _compiled.ask_for_huge_pages(memory.data_ptr(), memory.numel())
    begin = (p.data_ptr() // LINE * LINE + PLACES[name] * APART - memory.data_ptr()) % PAGE
    stride = torch.empty_like(pattern, device="meta").stride()
    part = torch.empty(0, dtype=dtype, device="cpu")
    return part.set_(memory.untyped_storage(), begin // dtype.itemsize, pattern.shape, stride)


def zeros_like(name: str, p: Tensor, dtype: torch.dtype) -> Tensor:
    return like(p, empty(name, local(p), local(p), dtype).zero_())


def laid_out(name: str, p: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype``, on p's device and in memory as ``torch.empty_like(p)``; itself if it is so already."""
    stride = torch.empty_like(local(p), device="meta").stride()
    if value.dtype == dtype and value.device == p.device and local(value).stride() == stride:
        return value
    return like(p, empty(name, local(p), local(p), dtype)).copy_(value)
