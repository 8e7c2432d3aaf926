"""Adam under constraints, one launch for all parameters: projected, or walking on the raw values of a transform."""

from . import _cpu, _tables  # noqa: F401  (register themselves)
from .projected import ProjectedAdam
from .reparametrized import ReparametrizedAdam

__all__ = ["ProjectedAdam", "ReparametrizedAdam"]
