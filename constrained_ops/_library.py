"""The registered operators: schemas, fakes, batching rules, and which implementation runs.

Nothing here computes. Schemas and fakes are Python, so that the Triton kernels and the reference work with no
compiled library at all. The first of these that is there implements an operator:

======================  ====================================================
device                  implementation
======================  ====================================================
CPU                     the compiled library ``_C``, else the reference
CUDA (ROCm included)    the compiled library ``_C_cuda``, else Triton
XPU                     Triton
any other               the reference, which is plain PyTorch
======================  ====================================================

What the operators may rely on, because the public functions see to it:

- ``grad_*`` and ``along_*`` have raw's shape and dtype, with strides of their own; ``None`` stands for zeros.
- In a projection ``x``, ``y`` and ``weight`` are what raw is elsewhere. ``x`` is ``None`` where only grad_x is needed.
- Tensor bounds broadcast to raw's shape and have its :func:`compute_dtype`. Their gradients have raw's shape.
- Results have the layout of ``torch.empty_like(raw)``; in a projection of ``y``, or of ``x`` where there is none.
- A result whose bit in ``needed`` is 0 is an empty tensor.
- In a bijection ``x`` has one element more along ``dim`` than raw, and ``log_det`` lacks ``dim``; both have raw's order
  of dimensions in memory (:func:`empty_bijection`). raw has a dimension, and maybe no element along ``dim``.
- ``dim`` is not negative; a 0-dim raw counts as one row of one.
- ``x`` is the transform of raw, where it is at hand: an implementation may save itself computing it anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _direct

NAMESPACE = "constrained_ops"
BACKENDS = ("cuda", "triton", "cpu", "reference")

_SCALAR = "Tensor raw, float lower, float upper"
_TENSOR = "Tensor raw, Tensor lower, Tensor upper"
_GRADS = "Tensor? grad_x, Tensor? grad_log_det"

# kernel -> (arguments, number of results)
ELEMENTWISE = {
    "forward": (_SCALAR, 1),
    "forward_log_det": (_SCALAR, 2),
    "backward": (f"{_GRADS}, {_SCALAR}", 1),
    "double_backward": (f"Tensor along_raw, {_GRADS}, {_SCALAR}, int needed", 3),
    "forward.tensor": (_TENSOR, 1),
    "forward_log_det.tensor": (_TENSOR, 2),
    "backward.tensor": (f"{_GRADS}, {_TENSOR}, int needed", 3),
    "double_backward.tensor": (
        f"Tensor? along_raw, Tensor? along_lower, Tensor? along_upper, {_GRADS}, {_TENSOR}, int needed",
        5,
    ),
}
ROWWISE = {
    "forward": ("Tensor raw, int dim", 1),
    "backward": ("Tensor grad_x, Tensor raw, int dim, Tensor? x=None", 1),
    "double_backward": ("Tensor along_raw, Tensor grad_x, Tensor raw, int dim, int needed", 2),
}
PROJECTION = {
    "forward": ("Tensor x, int dim, float total", 1),
    "backward": ("Tensor grad_y, Tensor y, int dim", 1),
    "forward.weighted": ("Tensor x, Tensor weight, int dim, float total", 1),
    "backward.weighted": ("Tensor grad_y, Tensor? x, Tensor y, Tensor weight, int dim, int needed", 2),
}
_BIJECTION_GRADS = f"{_GRADS}, Tensor raw, int dim"
BIJECTION = {
    "forward": ("Tensor raw, int dim", 1),
    "forward_log_det": ("Tensor raw, int dim", 2),
    "backward": (_BIJECTION_GRADS, 1),
    "double_backward": (f"Tensor along_raw, {_BIJECTION_GRADS}, int needed", 3),
}
# What the results of a bijection's kernels are like.
BIJECTION_RESULTS = {
    "forward": ("x",),
    "forward_log_det": ("x", "log_det"),
    "backward": ("raw",),
    "double_backward": ("x", "log_det", "raw"),
}
TRANSFORMS = {
    "bounded": ELEMENTWISE,
    "exponential": ELEMENTWISE,
    "simplex": ROWWISE,
    "projection": PROJECTION,
    "ilr": BIJECTION,
    "stick_breaking": BIJECTION,
}

# The step of the optimizers (optim/_tables.py), for devices other than the CPU. `param` and `exp_avg` say by example
# which device and dtypes are meant. What is written beside `progress` stands in the tables as addresses, of which
# neither dispatcher nor compilers know: a list of a thousand tensors would take the dispatcher longer than the step.
STEP = (
    "step(Tensor param, Tensor exp_avg, Tensor slots, Tensor grads, Tensor groups, Tensor work, Tensor(a!) progress, "
    "Tensor? grad_scale, Tensor? found_inf, int cache) -> ()"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(STEP)


# Names that are not public, for speed; without them what is.
profiler_enabled: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_range: Callable[[str], Any] = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which profilers and NVTX see under ``name`` though the dispatcher has no part in the call."""

    def run(*args: Any) -> Any:
        if not profiler_enabled():
            return function(*args)
        with _range(name):
            return function(*args)

    return run


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which formulas for ``dtype`` are computed: float32 for the 16-bit ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernels:
    """The implementations in force of one transform's kernels, as attributes: ``forward``, ``forward_tensor``, ...

    ``reference`` holds the same names, always in plain PyTorch: differentiable to any order, and open to compilers;
    ``operators`` the registered operators, which compilers take as they are.
    """

    reference: Kernels
    operators: Kernels

    def __init__(self, functions: dict[str, Callable[..., Any]] | None = None) -> None:
        self.bind(functions or {})

    def bind(self, functions: dict[str, Callable[..., Any]]) -> None:
        for kernel, function in functions.items():
            setattr(self, kernel.replace(".", "_"), function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no kernel {name!r}")


_kernels: dict[str, Kernels] = {}
_references: dict[str, dict[str, Callable[..., Any]]] = {}


def define(transform: str, reference: dict[str, Callable[..., Any]]) -> Kernels:
    """Register the kernels of ``transform`` with their plain PyTorch implementations; return them bound."""
    for kernel, (arguments, results) in TRANSFORMS[transform].items():
        name = f"{transform}_{kernel}"
        returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
        _library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        operator = overload(transform, kernel)
        fake = _bijection_fake(kernel) if TRANSFORMS[transform] is BIJECTION else _fake(operator, kernel, results)
        _library.impl(operator, _with_layout(reference[kernel], fake), "CompositeExplicitAutograd")
        torch.library.register_fake(operator, fake, lib=_library)
        torch.library.register_vmap(operator, _batching_rule(operator), lib=_library)
    _references[transform] = reference
    kernels = _kernels[transform] = Kernels()
    kernels.reference = Kernels(reference)
    kernels.operators = Kernels({kernel: overload(transform, kernel) for kernel in TRANSFORMS[transform]})
    if has_triton:
        _register_triton(transform)
    _bind(transform, _backend)
    return kernels


def overload(transform: str, kernel: str) -> torch._ops.OpOverload:
    """The registered operator of a kernel, say ``torch.ops.constrained_ops.bounded_forward.tensor``."""
    name, _, variant = kernel.partition(".")
    packet = getattr(getattr(torch.ops, NAMESPACE), f"{transform}_{name}")
    return getattr(packet, variant or "default")


def _argument_positions(operator: torch._ops.OpOverload) -> dict[str, int]:
    return {argument.name: position for position, argument in enumerate(operator._schema.arguments)}


def like_position(operator: torch._ops.OpOverload) -> int:
    """Where among its arguments is the tensor that gives its results shape, dtype and layout."""
    positions = _argument_positions(operator)
    return next(positions[name] for name in ("raw", "y", "x") if name in positions)


def _fake(operator: torch._ops.OpOverload, kernel: str, results: int) -> Callable[..., Any]:
    raw_at, needed_at = like_position(operator), _argument_positions(operator).get("needed")
    first_bound = results - 2 if kernel in ("backward.tensor", "double_backward.tensor") else results

    def fake(*args: Any) -> Any:
        raw = args[raw_at]
        needed = -1 if needed_at is None else args[needed_at]
        outputs = []
        for i in range(results):
            dtype = raw.dtype if i < first_bound else compute_dtype(raw.dtype)
            wanted = needed >> i & 1
            outputs.append(torch.empty_like(raw, dtype=dtype) if wanted else raw.new_empty(0, dtype=dtype))
        return outputs[0] if results == 1 else tuple(outputs)

    return fake


def empty_bijection(raw: Tensor, dim: int, kinds: Sequence[str], needed: int = -1) -> tuple[Tensor, ...]:
    """Results like "raw", "x" or "log_det"; empty tensors where ``needed`` has no bit."""
    strides = torch.empty_like(raw).stride()
    slowest_first = sorted(range(raw.dim()), key=lambda d: -strides[d])

    def empty(kind: str) -> Tensor:
        if kind == "raw":
            return torch.empty_like(raw)
        sizes, grown = list(raw.shape), [0] * raw.dim()
        sizes[dim] = sizes[dim] + 1 if kind == "x" else 1
        step = 1
        for d in reversed(slowest_first):
            grown[d] = step
            step = step * max(sizes[d], 1)
        result = raw.new_empty_strided(sizes, grown)
        return result if kind == "x" else result.squeeze(dim)

    return tuple(empty(kind) if needed >> i & 1 else raw.new_empty(0) for i, kind in enumerate(kinds))


def _bijection_fake(kernel: str) -> Callable[..., Any]:
    kinds, grads = BIJECTION_RESULTS[kernel], {"backward": 2, "double_backward": 3}.get(kernel, 0)

    def fake(*args: Any) -> Any:
        raw, dim, *needed = args[grads:]
        results = empty_bijection(raw, dim, kinds, *needed)
        return results[0] if len(results) == 1 else results

    return fake


def _with_layout(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Let plain PyTorch fill results of the promised layout: a sum's strides follow all its operands, not raw's."""

    def operator(*args: Any) -> Any:
        outputs, results = fake(*args), function(*args)
        for output, result in zip(_as_tuple(outputs), _as_tuple(results), strict=True):
            if output.numel():
                output.copy_(result)
        return outputs

    return operator


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _batching_rule(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """One more leading dimension is no news to an elementwise kernel, and shifts ``dim`` by one in a rowwise one.

    Dimensions that bounds lack, to broadcast, stand behind it.
    """
    positions = _argument_positions(operator)
    raw_at, dim_at, needed_at = like_position(operator), positions.get("dim"), positions.get("needed")
    bounds_at = {positions.get("lower"), positions.get("upper")}

    def batched(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        raw, raw_dim = args[raw_at], in_dims[raw_at]
        row_shape = raw.shape if raw_dim is None else raw.movedim(raw_dim, 0).shape[1:]
        moved = list(args)
        for i, (argument, in_dim) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(argument, Tensor):
                if in_dim is None:
                    moved[i] = argument.expand(info.batch_size, *argument.shape)
                else:
                    moved[i] = argument.movedim(in_dim, 0)
                if i in bounds_at:
                    missing = 1 + len(row_shape) - moved[i].dim()
                    moved[i] = moved[i][(slice(None), *(None,) * missing)]
        if dim_at is not None:
            if not row_shape:  # a batch of 0-dim rows: give the rows their dimension
                moved = [m.unsqueeze(-1) if isinstance(m, Tensor) else m for m in moved]
            moved[dim_at] += 1
        results = operator(*moved)
        if dim_at is not None and not row_shape:
            results = results.squeeze(-1) if isinstance(results, Tensor) else tuple(r.squeeze(-1) for r in results)
        needed = -1 if needed_at is None else args[needed_at]
        if isinstance(results, Tensor):
            return results, 0
        return results, tuple(0 if needed >> i & 1 else None for i in range(len(results)))

    return batched


# --- Which implementation runs -------------------------------------------------------------------------------------

_folder = Path(__file__).resolve().parent
_backend: str | None = None  # None: by device, as in the table above


def _find_library(stem: str) -> Path | None:
    """The compiled library of that name beside this file; an editable install finds it there too."""
    for suffix in [*EXTENSION_SUFFIXES, ".so", ".dylib", ".dll"]:
        if (path := _folder / f"{stem}{suffix}").exists():
            return path
    return None


def _warn_if_shadowed() -> None:
    """A clone in the working directory hides an installed package, and only that one may have been compiled."""
    for entry in sys.path:
        other = Path(entry).resolve() / _folder.name
        if other != _folder and any(other.glob("_C.*")):
            warnings.warn(
                f"constrained_ops was imported from {_folder}, which has no compiled library; the installed one in "
                f"{other} does. Run from another directory, or install the clone with `pip install -e .`",
                stacklevel=2,
            )
            return


def _load(stem: str) -> bool:
    """Load a compiled library. Absent means fall back; present and unloadable is an error, never a silent fallback."""
    path = _find_library(stem)
    if path is not None:
        torch.ops.load_library(str(path))
    return path is not None


has_cpu_library = _load("_C")
if not has_cpu_library:
    _warn_if_shadowed()
has_cuda_library = torch.version.cuda is not None and _load("_C_cuda")
has_triton = find_spec("triton") is not None
_cpu: Any = import_module(f"{__package__}._C") if has_cpu_library else None
_called = _direct.caller(_cpu) if has_cpu_library else _direct.dispatched
bounds_fit: Callable[..., bool] = _cpu.bounds_fit if has_cpu_library else lambda *_: False


def _triton(transform: str, kernel: str) -> Callable[..., Any]:
    """The Triton twin of a kernel, imported when it first runs."""

    def launch(*args: Any) -> Any:
        return import_module(f"{__package__}.triton").KERNELS[transform][kernel](*args)

    return launch


def _register_triton(transform: str) -> None:
    keys = ["XPU"] if has_cuda_library else ["CUDA", "XPU"]
    for kernel in TRANSFORMS[transform]:
        for key in keys:
            _library.impl(overload(transform, kernel), _triton(transform, kernel), key)


def _only_on(device: str, transform: str, kernel: str) -> Callable[..., Any]:
    operator = overload(transform, kernel)
    at = like_position(operator)
    name = operator._schema.arguments[at].name

    def guarded(*args: Any) -> Any:
        if (found := args[at].device.type) != device:
            raise RuntimeError(f"{operator}: backend {device!r} was asked for, but {name} is on {found!r}")
        return operator(*args)

    return guarded


def _implementation(backend: str | None, transform: str, kernel: str) -> Callable[..., Any]:
    if backend is None:
        return _called(overload(transform, kernel))
    if backend in ("reference", "triton"):  # past the dispatcher
        function = _references[transform][kernel] if backend == "reference" else _triton(transform, kernel)
        return named(overload(transform, kernel)._schema.name, function)
    return _only_on(backend, transform, kernel)


def _bind(transform: str, backend: str | None) -> None:
    _kernels[transform].bind({kernel: _implementation(backend, transform, kernel) for kernel in TRANSFORMS[transform]})


def set_backend(backend: str | None) -> None:
    """Choose the implementation for the whole process; ``None`` chooses by device."""
    global _backend
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    available = {"cpu": has_cpu_library, "cuda": has_cuda_library, "triton": has_triton}
    if not available.get(backend or "", True):
        missing = {"cpu": "library _C", "cuda": "library _C_cuda", "triton": "package triton"}[backend or ""]
        raise RuntimeError(f"backend {backend!r} is not available here: the {missing} is missing")
    _backend = backend
    for transform in _kernels:
        _bind(transform, backend)


def environment_backend() -> str | None:
    return os.environ.get("CONSTRAINED_OPS_BACKEND") or None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators on one implementation, whatever the device would choose.

    For tests, benchmarks and the search for a fault. It holds for the whole process, backward passes included, and
    not inside what ``torch.compile`` has compiled. The environment variable ``CONSTRAINED_OPS_BACKEND`` does the same
    from the start.

    Args:
        name: "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if it is not available here, or when an operator meets a tensor on another device.
    """
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend_of(device: str) -> str:
    """Which backend serves tensors on ``device``, a device type such as "cpu"."""
    if _backend is not None:
        return _backend
    if device == "cpu" and has_cpu_library:
        return "cpu"
    if device == "cuda" and has_cuda_library:
        return "cuda"
    return "triton" if device in ("cuda", "xpu") and has_triton else "reference"
