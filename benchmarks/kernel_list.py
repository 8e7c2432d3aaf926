"""``python -m benchmarks.kernels --list``: what there is, what the compiler made of it, and who tests it without a GPU.

A line is a kernel and what it computes, over all the formats, maps and groups of threads that it is instantiated for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .kernels import number, short

TESTS = Path(__file__).resolve().parents[1] / "tests"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"

# What an instance computes, by its name, and the module and kernel of constrained_ops.triton that computes the same.
TWINS = {
    r"(linear|strided)_kernel<": "elementwise.elementwise_kernel",
    r"\w*row_kernel<.*\bSoftmax<\w+, 0>": "simplex.softmax_forward_kernel",
    r"\w*row_kernel<.*\bSoftmax<\w+, 1>": "simplex.softmax_backward_kernel",
    r"\w*row_kernel<.*\bSoftmax<\w+, 2>": "simplex.softmax_double_backward_kernel",
    r"\w*row_kernel<.*\bProjectBackward<": "projection.projection_backward_kernel",
    r"\w*row_kernel<.*\bProject<": "projection.projection_forward_kernel",
    r"bijection_kernel<.*\bIlr<\w+, 0>": "bijection.ilr_forward_kernel",
    r"bijection_kernel<.*\bIlr<\w+, [12]>": "bijection.ilr_backward_kernel",
    r"bijection_kernel<.*\bStickBreaking<\w+, 0>": "bijection.stick_breaking_forward_kernel",
    r"bijection_kernel<.*\bStickBreaking<\w+, [12]>": "bijection.stick_breaking_backward_kernel",
    r"step_kernel<": "step.step_kernel",
}
PROGRAM = re.compile(r"\b(?:Forward|Backward|DoubleBackward|Softmax|Project|ProjectBackward|Ilr|StickBreaking)<[^<>]*>")


def line_of(instance: str) -> str:
    """``linear_kernel bounded Backward<true, false>``: the kernel and what it computes, whatever the format."""
    kernel = instance.partition("<")[0]
    program = PROGRAM.search(instance)
    if program is None:
        return kernel
    transform = "exponential " if "Exponential" in instance else "bounded "
    of = transform if kernel in ("linear_kernel", "strided_kernel") else ""
    return f"{kernel} {of}{re.sub(r'(float|double), ', '', program[0])}"


def twin_of(instance: str) -> str:
    module, _, kernel = next(twin for pattern, twin in TWINS.items() if re.match(pattern, instance)).partition(".")
    assert hasattr(import_module(f"constrained_ops.triton.{module}"), kernel), kernel
    return kernel


def demangled(names: Sequence[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: short(full) for name, full in zip(names, done.stdout.splitlines(), strict=True)}


def span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def print_list(profiled: Sequence[dict[str, str]]) -> int:
    """Columns that nothing is known for stay empty; returns 1 if the tests have left out a kernel that they could run.

    What the compiler made of them is read from the installed library; what it lacks nvcc compiles, in minutes. Tests
    count since the sources of the kernels last changed.
    """
    sys.path.insert(0, str(TESTS))
    emulation: Any = import_module("emulation")
    compiler: Any = import_module("cuda_compiler")

    reports: dict[int, dict[str, Any]] = compiler.reports() if compiler.NVCC and compiler.CUOBJDUMP else {}
    tests = emulation.launches()
    known = [*next(iter(reports.values()), {}), *emulation.instances()]
    names = demangled(sorted(set(known)))
    on_gpu: dict[str, list[float]] = {}
    for launch in profiled:
        on_gpu.setdefault(line_of(short(launch["Kernel Name"])), []).append(number(launch, DRAM))

    lines: dict[str, list[str]] = {}
    for mangled, instance in sorted(names.items(), key=lambda item: (line_of(item[1]), item[1])):
        lines.setdefault(line_of(instance), []).append(mangled)
    architectures = sorted(reports)
    heading = ["kernel", "instances", *(f"registers sm_{a}" for a in architectures), "local bytes", "Triton twin"]
    rows = [[*heading, "emulated", "by tests", "on a GPU, DRAM %"]]
    for line, kernels in lines.items():
        compiled = {a: [reports[a][k] for k in kernels if k in reports[a]] for a in architectures}
        found = [each for of in compiled.values() for each in of]
        ran = [k for k in kernels if k in tests]
        rows.append([
            line,
            str(len(kernels)),
            *(span(each.registers for each in compiled[a]) for a in architectures),
            str(sum(each.local for each in found)) if found else "",
            twin_of(names[kernels[0]]),
            str(len(ran)) if tests else "",
            ", ".join(sorted({test.removeprefix("test_") for k in ran for test in tests[k]})),
            f"{max(on_gpu[line]):.1f}" if line in on_gpu else "",
        ])  # fmt: skip
    for row in rows:
        print("| " + " | ".join(row) + " |")
        if row is rows[0]:
            print("|" + " --- |" * len(row))
    left_out = [names[k] for k in names if tests and k not in tests]
    if left_out:
        print(f"\n{len(left_out)} of {len(names)} instances were launched by no test:", *left_out, sep="\n  ")
    return 1 if left_out else 0
