"""The step of both optimizers in plain PyTorch. In float64 it is the oracle of the compiled ones.

Per element, with g the gradient, divided by the scale of mixed precision and negated to maximise, and t the step:

    with raw:  g <- g dx/draw at raw, and raw takes the place of x below
    weight decay w:  g <- g + w x, or, decoupled, x <- x (1 - lr w)
    m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2          amsgrad: v <- max of all v so far
    d = sqrt(v / (1 - beta2^t)) + eps     y = x - lr / (1 - beta1^t) m / d
    x <- projection of y in the metric d;  with raw:  raw <- y, x <- transform(y)

On a simplex d is at least FLOOR times its row's largest, in the step as in the projection. A coordinate that has never
seen a gradient has d = eps, and would otherwise absorb whatever the rest of its row gains or loses, a hundred million
times as readily as any other. Step and projection agree on d, so that optima stay fixed points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._constraints import SimplexOf
from .._library import compute_dtype
from ._plans import Hyper, Slot, named_step

FLOOR = 1e-3


class ReferencePlan:
    """A :class:`._plans.Plan`. Needs memory of the size of its largest parameter."""

    in_graphs: list[Any]

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots

    @torch.no_grad()
    def run(
        self,
        grads: Sequence[Tensor],
        hyper: Sequence[Hyper],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if found_inf is not None and found_inf.item():
            return
        _take_steps(self.slots, grads, hyper, grad_scale)


def _steps(slots: Sequence[Slot], grads: Sequence[Tensor], hyper: Sequence[Hyper], grad_scale: Tensor | None) -> None:
    for slot, grad in zip(slots, grads, strict=True):
        _step(slot, grad, hyper[slot.group], grad_scale)


_take_steps = named_step(_steps)


def _step(slot: Slot, grad: Tensor, hyper: Hyper, grad_scale: Tensor | None) -> None:
    compute = compute_dtype(slot.param.dtype)
    g = grad.to(compute)
    if grad_scale is not None:
        g = g / grad_scale
    if hyper.maximize:
        g = -g
    x = slot.param.to(compute)
    if slot.raw is not None and slot.constraint is not None:
        g, x = slot.constraint.backward(g, slot.raw), slot.raw
    if hyper.weight_decay and hyper.decoupled:
        x = x * (1 - hyper.lr * hyper.weight_decay)
    elif hyper.weight_decay:
        g = g + hyper.weight_decay * x

    slot.step.add_(1)
    t: Any = slot.step.item() if slot.step.is_cpu else slot.step.double()
    m = slot.exp_avg.to(compute).lerp(g, 1 - hyper.beta1)
    v = (slot.exp_avg_sq.to(compute) * hyper.beta2).addcmul(g, g, value=1 - hyper.beta2)
    slot.exp_avg.copy_(m)
    slot.exp_avg_sq.copy_(v)
    if slot.max_exp_avg_sq is not None:
        v = torch.maximum(v, slot.max_exp_avg_sq.to(compute))
        slot.max_exp_avg_sq.copy_(v)
    d = v.sqrt() / (1 - hyper.beta2**t) ** 0.5 + hyper.eps
    weight = None
    if slot.raw is None and isinstance(slot.constraint, SimplexOf) and hyper.metric == "adam":
        weight = d = _floored(d, slot.constraint.dim)
    y = (x - hyper.lr / (1 - hyper.beta1**t) * (m / d)).to(compute)

    if slot.constraint is None:
        slot.param.copy_(y)
    elif slot.raw is None:
        slot.param.copy_(slot.constraint.project(y, weight))
    else:
        slot.raw.copy_(y)
        slot.param.copy_(slot.constraint.forward(y, slot.param.dtype))


def _floored(d: Tensor, dim: int) -> Tensor:
    if d.dim() == 0 or d.numel() == 0:
        return d
    return torch.maximum(d, FLOOR * d.amax(dim, keepdim=True))
