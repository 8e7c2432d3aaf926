"""Every CUDA file compiles for sm_80, sm_90 and sm_100, and no kernel touches local memory.

Read from the compiled code: the installed library where it has the architecture, else a compilation of the file.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import emulation
import pytest
import torch

import constrained_ops as co

ARCHITECTURES = (80, 90, 100)
FILES = sorted(emulation.CSRC.glob("cuda/*.cu"))
# At least so many in a file: others are 50 and more.
FEWEST_KERNELS = {"bijection": 48, "step": 6}

FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=1675", "-Werror=all-warnings"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
    *("-isystem", str(Path(torch.__file__).parent / "include")),
]


def find(tool: str, *folders: Path) -> str | None:
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    beside = [home / "bin" / tool for home in [*homes, Path("/usr/local/cuda")]]
    return next(filter(None, map(shutil.which, [tool, *map(str, beside), *(f"{f}/{tool}" for f in folders)])), None)


def triton_tools() -> list[Path]:
    try:
        import triton
    except ImportError:
        return []
    return [Path(triton.__file__).parent / "backends" / "nvidia" / "bin"]


NVCC = shutil.which(os.environ.get("CUDACXX", "")) or find("nvcc")
CUOBJDUMP = find("cuobjdump", *triton_tools())
pytestmark = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason="no nvcc, or no cuobjdump there or in Triton")


class Usage(NamedTuple):
    """What a kernel takes: registers, and bytes of local memory for spilled ones and arrays."""

    registers: int
    stack: int
    local: int


def usage(binary: Path, architecture: int) -> dict[str, Usage]:
    """By mangled name."""
    assert CUOBJDUMP is not None
    text = emulation.run([CUOBJDUMP, "-arch", f"sm_{architecture}", "-res-usage", str(binary)]).stdout
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {name: Usage(*map(int, numbers)) for name, *numbers in re.findall(pattern, text)}


def compiled(file: Path, architecture: int) -> Path:
    """Kept as long as neither sources nor compiler change."""
    assert NVCC is not None
    version = emulation.run([NVCC, "--version"]).stdout.split()[-1].replace("/", "_")
    kept = emulation.cache_folder() / f"{file.stem}.sm_{architecture}.{version}.cubin"
    if not kept.exists():
        part = kept.with_suffix(f".{os.getpid()}")
        emulation.run([NVCC, *FLAGS, "-cubin", f"-arch=sm_{architecture}", str(file), "-o", str(part)])
        part.replace(kept)
    return kept


def installed() -> tuple[Path | None, tuple[int, ...]]:
    """The CUDA library, and for what it holds code."""
    libraries = list(Path(co.__file__).parent.glob("_C_cuda*"))
    if not libraries:
        return None, ()
    assert CUOBJDUMP is not None
    listed = emulation.run([CUOBJDUMP, "-lelf", str(libraries[0])]).stdout
    return libraries[0], tuple(sorted({int(number) for number in re.findall(r"\.sm_(\d+)\.cubin", listed)}))


@functools.cache
def kernels() -> dict[int, dict[str, Usage]]:
    """All, by architecture."""
    library, there = installed()
    missing = [architecture for architecture in ARCHITECTURES if architecture not in there]
    jobs = [(file, architecture) for architecture in missing for file in FILES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        binaries = list(pool.map(lambda job: compiled(*job), jobs))
    found: dict[int, dict[str, Usage]] = {}
    for (_, architecture), binary in zip(jobs, binaries, strict=True):
        found.setdefault(architecture, {}).update(usage(binary, architecture))
    return found | {a: usage(library, a) for a in ARCHITECTURES if library and a in there}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory(architecture: int) -> None:
    found = kernels()[architecture]
    assert len(found) >= sum(FEWEST_KERNELS.get(file.stem, 50) for file in FILES)
    assert {name: use for name, use in found.items() if use.stack or use.local} == {}


@pytest.mark.parametrize(
    ("source", "used"),
    [
        (
            "__global__ void bad(int* out, const int* in) {\n"
            "  int values[32];\n"
            "  for (int i = 0; i < 32; ++i) values[i] = in[i * 7];\n"
            "  for (int i = 0; i < 32; ++i) out[i] = values[in[i] & 31];\n"
            "}\n",
            "an array indexed at run time",
        ),
        (
            "__global__ void __launch_bounds__(1024, 2) bad(float* out, const float* in) {\n"
            "  float values[64], sum = 0;\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 64; ++i) values[i] = in[1024 * i + threadIdx.x];\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 64; ++i) sum = sum * values[i] + values[63 - i];\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 64; ++i) out[1024 * i + threadIdx.x] = values[i] * sum;\n"
            "}\n",
            "more registers than there are",
        ),
    ],
    ids=lambda text: text if len(text) < 40 else "",
)
def test_local_memory_is_noticed(source: str, used: str, tmp_path: Path) -> None:
    assert NVCC is not None
    file, binary = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    file.write_text(source)
    emulation.run([NVCC, "-cubin", "-arch=sm_90", str(file), "-o", str(binary)])
    (use,) = usage(binary, 90).values()
    assert use.stack > 0, used
