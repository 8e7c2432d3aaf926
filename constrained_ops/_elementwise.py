"""The family of elementwise transforms: reference kernels made of one set of formulas, and their autograd.

The counterpart of ``csrc/math/elementwise.h``. A transform gives a :class:`Point`; forward, backward and double
backward follow from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _checks, _library
from ._autograd import applier, bits, is_transforming, needs_graph, only, past_python, save_for_forward
from ._library import Kernels, compute_dtype


class Point:
    """Value, log-derivative and all derivatives up to the second of a transform at raw, each computed when read.

    Names as in ``csrc/math/elementwise.h``; ``width`` is upper - lower, and d/dlower = -d/dwidth where both bounds act.
    """

    x: Any
    x_raw: Any
    x_raw_raw: Any
    x_lower: Any = 0.0
    x_upper: Any = 0.0
    x_raw_width: Any = 0.0
    log_det: Any
    log_det_raw: Any
    log_det_raw_raw: Any
    log_det_width: Any = 0.0
    log_det_width_width: Any = 0.0

    def __init__(self, raw: Tensor, lower: Any, upper: Any) -> None:
        self.raw, self.lower, self.upper = raw, lower, upper


PointAt = Callable[[Tensor, Any, Any], Point]


def references(point_at: PointAt) -> dict[str, Callable[..., Any]]:
    """The kernels of the elementwise family in plain PyTorch. Bounds are floats or tensors alike.

    ``forward`` can give a narrower dtype than raw's, strictly inside in that one.
    """

    def at(raw: Tensor, lower: Any, upper: Any) -> Point:
        return point_at(raw.to(compute_dtype(raw.dtype)), lower, upper)

    def inside(point: Point, dtype: torch.dtype) -> Tensor:
        zero = point.raw.new_zeros(())
        smallest, largest = _checks.inside(zero + point.lower, zero + point.upper, dtype)
        # Not torch.clamp: its gradient is none of ours, and the order of bounds that leave no room is fixed here.
        x = torch.where(point.x < smallest, smallest, point.x)
        return torch.where(x > largest, largest, x).to(dtype)

    def forward(raw: Tensor, lower: Any, upper: Any, dtype: torch.dtype | None = None) -> Tensor:
        return inside(at(raw, lower, upper), dtype or raw.dtype)

    def forward_log_det(raw: Tensor, lower: Any, upper: Any) -> tuple[Tensor, Tensor]:
        point = at(raw, lower, upper)
        return inside(point, raw.dtype), (point.log_det + torch.zeros_like(point.raw)).to(raw.dtype)

    def backward_tensor(
        grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: Any, upper: Any, needed: int = 7
    ) -> tuple[Tensor, Tensor, Tensor]:
        point = at(raw, lower, upper)
        g, h = _number(grad_x, point.raw), _number(grad_log_det, point.raw)
        return (
            (g * point.x_raw + h * point.log_det_raw).to(raw.dtype),
            g * point.x_lower - h * point.log_det_width,
            g * point.x_upper + h * point.log_det_width,
        )

    def backward(grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: Any, upper: Any) -> Tensor:
        return backward_tensor(grad_x, grad_log_det, raw, lower, upper)[0]

    def double_backward_tensor(
        along_raw: Tensor | None,
        along_lower: Tensor | None,
        along_upper: Tensor | None,
        grad_x: Tensor | None,
        grad_log_det: Tensor | None,
        raw: Tensor,
        lower: Any,
        upper: Any,
        needed: int = 31,
    ) -> tuple[Tensor, ...]:
        point = at(raw, lower, upper)
        a, b, c = (_number(along, point.raw) for along in (along_raw, along_lower, along_upper))
        g, h = _number(grad_x, point.raw), _number(grad_log_det, point.raw)
        for_width = a * g * point.x_raw_width + (c - b) * h * point.log_det_width_width
        return (
            (a * point.x_raw + b * point.x_lower + c * point.x_upper).to(raw.dtype),
            (a * point.log_det_raw + (c - b) * point.log_det_width).to(raw.dtype),
            (a * (g * point.x_raw_raw + h * point.log_det_raw_raw) + (c - b) * g * point.x_raw_width).to(raw.dtype),
            -for_width,
            for_width,
        )

    def double_backward(
        along_raw: Tensor,
        grad_x: Tensor | None,
        grad_log_det: Tensor | None,
        raw: Tensor,
        lower: Any,
        upper: Any,
        needed: int = 7,
    ) -> tuple[Tensor, ...]:
        return double_backward_tensor(along_raw, None, None, grad_x, grad_log_det, raw, lower, upper)[:3]

    return {
        "forward": forward,
        "forward_log_det": forward_log_det,
        "backward": backward,
        "double_backward": double_backward,
        "forward.tensor": forward,
        "forward_log_det.tensor": forward_log_det,
        "backward.tensor": backward_tensor,
        "double_backward.tensor": double_backward_tensor,
    }


def _number(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype)


# --- Autograd ------------------------------------------------------------------------------------------------------
#
# Functions save raw (and tensor bounds), never the result: from the result, float32 derivatives are wrong by a third
# at raw = 16. The transform's kernels are an argument of theirs. Forward mode and third derivatives take the reference
# formulas, which PyTorch can differentiate on.


def _transform_jvp(ctx: Any, raw_t: Tensor, *_: Any) -> Any:
    (raw,) = ctx.saved_tensors
    x_t, log_det_t, _ = ctx.kernels.reference.double_backward(raw_t, None, None, raw, ctx.lower, ctx.upper)
    return (x_t, log_det_t) if ctx.with_log_det else x_t


class Transform(Function):
    """(raw) -> x, or (x, log_det), between bounds that are floats."""

    @staticmethod
    def forward(raw: Tensor, lower: float, upper: float, kernels: Kernels, with_log_det: bool) -> Any:
        return (kernels.forward_log_det if with_log_det else kernels.forward)(raw, lower, upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raw, ctx.lower, ctx.upper, ctx.kernels, ctx.with_log_det = inputs
        ctx.save_for_backward(raw)
        save_for_forward(ctx, raw)
        if ctx.with_log_det:
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None = None) -> Any:
        (raw,) = ctx.saved_tensors
        return _gradient(ctx.kernels, grad_x, grad_log_det, raw, ctx.lower, ctx.upper), None, None, None, None


def _gradient(
    kernels: Kernels, grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: float, upper: float
) -> Any:
    if needs_graph():
        return _transform_backward(grad_x, grad_log_det, raw, lower, upper, kernels)
    return kernels.backward(grad_x, grad_log_det, raw, lower, upper)


def _transform_backward_jvp(
    ctx: Any, grad_x_t: Tensor | None, grad_log_det_t: Tensor | None, raw_t: Tensor | None, *_: Any
) -> Tensor:
    grad_x, grad_log_det, raw = ctx.saved_tensors
    reference, bounds = ctx.kernels.reference, (ctx.lower, ctx.upper)
    by_grads = reference.backward(grad_x_t, grad_log_det_t, raw, *bounds)
    if raw_t is None:
        return by_grads
    return by_grads + reference.double_backward(raw_t, grad_x, grad_log_det, raw, *bounds)[2]


class TransformBackward(Function):
    """(grad_x, grad_log_det, raw) -> grad_raw."""

    @staticmethod
    def forward(
        grad_x: Tensor | None, grad_log_det: Tensor | None, raw: Tensor, lower: float, upper: float, kernels: Kernels
    ) -> Any:
        return kernels.backward(grad_x, grad_log_det, raw, lower, upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.lower, ctx.upper, ctx.kernels = inputs
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, along_raw: Tensor) -> Any:
        kernels = ctx.kernels.reference if torch.is_grad_enabled() else ctx.kernels
        wanted = ctx.needs_input_grad[:3]
        results = kernels.double_backward(along_raw, *ctx.saved_tensors, ctx.lower, ctx.upper, bits(wanted))
        return *only(wanted, results), None, None, None


def _tensor_transform_jvp(
    ctx: Any, raw_t: Tensor | None, lower_t: Tensor | None, upper_t: Tensor | None, *_: Any
) -> Any:
    tangents, inputs = (raw_t, lower_t, upper_t), ctx.saved_tensors
    x_t, log_det_t, *_ = ctx.kernels.reference.double_backward_tensor(*tangents, None, None, *inputs)
    return (x_t, log_det_t) if ctx.with_log_det else x_t


class TensorTransform(Function):
    """(raw, lower, upper) -> x, or (x, log_det), between bounds that are tensors of raw's shape."""

    @staticmethod
    def forward(raw: Tensor, lower: Tensor, upper: Tensor, kernels: Kernels, with_log_det: bool) -> Any:
        return (kernels.forward_log_det_tensor if with_log_det else kernels.forward_tensor)(raw, lower, upper)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.kernels, ctx.with_log_det = inputs
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None = None) -> Any:
        wanted = ctx.needs_input_grad[:3]
        grads = _tensor_gradients(ctx.kernels, grad_x, grad_log_det, ctx.saved_tensors, bits(wanted))
        return *only(wanted, grads), None, None


def _tensor_gradients(
    kernels: Kernels,
    grad_x: Tensor | None,
    grad_log_det: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    needed: int,
) -> Any:
    if needs_graph():
        return _tensor_transform_backward(grad_x, grad_log_det, *inputs, kernels, needed)
    return kernels.backward_tensor(grad_x, grad_log_det, *inputs, needed)


def _tensor_transform_backward_jvp(ctx: Any, *tangents: Tensor | None) -> Any:
    grad_x_t, grad_log_det_t, *input_t = tangents[:5]
    grad_x, grad_log_det, *inputs = ctx.saved_tensors
    reference = ctx.kernels.reference
    by_grads = reference.backward_tensor(grad_x_t, grad_log_det_t, *inputs)
    # The second derivative is symmetric: along the inputs' tangents, backward and forward mode are one map.
    by_inputs = reference.double_backward_tensor(*input_t, grad_x, grad_log_det, *inputs)[2:]
    sums = [a + b for a, b in zip(by_grads, by_inputs, strict=True)]
    return tuple(t if ctx.needed >> i & 1 else t.new_zeros(0) for i, t in enumerate(sums))


class TensorTransformBackward(Function):
    """(grad_x, grad_log_det, raw, lower, upper) -> (grad_raw, grad_lower, grad_upper)."""

    @staticmethod
    def forward(
        grad_x: Tensor | None,
        grad_log_det: Tensor | None,
        raw: Tensor,
        lower: Tensor,
        upper: Tensor,
        kernels: Kernels,
        needed: int,
    ) -> Any:
        return kernels.backward_tensor(grad_x, grad_log_det, raw, lower, upper, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.kernels, ctx.needed = inputs
        ctx.save_for_backward(*tensors)
        save_for_forward(ctx, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        kernels = ctx.kernels.reference if torch.is_grad_enabled() else ctx.kernels
        wanted = ctx.needs_input_grad[:5]
        grad_x, grad_log_det, raw, lower, upper = ctx.saved_tensors
        # Cotangents of the bounds' gradients come in the compute dtype; the kernels take all three alike.
        along = tuple(None if a is None else a.to(raw.dtype) for a in along)
        results = kernels.double_backward_tensor(*along, grad_x, grad_log_det, raw, lower, upper, bits(wanted))
        return *only(wanted, results), None, None


_transform = applier(Transform, _transform_jvp)
_transform_backward = applier(TransformBackward, _transform_backward_jvp)
_tensor_transform = applier(TensorTransform, _tensor_transform_jvp)
_tensor_transform_backward = applier(TensorTransformBackward, _tensor_transform_backward_jvp)


@functools.cache
def _of_raw_alone(kernels: Kernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The transforms between floats and between tensors, in plain autograd, where only raw wants a gradient.

    Bounds are one argument, into which autograd does not look, and may broadcast to raw; kernels are none: a small
    tensor takes long to have either unpacked.
    """

    class Transform(Function):
        """(raw, (lower, upper)) -> x, or (x, log_det)."""

        @staticmethod
        def forward(ctx: Any, raw: Tensor, bounds: tuple[float, float], with_log_det: bool) -> Any:
            ctx.save_for_backward(raw)
            ctx.bounds = lower, upper = bounds
            if with_log_det:
                ctx.set_materialize_grads(False)
                return kernels.forward_log_det(raw, lower, upper)
            return kernels.forward(raw, lower, upper)

        @staticmethod
        def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None = None) -> Any:
            (raw,) = ctx.saved_tensors
            lower, upper = ctx.bounds
            return _gradient(kernels, grad_x, grad_log_det, raw, lower, upper), None, None

    class TensorTransform(Function):
        """(raw, (lower, upper)) -> x, or (x, log_det)."""

        @staticmethod
        def forward(ctx: Any, raw: Tensor, bounds: tuple[Tensor, Tensor], with_log_det: bool) -> Any:
            lower, upper = bounds
            ctx.save_for_backward(raw, lower, upper)
            if with_log_det:
                ctx.set_materialize_grads(False)
                return kernels.forward_log_det_tensor(raw, lower, upper)
            return kernels.forward_tensor(raw, lower, upper)

        @staticmethod
        def backward(ctx: Any, grad_x: Tensor | None, grad_log_det: Tensor | None = None) -> Any:
            return _tensor_gradients(kernels, grad_x, grad_log_det, ctx.saved_tensors, 1)[0], None, None

    return past_python(Transform), past_python(TensorTransform)


def transform(op: str, raw: Tensor, lower: Any, upper: Any, kernels: Kernels, with_log_det: bool) -> Any:
    """(raw, lower, upper) -> x, or (x, log_det), in the name of ``op``. Each bound is a float or a tensor.

    ``expand`` takes as long as the transform of a small tensor, so that only what differentiates bounds or transforms
    the call sees bounds of raw's shape.
    """
    transforming = is_transforming()
    between_floats = type(lower) is float and type(upper) is float  # of floats isinstance(..., Tensor) takes long
    between_tensors = not between_floats and (isinstance(lower, Tensor) or isinstance(upper, Tensor))
    if not between_tensors:
        _checks.scalar_bounds(op, raw, lower, upper)
        if transforming:
            return _transform(raw, lower, upper, kernels, with_log_det)
    else:
        # Python takes long to find out whether bounds fit as they are.
        if transforming or not _library.bounds_fit(raw, lower, upper):
            lower, upper = _checks.tensor_bounds(op, raw, lower, upper)
        elif not isinstance(lower, Tensor):
            lower = _checks.number_bound(op, raw, lower, "lower")
        elif not isinstance(upper, Tensor):
            upper = _checks.number_bound(op, raw, upper, "upper")
        if transforming or lower.requires_grad or upper.requires_grad:
            if lower.shape != raw.shape:
                lower = lower.expand(raw.shape)
            if upper.shape != raw.shape:
                upper = upper.expand(raw.shape)
            return _tensor_transform(raw, lower, upper, kernels, with_log_det)
    if torch.is_grad_enabled() and raw.requires_grad:
        return _of_raw_alone(kernels)[between_tensors](raw, (lower, upper), with_log_det)
    forward = TensorTransform.forward if between_tensors else Transform.forward
    return forward(raw, lower, upper, kernels, with_log_det)
