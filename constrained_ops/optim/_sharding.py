"""What the optimizers need to know of DTensors, as FullyShardedDataParallel (``fully_shard``) makes them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from .._checks import Bound
from .._constraints import Box, Record, SimplexOf


def is_sharded(t: Tensor) -> bool:
    module: Any = sys.modules.get("torch.distributed.tensor")  # importing it costs more than most programs need
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """This process's part, which is all of a plain tensor. To be called without gradients."""
    return t.to_local() if is_sharded(t) else t


def local_grad(param: Any, grad: Any) -> Tensor:
    """The part of the gradient that belongs to this process's part of the parameter."""
    if not is_sharded(param):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    part = grad.to_local()
    return part.wait() if hasattr(part, "wait") else part


def like(param: Any, part: Tensor) -> Tensor:
    """``part``, which belongs to this process's part of the parameter, as the tensor of which it is a part."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def shard(where: str, param: Any, record: Record | None) -> Record | None:
    """A record for the whole parameter as one for this process's part.

    Raises:
        ValueError: if a simplex would be cut, or the parameter is a sum that is yet to be taken.
    """
    if record is None or not is_sharded(param):
        return record
    for placement in param.placements:
        if placement.is_partial():
            raise ValueError(f"{where} has placement {placement}: a constraint needs the sum itself")
        if isinstance(record, SimplexOf) and placement.is_shard(record.dim):
            raise ValueError(
                f"{where} is sharded along dim {record.dim}, along which its constraint sums to {record.total}; "
                "shard another dimension"
            )
    if isinstance(record, Box):
        return replace(record, lower=_bound(param, record.lower), upper=_bound(param, record.upper))
    return record


def _bound(param: Any, bound: Bound) -> Bound:
    if not isinstance(bound, Tensor):
        return bound
    from torch.distributed.tensor import DTensor, Replicate

    whole: Any = bound
    if not is_sharded(whole):
        mesh = param.device_mesh
        whole = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=param.placements).to_local()
