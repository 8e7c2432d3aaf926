"""Adam on the raw values of a transform, in one pass, while the parameter itself holds the transformed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._base import ConstrainedAdam, Params


class ReparametrizedAdam(ConstrainedAdam):
    """The steps of ``torch.optim.Adam`` on raw, where x = transform(raw), with x as the parameter.

    In place of ``x = constrained_ops.bounded(raw, ...)`` in ``forward`` (or ``positive``, or ``simplex``) and Adam on
    raw: the same trajectory, but x is an ordinary leaf strictly inside its set, and neither ``forward`` nor
    ``backward`` has a transform. Derivative, Adam on raw, and transform are one pass over memory.

    raw lives in the optimizer's state, in float32 for float16 and bfloat16 parameters, for which it is a master copy.
    It follows x where someone else writes to x: a value in the constraint gets the raw that leads to it (one on a
    bound a finite one), any other is a ValueError in the next step. Writes through ``x.data`` go past PyTorch's
    version counters, and are noticed only by chance. Weight decay acts on raw. Even with lr = 0 a step may change x by
    a rounding error.

    Args:
        params: as for ``torch.optim.Adam``: tensors, named tensors, or groups, which may override all that follows.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable, decoupled_weight_decay: as there.
        constraint: as for :class:`ProjectedAdam`. Two bounds mean :func:`constrained_ops.bounded`, one bound softplus
            (``constrained_ops.Positive(kind="exp")`` the exponential), the simplex softmax. ``None`` means Adam.
        state_dtype: dtype of the moments of float16 and bfloat16 parameters: torch.float32 (default), or their own.

    With ``capturable`` a step can be captured in a CUDA graph, after one like it that was not. The graph reads memory
    of the optimizer in every replay: keep the optimizer, its state and the parameters as long as the graph.

    Raises:
        TypeError, NotImplementedError, ValueError: as :class:`ProjectedAdam`.
    """

    _reparametrized = True

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
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)
