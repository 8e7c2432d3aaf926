"""Other packages' interfaces on the fused operators. Each needs its package, which is imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["gpytorch"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
