"""The Triton kernels compiled ahead of time for GPUs that are not here, without spilling or approximate instructions.

Triton's driver gives way to one that compiles for a GPU and launches nothing, so that the launchers themselves choose
what is compiled. That takes a process in which Triton does not interpret: this file run as a script.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import constrained_ops  # noqa: F401  (defines the operators)
from constrained_ops._library import TRANSFORMS, compute_dtype

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
EVERYTHING_IN = {"sm_80": torch.float32, "sm_90": torch.bfloat16, "gfx942": torch.float64}
DTYPES = {target: [torch.float32, torch.bfloat16, torch.float64] for target in TARGETS}
DTYPES["sm_80"].append(torch.float16)  # elsewhere it would differ from bfloat16 in conversions alone
# Bytes on the stack that a kernel may have where ptxas compiles, which parks a number or two to save registers.
STACK = 8
# Weighted rows of a few numbers: Triton 3.9's stops at 128 registers, where 3.6's takes 175, so that two blocks fit.
MORE_STACK = {("projection_forward_kernel", "sm_80"): 24}
INF = math.inf


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spilling_or_approximations(target: str) -> None:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"elementwise_kernel", *(f"softmax_{kernel}_kernel" for kernel in TRANSFORMS["simplex"])}
    names |= {"projection_forward_kernel", "projection_backward_kernel", "step_kernel"}
    names |= {f"{kind}_{kernel}_kernel" for kind in ("ilr", "stick_breaking") for kernel in ("forward", "backward")}
    assert {kernel["name"] for kernel in kernels} == names
    assert not [kernel for kernel in kernels if kernel["approximations"]]
    # Reductions may drop NaN, because the sums beside them do not.
    assert not [kernel for kernel in kernels if kernel["without_nan"] and kernel["name"] == "elementwise_kernel"]
    # Where all is aligned the step accesses 16 bytes at a time, of which Triton has to be told.
    assert any(kernel["wide"] for kernel in kernels if kernel["name"] == "step_kernel")
    allowed = STACK if target.startswith("sm") else 0
    on_stack = {(kernel["name"], kernel["stack"]) for kernel in kernels}
    assert not {(name, stack) for name, stack in on_stack if stack > MORE_STACK.get((name, target), allowed)}


def every_launch(dtype: torch.dtype, everything: bool, turn: int) -> None:
    """Call the kernels so that their launchers make every choice they have. The tensors are never read.

    For rows of each shape some gradients are left out, others in each `turn`: all of them in three turns.
    """
    from constrained_ops.triton import KERNELS, launch
    from constrained_ops.triton import simplex as rowwise

    bounded, exponential, simplex, projection, *bijections = (KERNELS[transform] for transform in TRANSFORMS)
    raw, bound = torch.empty(64, 64, dtype=dtype), torch.empty(64, 64, dtype=compute_dtype(dtype))
    row = bound[:1].expand(64, 64)
    bounded["forward"](raw, 0.0, 1.0)
    bounded["double_backward.tensor"](raw, bound, bound, raw, raw, raw, row, bound, 31)
    exponential["double_backward"](raw, raw, raw, raw, 0.0, INF, 7)
    simplex["double_backward"](raw, raw, raw, 1, 3)
    projection["forward.weighted"](raw, raw, 1, 1.0)
    projection["backward.weighted"](raw, raw, raw, raw, 1, 3)
    for bijection in bijections:
        bijection["forward_log_det"](raw, 1)
        bijection["double_backward"](raw, torch.empty(64, 65, dtype=dtype), raw[0], raw, 1, 7)
    every_step(dtype, everything)
    if not everything:
        return
    for bounds in ((0.0, 1.0), (0.0, INF), (-INF, 0.0), (-INF, INF)):
        bounded["forward_log_det"](raw, *bounds)
        bounded["backward"](raw, None, raw, *bounds)
        bounded["backward"](raw, raw, raw, *bounds)
        bounded["double_backward"](raw, raw, raw, raw, *bounds, 7)
    bounded["forward"](raw[0, :5], 0.0, 1.0)  # masked element by element
    bounded["forward.tensor"](raw[:, ::2], row[:, ::2], bound[0, 0].expand(64, 32))  # strided and uniform operands
    bounded["forward_log_det.tensor"](raw, bound, bound)
    bounded["backward.tensor"](raw, raw, raw, bound, bound, 7)
    with (
        patch.object(launch, "NARROW", 1),
        patch.object(rowwise, "NARROW", 1),
    ):  # as for tensors of more than 2^31 elements
        bounded["forward.tensor"](raw[:, ::2], row[:, ::2], bound[:, ::2])
        simplex["backward"](raw, raw, 1)
        projection["forward"](raw, 1, 1.0)
    exponential["forward_log_det"](raw, 0.0, INF)
    exponential["backward"](raw, raw, raw, 0.0, INF)
    exponential["forward_log_det.tensor"](raw, row, row)
    exponential["backward.tensor"](raw, raw, raw, row, row, 7)
    exponential["double_backward.tensor"](raw, bound, bound, raw, raw, raw, bound, bound, 31)
    for i, shape in enumerate(((64, 5), (64, 1024), (2, 16384), (2, 16, 64), (2, 1024, 64)), turn):
        raw = torch.empty(shape, dtype=dtype)
        simplex["forward"](raw, 1)
        simplex["backward"](raw, raw, 1)
        simplex["double_backward"](raw, raw, raw, 1, 2)
        x = torch.empty(shape[0], shape[1] + 1, *shape[2:], dtype=dtype)
        for bijection in bijections:
            bijection["forward"](raw, 1)
            bijection["backward"](*((x, None), (None, raw[:, 0]))[i % 2], raw, 1)
            bijection["double_backward"](raw, x, raw[:, 0], raw, 1, 7)
        projection["forward"](raw, 1, 1.0)
        projection["forward.weighted"](raw, raw, 1, 1.0)
        if i % 3 == 0:
            projection["backward"](raw, raw, 1)
        else:
            projection["backward.weighted"](raw, raw, raw, raw, 1, i % 3)


def every_step(dtype: torch.dtype, everything: bool) -> None:
    """The optimizers' step, for plans of all kinds and all shapes of rows."""
    from test_step import GROUPS, make_slot

    from constrained_ops.optim._tables import KINDS, TritonPlan

    def step(kinds: Iterable[str], shapes: Iterable[tuple[tuple[int, ...], int]], **given: torch.Tensor) -> None:
        states = (dtype, dtype if everything else compute_dtype(dtype))
        slots = [make_slot(kind, shape, states, "cpu", dim=dim) for kind in kinds for shape, dim in shapes]
        TritonPlan(slots).run([torch.empty_like(slot.param) for slot in slots], GROUPS, **given)

    step(["interval"], [((64,), 0)])
    step(["simplex"], [((4, 100), 1)])
    if everything:
        step([kind for kind in KINDS if kind not in ("simplex", "softmax")], [((64,), 0)])
        given = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
        step(["simplex", "softmax"], [((2, 2000), 1), ((50, 5), 0)], **given)
        step(["softmax"], [((4, 100), 1)])


def compile_for(target: str) -> None:
    """Print a line of JSON for each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Utilities:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 48 * 1024})
        load_binary = staticmethod(lambda name, binary, shared, device: (0, 0, 0, 0, 1024))
        unload_module = staticmethod(lambda module: None)

    class Driver:
        utils = Utilities
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget(*TARGETS[target]))
        launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)

    def report(metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
        paths = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        if ".cubin" in paths:
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", paths[".cubin"]]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            stack = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
            wide = re.findall(r"ld\.global\S*\.v[24]\.", paths[".ptx"].read_text())
            approximations = re.findall(r"(?:ex2|lg2|rcp|div)\.(?:approx|full)", paths[".ptx"].read_text())
        else:
            assembly = paths[".amdgcn"].read_text()
            stack = re.findall(r"private_segment_fixed_size: *(\d+)", assembly)
            approximations = re.findall(r"v_(?:exp|log)_f32", assembly)
            wide = re.findall(r"global_load_dwordx4", assembly)
        assert stack, "the compiler's figures have another form"
        kernel = {
            "name": metadata["name"],
            "stack": sum(map(int, stack)),
            "approximations": approximations,
            "wide": len(wide),
            "without_nan": re.findall(r"arith\.(?:min|max)numf", paths[".ttir"].read_text()),
        }
        print(json.dumps(kernel), flush=True)

    gc.set_threshold(100_000)  # the compiler's trees are large and few of them garbage
    triton.knobs.compilation.listener = report
    driver.set_active(Driver())
    for dtype in DTYPES[target]:
        every_launch(dtype, everything=dtype == EVERYTHING_IN[target], turn=list(TARGETS).index(target))


if __name__ == "__main__":
    compile_for(sys.argv[1])
