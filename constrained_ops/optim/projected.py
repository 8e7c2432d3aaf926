"""Adam and a projection, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import ConstrainedAdam, Params


class ProjectedAdam(ConstrainedAdam):
    """``torch.optim.Adam`` whose parameters stay in a set: after every step they are projected onto it.

    In place of ``Adam(...).step()`` and ``p.clamp_(...)``, or of a sort along the simplex. Boxes are clamped. Onto the
    simplex the projection is the one in Adam's own metric: with v as Adam has it, d = sqrt(v_hat) + eps and y the point
    that Adam would go to,

        minimise 1/2 sum_i d_i (x_i - y_i)^2  over  x >= 0, sum_i x_i = total

    so that a constrained optimum is a fixed point. With the Euclidean projection it is not: there the gradient is
    constant on the support, Adam divides it by another number in each coordinate, and only the same metric undoes that.
    In a row, d is at least a thousandth of its largest, in the step too: coordinates that never saw a gradient must
    not take whatever the others lose.

    Args:
        params: as for ``torch.optim.Adam``: tensors, named tensors, or groups, which may override all that follows.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable, decoupled_weight_decay: as there.
        constraint: an object of ``torch.distributions.constraints`` (interval, half_open_interval, unit_interval,
            positive, nonnegative, greater_than, greater_than_eq, less_than, simplex, real, or ``independent`` around
            them), or a ``constrained_ops.Bounded``, ``Positive`` or ``Simplex``; ``None`` for no constraint. An open
            set means its closure. Bounds count as the nearest numbers of the parameter's dtype. Those that are
            tensors must not be written to: for others give the group another constraint.
        metric: "adam", or "euclidean" for the nearest point in the plain sense. They differ on the simplex only.
        state_dtype: dtype of the moments of float16 and bfloat16 parameters: torch.float32 (default), or their own.

    With ``capturable`` a step can be captured in a CUDA graph, after one like it that was not. The graph reads memory
    of the optimizer in every replay: keep the optimizer, its state and the parameters as long as the graph.

    State may be replaced (``optimizer.state[p]["exp_avg"] = ...``), but not the memory behind a tensor of it
    (``.data``), at which steps do not look.

    Raises:
        TypeError: a parameter is not floating-point, an option no number, or what was given is no constraint.
        NotImplementedError: the constraint is not supported.
        ValueError: a parameter starts outside its constraint, a simplex lies along a sharded dimension, or an option
            is out of range.

    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods" (2011); Reddi, Kale and Kumar, "On the convergence
    of Adam and beyond" (2018).
    """

    _reparametrized = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        constraint: Any = None,
        metric: str = "adam",
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "constraint": constraint,
            "metric": metric,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)
