"""Operators of the CPU library past PyTorch's dispatcher (``csrc/cpu/direct.h``).

A small tensor spends more time in the dispatcher than in all of our code, so that a call with nothing unusual about it
goes straight to C++. The dispatcher gets the calls that

- have an argument other than numbers and small, plain tensors on the CPU;
- something may want to see: modes of ``torch.utils._python_dispatch`` and ``torch.overrides``, ``torch.func``,
  profilers, ``torch.jit.trace``.

Tensors cross by DLPack's exchange table. The questions to PyTorch are not all public names: where one is missing, all
calls go through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Operator = torch._ops.OpOverload


def dispatched(operator: Operator) -> Callable[..., Any]:
    """``operator`` through the dispatcher, past OpOverload's Python frame."""
    return operator._op


def caller(library: Any) -> Callable[[Operator], Callable[..., Any]]:
    """What turns an operator of ``library``, the module ``_C``, into a function that goes past the dispatcher."""
    profiler = torch.autograd.profiler
    try:
        _ = profiler._is_profiler_enabled  # asked for by its name below: the flag is bound anew at each change
        known = library.open_direct(
            exchange=torch.Tensor.__dlpack_c_exchange_api__,
            types=[torch.Tensor, torch.nn.Parameter],
            observers=[
                torch._C._len_torch_dispatch_stack,
                torch._C._len_torch_function_stack,
                torch._C._are_functorch_transforms_active,
                torch._C._get_tracing_state,
                partial(getattr, profiler, "_is_profiler_enabled"),  # of any thread
            ],
            is_cpu=torch.Tensor.is_cpu.__get__,  # type: ignore[attr-defined]
            is_neg=torch.Tensor.is_neg,
            is_zero=torch.Tensor._is_zerotensor,
            empty_like=torch.empty_like,
            empty_strided=torch.empty_strided,
            copy_=torch.Tensor.copy_,
            dtypes=[torch.float16, torch.bfloat16, torch.float32, torch.float64],
        )
    except AttributeError:
        known = False
    if not known:
        return dispatched

    def direct(operator: Operator) -> Callable[..., Any]:
        name = operator._schema.name.rpartition("::")[2]
        overload = operator._overloadname
        return library.direct(name if overload == "default" else f"{name}.{overload}", dispatched(operator))

    return direct
