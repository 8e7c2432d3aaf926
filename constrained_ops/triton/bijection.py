"""The bijections onto the simplex: what launches the kernels of ``ilr.py`` and ``stick_breaking.py``.

Tiles are those of ``simplex.py``, over the rows of x. Sums along a row go on from block to block.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .._library import BIJECTION_RESULTS, compute_dtype, empty_bijection
from .ilr import ilr_backward_kernel, ilr_forward_kernel
from .launch import device_of, with_layout_of
from .simplex import launch_rows
from .stick_breaking import stick_breaking_backward_kernel, stick_breaking_forward_kernel


def _tile(raw: Tensor) -> int:
    """Scans need more registers than sums."""
    return 512 if raw.dtype == torch.float64 else 2048


def _dense(raw: Tensor, dim: int) -> Tensor:
    """A tensor of x's layout, over which rows are walked."""
    return empty_bijection(raw, dim, ("x",))[0]


def _operand(tensor: Tensor | None, raw: Tensor, dim: int, kind: str) -> Tensor:
    """In the layout of a result of that kind; any tensor where there is none."""
    return raw if tensor is None else with_layout_of(empty_bijection(raw, dim, (kind,))[0], tensor)


def _forward(kernel: Any, raw: Tensor, dim: int, with_log_det: bool) -> tuple[Tensor, ...]:
    results = x, _ = empty_bijection(raw, dim, BIJECTION_RESULTS["forward_log_det"], 3 if with_log_det else 1)
    if x.numel():
        with device_of(raw):
            operand = _operand(raw, raw, dim, "raw")
            launch_rows(kernel, results, [operand], x, dim, heavy=True, tile=_tile(raw), WITH_LOG_DET=with_log_det)
    return results


def _backward(
    kernel: Any,
    along: Tensor | None,
    grad_x: Tensor | None,
    grad_log_det: Tensor | None,
    raw: Tensor,
    dim: int,
    needed: int,
) -> tuple[Tensor, ...]:
    results = empty_bijection(raw, dim, BIJECTION_RESULTS["double_backward"], needed)
    if not any(result.numel() for result in results):
        return results
    dense = _dense(raw, dim)
    with device_of(raw):
        operands = [
            _operand(tensor, raw, dim, kind)
            for tensor, kind in ((along, "raw"), (grad_x, "x"), (grad_log_det, "log_det"), (raw, "raw"))
        ]
        if kernel is stick_breaking_backward_kernel:
            operands.append(raw.new_empty(_most_carries(dense, dim), dtype=compute_dtype(raw.dtype)))
        launch_rows(
            kernel,
            results,
            operands,
            dense,
            dim,
            heavy=True,
            tile=_tile(raw),
            WITH_ALONG=along is not None,
            WITH_G=grad_x is not None,
            WITH_H=grad_log_det is not None,
            FOR_G=results[0].numel() > 0,
            FOR_H=results[1].numel() > 0,
            FOR_RAW=results[2].numel() > 0,
        )
    return results


def _most_carries(dense: Tensor, dim: int) -> int:
    """Two for each of the shortest blocks that ``launch_rows`` makes of a row."""
    shortest = 16
    return 2 * (dense.numel() // dense.shape[dim]) * triton.cdiv(dense.shape[dim], shortest)


def _kernels(forward: Any, backward: Any) -> dict[str, Callable[..., Any]]:
    return {
        "forward": lambda raw, dim: _forward(forward, raw, dim, False)[0],
        "forward_log_det": lambda raw, dim: _forward(forward, raw, dim, True),
        "backward": lambda g, h, raw, dim: _backward(backward, None, g, h, raw, dim, 4)[2],
        "double_backward": lambda along, g, h, raw, dim, needed: _backward(backward, along, g, h, raw, dim, needed),
    }


ILR = _kernels(ilr_forward_kernel, ilr_backward_kernel)
STICK_BREAKING = _kernels(stick_breaking_forward_kernel, stick_breaking_backward_kernel)
