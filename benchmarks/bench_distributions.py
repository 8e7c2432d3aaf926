"""``biject_to``'s transforms, value and log-determinant, in place of ``torch.distributions``' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

import constrained_ops as co

from .harness import OURS, transform

CONSTRAINTS = {"interval": constraints.interval(-1.0, 2.0), "simplex": constraints.simplex}


def density(transform: Transform) -> Callable[[Tensor], Tensor]:
    """Both results in one tensor of raw's shape."""

    def both(raw: Tensor) -> Tensor:
        y = transform(raw)
        log_det = transform.log_abs_det_jacobian(raw, y)
        return y + log_det if log_det.shape == y.shape else y[..., :-1] + log_det.unsqueeze(-1)

    return both


def peers(constraint: constraints.Constraint) -> Mapping[str, Callable[[Tensor], Tensor]]:
    with co.distributions.installed():
        ours = biject_to(constraint)
    return {
        "torch.distributions": density(biject_to(constraint)),
        # A cache of its own for each run, which ends with a backward pass through what it holds.
        f"{OURS}, cached": lambda raw: density(ours.with_cache())(raw),
        OURS: density(ours),
    }


JOBS = [
    transform(
        1,
        f"biject_to_{name}",
        f"biject_to({name}), value and log-determinant",
        [(8,), (1000, 99), (2**14, 64)],
        peers(constraint),
        moved=(3, 4),  # raw -> y, log_det; both gradients, raw -> grad_raw
    )
    for name, constraint in CONSTRAINTS.items()
]
