"""What is running: versions, compiled architectures, instruction set, backend per device."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

import torch

from . import _library


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path, but not installed
        return "unknown"


def build_info() -> dict[str, Any]:
    """Facts about this installation.

    Returns:
        A dict with

        - ``version``, ``torch``: of this package, and of the torch that runs;
        - ``built_with``: torch and compiler of the compiled library, or None if there is none;
        - ``simd``: the instruction set in use, "x86-64-v3" for example, or None;
        - ``cuda``: nvcc's version and the architectures compiled for, or None if the CUDA library was not built;
        - ``cuda_left_out``: why it was not;
        - ``triton``: its version, or None;
        - ``backends``: which backend serves each kind of device;
        - ``devices``: the accelerators that torch sees.
    """
    build: dict[str, str] = {}
    simd = None
    if _library.has_cpu_library:
        compiled = import_module("constrained_ops._C")
        build, simd = compiled.build, compiled.simd()
    cuda = {"nvcc": build["cuda"], "architectures": build["cuda_architectures"]} if build.get("cuda") else None
    return {
        "version": _version("constrained_ops"),
        "torch": torch.__version__,
        "built_with": {"torch": build["torch"], "compiler": build["compiler"]} if build else None,
        "simd": simd,
        "cuda": cuda,
        "cuda_left_out": build.get("cuda_left_out") or None,
        "triton": _version("triton") if _library.has_triton else None,
        "backends": {device: _library.backend_of(device) for device in ("cpu", "cuda", "xpu", "mps")},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
