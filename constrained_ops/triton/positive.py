"""raw -> (lower, infinity) by the exponential, ``csrc/math/positive.h``: every derivative exp(raw), log-det raw.

The softplus kind is bounded.py with the lower bound alone.
"""

from typing import Any

import triton
import triton.language as tl  # noqa: F401  (the interpreter wants it in sight of a kernel)

from .elementwise import Point, kernels
from .numeric import exp


@triton.jit
def exponential(raw, b):
    value = exp(raw)
    return Point(
        x=b.lower + value,
        x_raw=value,
        x_raw_raw=value,
        x_lower=1.0,
        x_upper=0.0,
        x_raw_width=0.0,
        log_det=raw,
        log_det_raw=1.0,
        log_det_raw_raw=0.0,
        log_det_width=0.0,
        log_det_width_width=0.0,
    )


def _transform_between(lower: Any, upper: Any) -> Any:
    return exponential


KERNELS = kernels(_transform_between)
