"""Fused operators for constrained parameters: bounded, positive, simplex, and the projection onto it."""

from . import _library, distributions, integrations, optim
from ._info import build_info
from ._library import backend
from .bounded import bounded, bounded_inverse
from .flat import FlatParameters
from .parametrizations import Bounded, Positive, Simplex, register_constraint
from .positive import positive, positive_inverse
from .projection import project_simplex
from .simplex import simplex, simplex_inverse

__all__ = [
    "Bounded",
    "FlatParameters",
    "Positive",
    "Simplex",
    "backend",
    "bounded",
    "bounded_inverse",
    "build_info",
    "distributions",
    "integrations",
    "optim",
    "positive",
    "positive_inverse",
    "project_simplex",
    "register_constraint",
    "simplex",
    "simplex_inverse",
]

_library.set_backend(_library.environment_backend())
