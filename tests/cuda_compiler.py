"""What nvcc makes of the CUDA kernels, without a GPU: registers, local memory and how wide they access memory."""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import emulation
import torch

FILES = sorted(emulation.CSRC.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)
FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=1675", "-Werror=all-warnings", "-Xptxas=-v"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
    *("-isystem", str(Path(torch.__file__).parent / "include")),
]


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes
    spills: int  # bytes
    wide: tuple[int, int] | None  # accesses of 16 bytes, (loads, stores); None if nobody looked


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    beside = [f"{home}/bin/nvcc" for home in homes if home]
    return next(filter(None, map(shutil.which, [os.environ.get("CUDACXX") or "nvcc", *beside])), None)


def find_cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    return shutil.which("cuobjdump") or triton.knobs.nvidia.cuobjdump.path


NVCC, CUOBJDUMP = find_nvcc(), find_cuobjdump()


@functools.cache
def newest() -> int:
    """The newest architecture that nvcc knows."""
    assert NVCC is not None
    return max(map(int, re.findall(r"sm_(\d+)$", emulation.run([NVCC, "--list-gpu-code"]).stdout, re.MULTILINE)))


def architectures() -> list[int]:
    return sorted({80, 90, newest()})


def parsed(report: str) -> dict[str, Compiled]:
    """What ptxas says, by the kernel's mangled name."""
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(kernels) == report.count("Compiling entry function"), "the compiler's report has another form"
    return {k[0]: Compiled(int(k[4]), int(k[1]), int(k[2]) + int(k[3]), None) for k in kernels}


def wide_accesses(disassembly: str) -> dict[str, tuple[int, int]]:
    def count(operation: str, text: str) -> int:
        return len(re.findall(rf"\b{operation}G?\.[\w.]*\b128\b", text))  # G: of global memory, known to be

    functions = re.split(r"^\s*Function : (\w+)$", disassembly, flags=re.MULTILINE)[1:]
    pairs = zip(functions[::2], functions[1::2], strict=True)
    return {name: (count("LD", text), count("ST", text)) for name, text in pairs}


def _compile(file: Path, base: int) -> dict[int, dict[str, Compiled]]:
    """For sm_80; or for sm_90, with a look at the machine code, and from its PTX for the newest, as drivers do it."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/{file.stem}.cubin"

        def compiled(architecture: int, source: Path, *flags: str) -> dict[str, Compiled]:
            command = [NVCC, *FLAGS, *flags, "-cubin", f"-arch=sm_{architecture}", str(source), "-o", cubin]
            done = emulation.run(command)
            return parsed(done.stdout + done.stderr)

        if base == 80:
            return {80: compiled(80, file)}
        found = {90: compiled(90, file, "--keep", "--keep-dir", scratch)}
        if CUOBJDUMP is not None:
            wide = wide_accesses(emulation.run([CUOBJDUMP, "-sass", cubin]).stdout)
            found[90] = {name: each._replace(wide=wide[name]) for name, each in found[90].items()}
        if newest() > 90:
            found[newest()] = compiled(newest(), Path(scratch) / f"{file.stem}.ptx")
        return found


@functools.cache
def _kept(file: Path, base: int) -> dict[int, dict[str, Compiled]]:
    """Kept as long as neither sources nor compilers change; compiled by one process, for which others wait."""
    version = emulation.run([NVCC or "nvcc", "--version"]).stdout.split()[-1].replace("/", "_")
    kept = emulation.cache_folder() / f"{file.stem}.{base}.{version}.{'sass' if CUOBJDUMP else ''}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            text = json.dumps(_compile(file, base))
            kept.write_text(text)
    return {
        int(architecture): {name: Compiled(*numbers) for name, numbers in kernels.items()}
        for architecture, kernels in json.loads(kept.read_text()).items()
    }


def report(file: Path) -> dict[int, dict[str, Compiled]]:
    """By architecture and the kernel's mangled name."""
    return {**_kept(file, 80), **_kept(file, 90)}


def reports() -> dict[str, dict[int, dict[str, Compiled]]]:
    """Of all files, by their stems."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip([file.stem for file in FILES], pool.map(report, FILES), strict=True))
