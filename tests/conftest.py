"""What all tests share: above all, where they run.

Without a GPU, Triton runs in its interpreter and the CUDA kernels in an emulation. With one, what is tested "by device"
is tested there, Triton compiles, and the real CUDA kernels run beside the emulated ones. Environment:

- ``CONSTRAINED_OPS_TEST_DEVICE``: another device than the accelerator that torch finds, "cpu" for instance;
- ``CONSTRAINED_OPS_TEST_EMULATION``: "off" leaves out the emulation, which takes minutes to compile.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

_found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
DEVICE = os.environ.get("CONSTRAINED_OPS_TEST_DEVICE") or _found
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import emulation  # noqa: E402

import constrained_ops as co  # noqa: E402
from constrained_ops import _library  # noqa: E402
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam  # noqa: E402

GPU = "cuda" if DEVICE == "cpu" else DEVICE  # the one that there is, or would be
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU of NVIDIA")


@pytest.fixture(params=["cpu", pytest.param(GPU, marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made that do not say where."""
    with torch.device(request.param):
        yield request.param


def implementations() -> list[Any]:
    """As parameters of :func:`backend`: every (backend, device) that an optimizer can run on."""
    compiled = pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")
    cuda = pytest.mark.skipif(not _library.has_cuda_library, reason="the CUDA library is missing")
    triton = pytest.mark.skipif(not _library.has_triton, reason="Triton is missing")
    return [
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("cpu", "cpu"), id="cpu", marks=compiled),
        pytest.param(("reference", GPU), id=f"reference on {GPU}", marks=needs_gpu),
        pytest.param(("cuda", "cuda"), id="cuda", marks=[needs_cuda, cuda]),
        pytest.param(("triton", GPU), id="triton", marks=[needs_gpu, triton]),
    ]


@pytest.fixture(params=implementations())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend in force, and the device on which tensors are made that do not say where."""
    name, device = request.param
    with co.backend(name), torch.device(device):
        yield name


@pytest.fixture(params=["by device", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of operators: what the device chooses, and the reference."""
    if request.param == "by device":
        yield
        return
    with co.backend("reference"):
        yield


@pytest.fixture(params=[ProjectedAdam, ReparametrizedAdam])
def kind(request: pytest.FixtureRequest) -> type[Any]:
    """Both optimizers."""
    return request.param


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def moved(t: Tensor, device: str) -> Tensor:
    """``t`` on another device, in memory exactly as before: gaps, overlaps, and an offset from an aligned address."""
    if t.device.type == device:
        return t
    if not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.fixture
def triton_interpreter() -> Iterator[None]:
    """Triton 3.6's interpreter takes loop ends from one-element arrays, which NumPy 2.4 no longer turns into ints.

    It also patches the language anew for each function that a kernel calls, and for each operation on integers finds
    by a dozen others whether it overflows, only to forget it, which takes most of its time. And 3.9's takes no masks
    but of bools, where it spreads a bool as the integers that were compared.
    """
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import numpy as np
    import triton.runtime.interpreter as interpreter
    from triton.language.semantic import TritonSemantic

    def patched(tensor: Any, scope: Any, original: Callable[..., None] = interpreter._patch_lang_tensor) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_splat(self: Any, shape: Any, arg: Any, splat: Any = interpreter.InterpreterBuilder.create_splat) -> Any:
        spread = splat(self, shape, arg)
        if arg.data.dtype == np.bool_:
            spread.data = spread.data.astype(np.bool_)
        return spread

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
        patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)
        patch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several processes with a thread pool each get in each other's way


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, lest one process should work on it long after the others have ended."""
    items.sort(key=lambda item: item.path.stem not in ("test_triton_compile", "test_sanitizers"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What ``python -m benchmarks.kernels --list`` tells of emulated tests."""
    emulation.note_launches(getattr(item, "originalname", item.name))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
