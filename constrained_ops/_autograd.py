"""What the autograd Functions of all families share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from ._library import Kernels


def applier(function: type[Function], jvp: Callable[..., Any]) -> Callable[..., Any]:
    """What applies ``function``: differentiable in forward mode too, batched by ``vmap``, and cheap where it can be.

    ``torch.compile`` refuses Functions that define ``jvp``, so it gets ``function`` itself and all else a subclass. The
    Python part of ``Function.apply`` unwraps what ``torch.func`` has wrapped; where no such transform is active it is
    left out, because it costs a small tensor a tenth of its whole forward and backward; where nothing is recorded, all
    of the Function is, which is two fifths of reading a small parametrized attribute.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)  # torch 2.15 asks for it at every call, which takes 35 us anew
    eager: Any = type(function.__name__, (function,), {"jvp": staticmethod(jvp), "generate_vmap_rule": True})
    bare: Callable[..., Any] = super(Function, eager).apply

    def apply(*args: Any) -> Any:
        if is_compiling():
            return function.apply(*args)
        if torch._C._are_functorch_transforms_active():
            return eager.apply(*args)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return bare(*args)
        return function.forward(*args)

    return apply


def implementation(kernels: Kernels) -> Kernels:
    """Inside ``torch.compile`` the reference formulas, for the compiler to fuse with what surrounds them."""
    return kernels.reference if is_compiling() else kernels


def operators(kernels: Kernels) -> Kernels:
    """Inside ``torch.compile`` the registered operators, where the compiler would make less of the formulas."""
    return kernels.operators if is_compiling() else kernels


def needs_graph() -> bool:
    """Whether what runs now, in a backward pass, must itself be recorded. Compilers differentiate once only."""
    return torch.is_grad_enabled() and not is_compiling()


def bits(wanted: Iterable[bool]) -> int:
    """The kernels' ``needed`` argument: bit i asks for result i."""
    return sum(want << i for i, want in enumerate(wanted))


def only(wanted: Sequence[bool], results: Sequence[Tensor]) -> list[Tensor | None]:
    """The results that were asked for, ``None`` in place of the others."""
    return [result if want else None for want, result in zip(wanted, results, strict=True)]
