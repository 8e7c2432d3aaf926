"""A thousand steps of ``ReparametrizedAdam``, all transforms, options and dtypes, beside autograd and Adam in float64.

All at once: a parameter group for each transform and option, one optimizer for each dtype, one oracle for all.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from adam import Adam
from conftest import implementations
from test_optim import DTYPES, OPTIONS, close, transforms
from torch import Tensor
from torch.nn import Parameter

from constrained_ops.optim import ReparametrizedAdam

SHAPE, STEPS, LR = (3, 4), 1000, 1e-2
UNITS = 300  # of rounding that may add up
CASES = list(itertools.product(transforms().values(), OPTIONS.values()))


def beginning_at(raw: Tensor, dtype: torch.dtype) -> ReparametrizedAdam:
    """Parameters of that dtype, whose raws are these to the last digit."""
    groups = [
        {"params": [Parameter(forward(raw).to(dtype))], "constraint": constraint, **options}
        for (constraint, forward), options in CASES
    ]
    optimizer = ReparametrizedAdam(groups, lr=0.0)
    walk(optimizer, torch.zeros(SHAPE))
    for group in optimizer.param_groups:
        group["lr"] = LR
        for name, value in optimizer.state[group["params"][0]].items():
            value.copy_(raw) if name == "raw" else value.zero_()
    return optimizer


def walk(optimizer: ReparametrizedAdam, grad: Tensor) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = grad.to(p)
    optimizer.step()


@pytest.mark.parametrize("backend", [each for each in implementations() if each.id != "reference"], indirect=True)
def test_a_thousand_steps_are_those_of_adam_on_raw(backend: str) -> None:
    start = torch.randn(SHAPE)
    optimizers = [beginning_at(start, dtype) for dtype in DTYPES]
    raws = [start.double() for _ in CASES]
    oracles = [Adam(lr=LR, **options) for _, options in CASES]
    # Given ones, lest the roads lead apart by themselves, and numbers of all dtypes.
    for grad in torch.randint(-16, 17, (STEPS, *SHAPE)) * 2.0 ** torch.arange(-8, 4).view(SHAPE):
        for optimizer in optimizers:
            walk(optimizer, grad)
        leaves = [raw.requires_grad_() for raw in raws]
        values = [forward(leaf) for ((_, forward), _), leaf in zip(CASES, leaves, strict=True)]
        grads = torch.autograd.grad(values, leaves, [grad.double()] * len(values))
        raws = [oracle.step(g, raw.detach())[0] for oracle, g, raw in zip(oracles, grads, raws, strict=True)]
    for dtype, optimizer in zip(DTYPES, optimizers, strict=True):
        sixteen = torch.finfo(dtype).bits == 16
        for ((_, forward), _), group, raw in zip(CASES, optimizer.param_groups, raws, strict=True):
            (x,) = group["params"]
            close(optimizer.state[x]["raw"], raw, UNITS, scale=1.0)
            close(x, forward(raw), 1 if sixteen else UNITS, scale=0.1 if sixteen else 1.0)
