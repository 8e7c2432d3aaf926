"""What all tests share. Without a GPU, Triton runs in its interpreter and the CUDA kernels in an emulation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

DEVICE = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture
def triton_interpreter() -> Iterator[None]:
    """Triton 3.6's interpreter takes loop ends from one-element arrays, which NumPy 2.4 no longer turns into ints.

    It also patches the language anew for each function that a kernel calls, which takes most of its time.
    """
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.runtime.interpreter as interpreter

    def patched(tensor: Any, scope: Any, original: Callable[..., None] = interpreter._patch_lang_tensor) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    done: set[int] = set()  # modules whose view of the language is patched in the present launch

    def patch_lang(function: Any, original: Callable[..., Any] = interpreter._patch_lang) -> Any:
        if id(function.__globals__) in done:
            return None
        done.add(id(function.__globals__))
        return original(function)

    def launch(self: Any, *args: Any, original: Any = interpreter.GridExecutor.__call__, **options: Any) -> Any:
        done.clear()
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several processes with a thread pool each get in each other's way


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
