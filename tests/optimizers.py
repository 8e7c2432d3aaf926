"""What tests of the optimizers share: parameters and steps, and whether anything has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

UNIT = constraints.unit_interval
OPTIMIZERS = [ProjectedAdam, ReparametrizedAdam]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.rand(3, 4).to(dtype)), Parameter(torch.rand(5).to(dtype))]


def run(optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p)
        optimizer.step()


def everything(optimizer: Any) -> list[Any]:
    """All values of parameters and state, and the numbers of the groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t.detach().clone() for p in params for t in (p, *optimizer.state.get(p, {}).values())]
    return [*tensors, len(optimizer.state), len(optimizer.param_groups)]


def same(some: list[Any], others: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b

    return len(some) == len(others) and all(map(equal, some, others))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients whose sizes differ from element to element, so that no two are preconditioned alike."""
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[-1])).to(dtype)


def set_grads(params: list[Any], like: list[Any] | None = None) -> None:
    for i, p in enumerate(params):
        p.grad = like[i].grad.clone() if like else noise(*p.shape, dtype=p.dtype)


def copy_of(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]
