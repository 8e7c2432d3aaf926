"""What the optimizers should do, in float64 and by other means: Adam as published, and a projection that sorts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Adam:
    """One tensor's Adam. ``direction(grad, x)`` gives the point that Adam would go to, and its denominators d."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False
    floor: float = 0.0  # of d, relative to the largest along the last dimension
    t: int = 0
    m: Any = 0.0
    v: Any = 0.0
    v_max: Any = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def step(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        g, x = grad.double(), x.double()
        self.t += 1
        if self.maximize:
            g = -g
        if self.decoupled_weight_decay:
            x = x - self.lr * self.weight_decay * x
        else:
            g = g + self.weight_decay * x
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.v_max = torch.maximum(self.v_max, self.v)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - beta2**self.t)
        d = v_hat.sqrt() + self.eps
        if self.floor:
            d = d.maximum(self.floor * d.amax(-1, keepdim=True))
        return x - self.lr * self.m / (1 - beta1**self.t) / d, d


def project_by_sorting(y: Tensor, d: Tensor, total: float = 1.0) -> Tensor:
    """The minimiser of sum d (x - y)^2 over the simplex, per row.

    No support has a larger multiplier than the right one, which is some of the largest d y.
    """
    y, d = y.double(), d.double()
    order = (y * d).argsort(-1, descending=True)
    above, below = (t.gather(-1, order).cumsum(-1) for t in (y, 1 / d))
    inside = y * d > ((above - total) / below).amax(-1, keepdim=True)
    above, below = (torch.where(inside, t, 0.0).sum(-1, keepdim=True) for t in (y, 1 / d))  # with more digits
    return (y - (above - total) / below / d).clamp(min=0.0)
