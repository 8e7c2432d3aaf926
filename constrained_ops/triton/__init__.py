"""The operators in Triton, for GPUs without the compiled library: CUDA, ROCm and XPU.

The same kernels as ``csrc/cuda``, from the formulas of ``csrc/math`` in their order and under their names; a test pins
both to the reference.
"""

from . import bijection, bounded, positive, projection, simplex

# transform -> kernel -> implementation, with the names and signatures of _library.TRANSFORMS
KERNELS = {
    "bounded": bounded.KERNELS,
    "exponential": positive.KERNELS,
    "simplex": simplex.KERNELS,
    "projection": projection.KERNELS,
    "ilr": bijection.ILR,
    "stick_breaking": bijection.STICK_BREAKING,
}
