"""What nvcc made of the CUDA kernels, without a GPU: registers, local memory and how wide they access memory.

Read from the machine code: of the installed library for the architectures that it has, else of a compilation.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import emulation
import torch

import constrained_ops

ARCHITECTURES = (80, 90, 100)
DISASSEMBLED = 90  # one of them: it takes half a minute
FILES = sorted(emulation.CSRC.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)
FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=1675", "-Werror=all-warnings"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
    *("-isystem", str(Path(torch.__file__).parent / "include")),
]


class Compiled(NamedTuple):
    """A kernel."""

    registers: int
    local: int  # bytes of local memory, for spilled registers and arrays
    wide: tuple[int, int] | None  # accesses of 16 bytes: loads, stores; None if nobody looked


def find(tool: str, *others: str) -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    beside = [f"{home}/bin/{tool}" for home in homes if home]
    return next(filter(None, map(shutil.which, [tool, *beside, *others])), None)


def tritons_cuobjdump() -> list[str]:
    try:
        import triton
    except ImportError:
        return []
    return [triton.knobs.nvidia.cuobjdump.path]


NVCC = shutil.which(os.environ.get("CUDACXX", "")) or find("nvcc")
CUOBJDUMP = find("cuobjdump", *tritons_cuobjdump())


def cuobjdump(binary: Path, *options: str) -> str:
    return emulation.run([CUOBJDUMP or "cuobjdump", *options, str(binary)]).stdout


def kernels_in(binary: Path, architecture: int) -> dict[str, Compiled]:
    """By mangled name."""
    usage = cuobjdump(binary, "-arch", f"sm_{architecture}", "-res-usage")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == usage.count("Function "), "cuobjdump's report has another form"
    looked = architecture == DISASSEMBLED
    wide = wide_accesses(cuobjdump(binary, "-arch", f"sm_{architecture}", "-sass")) if looked else {}
    return {name: Compiled(int(used), int(stack) + int(local), wide.get(name)) for name, used, stack, local in found}


def wide_accesses(disassembly: str) -> dict[str, tuple[int, int]]:
    def count(operation: str, text: str) -> int:  # G: of global memory; without, where the compiler cannot know
        return len(re.findall(rf"\b{operation}G?\.[\w.]*\b128\b", text))

    functions = re.split(r"^\s*Function : (\w+)$", disassembly, flags=re.MULTILINE)[1:]
    pairs = zip(functions[::2], functions[1::2], strict=True)
    return {name: (count("LD", text), count("ST", text)) for name, text in pairs}


def installed_library() -> tuple[Path | None, set[int]]:
    """The CUDA library that was built from the sources as they are, and for what it has machine code."""
    for library in Path(constrained_ops.__file__).parent.glob("_C_cuda*"):
        if library.stat().st_mtime > max(path.stat().st_mtime for path in emulation.CSRC.rglob("*")):
            return library, set(map(int, re.findall(r"sm_(\d+)", cuobjdump(library, "-lelf"))))
    return None, set()


def compiled(file: Path, architecture: int) -> dict[str, Compiled]:
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / f"{file.stem}.cubin"
        emulation.run([NVCC or "nvcc", *FLAGS, "-cubin", f"-arch=sm_{architecture}", str(file), "-o", str(cubin)])
        return kernels_in(cubin, architecture)


def kept(name: str, find: Callable[[], dict[str, Compiled]]) -> dict[str, Compiled]:
    """As long as the sources do not change; found by one process, for which others wait."""
    path = emulation.cache_folder() / f"{name}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            text = json.dumps(find())
            path.write_text(text)
    return {name: Compiled(*kernel) for name, kernel in json.loads(path.read_text()).items()}


@functools.cache
def reports() -> dict[int, dict[str, Compiled]]:
    """By architecture and mangled name."""
    version = emulation.run([NVCC or "nvcc", "--version"]).stdout.split()[-1].replace("/", "_")
    library, there = installed_library()

    def of(architecture: int) -> dict[str, Compiled]:
        if library is not None and architecture in there:
            name = f"installed.{library.stat().st_mtime_ns}.sm_{architecture}"
            return kept(name, lambda: kernels_in(library, architecture))
        found = {}
        for file in FILES:
            found |= kept(f"{file.stem}.sm_{architecture}.{version}", partial(compiled, file, architecture))
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(of, ARCHITECTURES), strict=True))
