"""Every CUDA file compiles for sm_80 and sm_90 without warnings, and no kernel touches local memory."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import shutil
from pathlib import Path

import emulation
import pytest
import torch

ARCHITECTURES = (80, 90)
FILES = sorted(emulation.CSRC.glob("cuda/*.cu"))

FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-diag-suppress=1675", "-Werror=all-warnings", "-Xptxas=-v"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
    *("-isystem", str(Path(torch.__file__).parent / "include")),
]


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    beside = [f"{home}/bin/nvcc" for home in homes if home]
    return next(filter(None, map(shutil.which, [os.environ.get("CUDACXX") or "nvcc", *beside])), None)


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")


def report(file: Path, architecture: int) -> str:
    """What ptxas says of each kernel; kept as long as neither sources nor compiler change."""
    assert NVCC is not None
    version = emulation.run([NVCC, "--version"]).stdout.split()[-1]
    kept = emulation.cache_folder() / f"{file.stem}.sm_{architecture}.{version.replace('/', '_')}.txt"
    if not kept.exists():
        command = [NVCC, *FLAGS, "-cubin", f"-arch=sm_{architecture}", str(file), "-o", f"{kept}.cubin"]
        done = emulation.run(command)
        Path(f"{kept}.cubin").unlink()
        kept.write_text(done.stdout + done.stderr)
    return kept.read_text()


@functools.cache
def reports() -> dict[tuple[str, int], str]:
    jobs = [(file, architecture) for file in FILES for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda job: report(*job), jobs)
    return {(file.stem, architecture): text for (file, architecture), text in zip(jobs, texts, strict=True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_local_memory(file: Path, architecture: int) -> None:
    text = reports()[file.stem, architecture]
    used = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    kernels = re.findall(rf"Compiling entry function '(\w+)'.*?{used}", text, re.DOTALL)
    assert len(kernels) >= {"step": 6, "bijection": 48}.get(file.stem, 50)
    assert len(kernels) == text.count("Compiling entry function")
    assert [kernel for kernel in kernels if set(kernel[1:]) != {"0"}] == []


def test_an_array_indexed_at_run_time_is_noticed(tmp_path: Path) -> None:
    """The report would show it, were there any."""
    assert NVCC is not None
    source = tmp_path / "bad.cu"
    source.write_text(
        "__global__ void bad(int* out, const int* in) {\n"
        "  int values[32];\n"
        "  for (int i = 0; i < 32; ++i) values[i] = in[i * 7];\n"
        "  for (int i = 0; i < 32; ++i) out[i] = values[in[i] & 31];\n"
        "}\n"
    )
    done = emulation.run([NVCC, "-Xptxas=-v", "-cubin", "-arch=sm_90", str(source), "-o", str(tmp_path / "bad.cubin")])
    assert re.search(r"[1-9]\d* bytes stack frame", done.stdout + done.stderr)
