"""What the autograd Functions of all families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from ._library import Kernels

# Not a public name; without it what Function.apply would find out.
_any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", lambda *args: True)


def applier(function: type[Function], jvp: Callable[..., Any]) -> Callable[..., Any]:
    """What applies ``function``: differentiable in forward mode too, batched by ``vmap``, and cheap where it can be.

    ``torch.compile`` refuses Functions that define ``jvp``, so it gets ``function`` itself, with the reference formulas
    in place of kernels that are an argument, for the compiler to fuse with what surrounds them. All else gets a
    subclass:

    - ``torch.func`` one with a rule for ``vmap``, through the Python part of ``Function.apply``, which unwraps what it
      has wrapped and costs a small tensor a tenth of its whole forward and backward;
    - plain autograd one that goes past that part, see :func:`_recorder`;
    - where nothing is to be recorded, no Function at all, which takes longer than the transform of a small tensor.
    """
    compute: Callable[..., Any] = function.forward
    transformed = _derived(function, jvp=staticmethod(jvp), generate_vmap_rule=True)
    record = _recorder(function, jvp)

    def apply(*args: Any) -> Any:
        if is_compiling():
            return function.apply(*[arg.reference if isinstance(arg, Kernels) else arg for arg in args])
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*args)
        if (torch.is_grad_enabled() and _any_requires_grad(*args)) or forward_ad._current_level >= 0:
            return record(*args)
        return compute(*args)

    return apply


def _recorder(function: type[Function], jvp: Callable[..., Any]) -> Callable[..., Any]:
    """What applies ``function`` in plain autograd: at the class of C++, past the Python part.

    ``forward`` does the work of ``setup_context``: from torch 2.15 on ``apply`` binds the arguments of Functions that
    have one to their signature at each call, which takes four times as long as all the rest of it.
    """
    compute: Callable[..., Any] = function.forward
    setup: Callable[..., None] = function.setup_context

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        setup(ctx, args, output)
        return output

    plain = _derived(
        function,
        jvp=staticmethod(jvp),
        forward=staticmethod(forward),
        setup_context=staticmethod(Function.setup_context),
    )
    return past_python(plain)


def past_python(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that ``torch.func`` has no part in."""
    return super(Function, function).apply  # type: ignore[misc]


def _derived(function: type[Function], **members: Any) -> Any:
    return type(function.__name__, (function,), members)


def save_for_forward(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_forward`` where there is a forward mode, which mostly there is not."""
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def is_transforming() -> bool:
    """Whether more than plain autograd looks on: a compiler, ``torch.func`` or forward mode."""
    return is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def implementation(kernels: Kernels) -> Kernels:
    """Of kernels that are no argument of a Function: inside ``torch.compile`` the reference formulas."""
    return kernels.reference if is_compiling() else kernels


def operators(kernels: Kernels) -> Kernels:
    """Inside ``torch.compile`` the registered operators, where the compiler would make less of the formulas."""
    return kernels.operators if is_compiling() else kernels


def needs_graph() -> bool:
    """Whether what runs now, in a backward pass, must itself be recorded. Compilers differentiate once only."""
    return torch.is_grad_enabled() and not is_compiling()


def bits(wanted: Iterable[bool]) -> int:
    """The kernels' ``needed`` argument: bit i asks for result i."""
    needed, bit = 0, 1
    for want in wanted:  # a generator costs a small tensor more than its kernel
        if want:
            needed |= bit
        bit <<= 1
    return needed


def only(wanted: Sequence[bool], results: Sequence[Tensor]) -> list[Tensor | None]:
    """The results that were asked for, ``None`` in place of the others."""
    return [result if want else None for want, result in zip(wanted, results, strict=True)]
