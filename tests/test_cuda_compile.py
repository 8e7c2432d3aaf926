"""Every CUDA file compiles for sm_80, sm_90 and the newest GPU that nvcc knows, without warnings. No kernel touches
local memory, and where data allow it kernels access 16 bytes at a time.
"""

from __future__ import annotations

import re
from pathlib import Path

import cuda_compiler
import emulation
import pytest
from cuda_compiler import CUOBJDUMP, FILES, NVCC, report

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_local_memory(file: Path) -> None:
    compiled = report(file)
    assert sorted(compiled) == cuda_compiler.architectures()
    for kernels in compiled.values():
        assert len(kernels) >= {"step": 6, "bijection": 48}.get(file.stem, 50)
        assert {name: each for name, each in kernels.items() if each.stack or each.spills} == {}
        assert kernels.keys() == compiled[80].keys()


def takes_vectors(kernel: str) -> bool:
    """Whether an instance is for data that lie so that 16 bytes can be accessed at once, going by its mangled name.

    Rows of the bijections never do: x and raw differ in length.
    """
    rows = re.search(r"row_kernelILi\d+ELi\d+ELi(\d+)E", kernel)  # threads, items, vector
    return int(rows[1]) > 1 if rows else "linear_kernelI" in kernel or "step_kernelI" in kernel


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump, on PATH or in Triton")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accesses_of_16_bytes(file: Path) -> None:
    kernels = report(file)[90]
    narrow = [name for name, each in kernels.items() if takes_vectors(name) and not all(each.wide or (0,))]
    assert narrow == []
    assert file.stem == "bijection" or any(map(takes_vectors, kernels))
    assert not any(any(each.wide or (1,)) for name, each in kernels.items() if "strided_kernelI" in name)


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
    (kernel,) = cuda_compiler.parsed(done.stdout + done.stderr).values()
    assert kernel.stack >= 128
