"""The one place where arguments are checked. Every message names the operator, the argument and the value."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from ._library import compute_dtype

Bound = float | Tensor

_accepted: set[tuple[float, float, torch.dtype]] = set()


def floating(op: str, raw: Any, name: str = "raw") -> None:
    if not isinstance(raw, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(raw).__name__}")
    if raw.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {raw.dtype}")


def scalar_bounds(op: str, raw: Tensor, lower: float, upper: float, name: str = "raw") -> None:
    """Check raw and two floats between which its dtype must have a number. From the second time on, one look-up."""
    if is_compiling():  # bounds may be symbols here, for which every comparison is a guard
        floating(op, raw, name)
        _in_order(op, lower, upper)
        return
    try:
        if (lower, upper, raw.dtype) in _accepted:
            return
    except (AttributeError, TypeError):
        pass  # no tensor, or no number: said below
    floating(op, raw, name)
    for argument, value in (("lower", lower), ("upper", upper)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {argument} must be a float or a Tensor, got {type(value).__name__}")
    _in_order(op, lower, upper)
    _check_room(op, raw.dtype, lower, upper)
    if len(_accepted) >= 4096:  # bounds that change at every call must not grow it for ever
        _accepted.clear()
    _accepted.add((lower, upper, raw.dtype))


def _in_order(op: str, lower: float, upper: float) -> None:
    if not lower < upper:  # a NaN is caught here as well
        raise ValueError(f"{op}: lower must be less than upper, got lower={lower} and upper={upper}")


def _check_room(op: str, dtype: torch.dtype, lower: float, upper: float) -> None:
    compute = compute_dtype(dtype)
    for argument, bound in (("lower", lower), ("upper", upper)):
        if math.isfinite(bound) and abs(bound) > torch.finfo(compute).max:
            raise ValueError(f"{op}: {argument} overflows {compute}, got lower={lower} and upper={upper}")
    with real_tensors():
        smallest, largest = inside(torch.tensor(lower, dtype=compute), torch.tensor(upper, dtype=compute), dtype)
        room, width = bool(smallest <= largest), torch.tensor(upper - lower, dtype=compute).item()
    if not room:
        raise ValueError(f"{op}: {dtype} has no number strictly between lower={lower} and upper={upper}")
    if math.isinf(width) and math.isfinite(lower) and math.isfinite(upper):
        raise ValueError(f"{op}: upper - lower overflows {compute}, got lower={lower} and upper={upper}")


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors made of numbers have values here, also where a model is built on "meta" or of fake tensors."""
    with torch.device("cpu"), _disable_current_modes():
        yield


def ordered(op: str, lower: Bound, upper: Bound) -> None:
    """Check bounds by themselves, elements of tensors included, which waits for the device."""
    for argument, bound in (("lower", lower), ("upper", upper)):
        if not isinstance(bound, (int, float, Tensor)):
            raise TypeError(f"{op}: {argument} must be a float or a Tensor, got {type(bound).__name__}")
        if isinstance(bound, Tensor) and (bound.is_complex() or bound.dtype == torch.bool):
            raise TypeError(f"{op}: {argument} must be a float or a real Tensor, got dtype {bound.dtype}")
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor):
        _in_order(op, lower, upper)
        return
    if any(isinstance(bound, Tensor) and bound.is_meta for bound in (lower, upper)):
        return
    with real_tensors():
        below, above = (torch.as_tensor(bound).detach().double().cpu() for bound in (lower, upper))
        try:
            below, above = torch.broadcast_tensors(below, above)
        except RuntimeError:
            shapes = f"{tuple(below.shape)} and {tuple(above.shape)}"
            raise ValueError(f"{op}: lower and upper must broadcast to one shape, got {shapes}") from None
        if (wrong := ~(below < above)).any():
            _in_order(op, below[wrong][0].item(), above[wrong][0].item())


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def next_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of ``dtype`` that is strictly greater than ``x``, as ``x.dtype``; shape of ``x``."""
    nearest = x.to(dtype)
    bits = nearest.view(_INTEGERS[dtype])
    minus_zero = torch.iinfo(bits.dtype).min
    up = torch.where(bits >= 0, bits + 1, torch.where(bits == minus_zero, 1, bits - 1))
    rounded = nearest.to(x.dtype)
    return torch.where(rounded > x, rounded, up.to(bits.dtype).view(dtype).to(x.dtype))


def inside(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of ``dtype`` strictly between the bounds, in the bounds' dtype."""
    return next_above(lower, dtype), -next_above(-upper, dtype)


def tensor_bounds(op: str, raw: Tensor, lower: Bound, upper: Bound, name: str = "raw") -> tuple[Tensor, Tensor]:
    """Bounds as the operators take them: they broadcast to raw, in its compute dtype, still differentiable."""
    floating(op, raw, name)
    return _tensor_bound(op, raw, lower, "lower", name), _tensor_bound(op, raw, upper, "upper", name)


def _tensor_bound(op: str, raw: Tensor, bound: Bound, argument: str, name: str) -> Tensor:
    if isinstance(bound, Tensor):
        if bound.is_complex() or bound.dtype == torch.bool:
            raise TypeError(f"{op}: {argument} must be a float or a real Tensor, got dtype {bound.dtype}")
        return _operand(op, raw, bound, argument, name)
    return number_bound(op, raw, bound, argument)


def number_bound(op: str, raw: Tensor, bound: float, argument: str) -> Tensor:
    """A float, beside a bound that is a tensor, as an operator takes it."""
    if not isinstance(bound, (int, float)):
        raise TypeError(f"{op}: {argument} must be a float or a Tensor, got {type(bound).__name__}")
    compute = compute_dtype(raw.dtype)
    if raw.is_cpu and not is_compiling() and not is_in_torch_dispatch_mode():
        return _number(op, argument, bound, compute)
    _check_number(op, argument, bound, compute)
    return torch.full((), bound, dtype=compute, device=raw.device)


@functools.lru_cache(maxsize=1024)
def _number(op: str, argument: str, bound: float, compute: torch.dtype) -> Tensor:
    """On the CPU: on a GPU a graph that is being captured would own it."""
    _check_number(op, argument, bound, compute)
    with torch.inference_mode(False):
        return torch.full((), bound, dtype=compute, device="cpu")


def _check_number(op: str, argument: str, bound: float, compute: torch.dtype) -> None:
    if bound != bound:
        raise ValueError(f"{op}: {argument} must not be NaN, got {argument}={bound}")
    if torch.finfo(compute).max < abs(bound) < math.inf:
        raise ValueError(f"{op}: {argument} overflows {compute}, got {argument}={bound}")


def _operand(op: str, raw: Tensor, operand: Tensor, argument: str, name: str) -> Tensor:
    """``operand``, which broadcasts to raw, in raw's compute dtype."""
    if operand.device != raw.device:
        raise ValueError(f"{op}: {argument} is on {operand.device}, {name} on {raw.device}")
    if not _broadcasts(operand.shape, raw.shape):
        shapes = f"{argument} has shape {tuple(operand.shape)}, {name} {tuple(raw.shape)}"
        raise ValueError(f"{op}: {argument} must broadcast to the shape of {name}; {shapes}")
    return operand if operand.dtype == (compute := compute_dtype(raw.dtype)) else operand.to(compute)


def spread(raw: Tensor, *bounds: Bound) -> Tensor:
    """``raw`` in the shape that it has with the bounds, for callers whose bounds may be larger."""
    if not any(isinstance(bound, Tensor) for bound in bounds):
        return raw
    shape = torch.broadcast_shapes(raw.shape, *(bound.shape for bound in bounds if isinstance(bound, Tensor)))
    return raw if raw.shape == shape else raw.expand(shape)


def _broadcasts(shape: torch.Size, wanted: torch.Size) -> bool:
    if shape == wanted[len(wanted) - len(shape) :]:
        return True
    if len(shape) > len(wanted):
        return False
    return all(have in (1, want) for have, want in zip(reversed(shape), reversed(wanted), strict=False))


def dimension(op: str, raw: Tensor, dim: int, name: str = "raw", least: int = 1) -> int:
    """``dim`` as a number that is not negative, along which ``raw`` has at least ``least`` (0 or 1) elements."""
    rank = max(raw.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(
            f"{op}: dim must be from {-rank} to {rank - 1} for {name} of shape {tuple(raw.shape)}, got {dim}"
        )
    dim %= rank
    if raw.dim() and raw.shape[dim] < least:
        raise ValueError(f"{op}: {name} needs at least one element along dim {dim}, got shape {tuple(raw.shape)}")
    return dim


def total(op: str, x: Tensor, value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: total must be a float, got {type(value).__name__}")
    compute = compute_dtype(x.dtype)
    held = torch.finfo(compute)
    if not held.smallest_normal <= value <= held.max:  # a NaN is caught here as well
        raise ValueError(f"{op}: total must be positive, finite and a normal number of {compute}, got total={value}")


def weight(op: str, x: Tensor, value: Any) -> Tensor:
    """A weight with x's shape, in its compute dtype, still differentiable. Its values are not looked at."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: weight must be a Tensor or None, got {type(value).__name__}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: weight must be real, got dtype {value.dtype}")
    return _operand(op, x, value, "weight", "x").expand(x.shape)


def kind(op: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{op}: kind must be {' or '.join(map(repr, known))}, got {given!r}")


def inverse_bounds(op: str, x: Tensor, lower: Bound, upper: Bound) -> tuple[Tensor, Tensor]:
    """Check the arguments of an inverse as those of its transform; return the bounds as tensors."""
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor):
        scalar_bounds(op, x, lower, upper, "x")
    return tensor_bounds(op, x, lower, upper, "x")


def into(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``x`` moved strictly between the bounds if it is on one or a rounding error beyond, NaN if further outside."""
    finite = [torch.where(bound.isinf(), 0.0, bound.abs()) for bound in (lower, upper)]
    slack = torch.finfo(x.dtype).eps * torch.maximum(*finite)
    y = x.to(lower.dtype)
    outside = (y < lower - slack) | (y > upper + slack)
    smallest, largest = inside(lower, upper, x.dtype)
    return torch.where(outside, math.nan, y.clamp(smallest, largest))


def show(bound: Bound) -> str:
    """A bound as messages and reprs have it."""
    return f"tensor of shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else str(bound)
