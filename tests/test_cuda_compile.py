"""Every CUDA file compiles for sm_80, sm_90 and sm_100. No kernel touches local memory, and where data allow it kernels
access 16 bytes at a time.
"""

from __future__ import annotations

import re
from pathlib import Path

import cuda_compiler
import emulation
import pytest
from cuda_compiler import ARCHITECTURES, CUOBJDUMP, DISASSEMBLED, FILES, NVCC, reports

pytestmark = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason="no nvcc, or no cuobjdump beside it or in Triton")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory(architecture: int) -> None:
    kernels = reports()[architecture]
    assert len(kernels) >= sum({"step": 6, "bijection": 48}.get(file.stem, 50) for file in FILES)
    assert {name: kernel for name, kernel in kernels.items() if kernel.local} == {}
    assert kernels.keys() == reports()[ARCHITECTURES[0]].keys()


def takes_vectors(kernel: str) -> bool:
    """Whether an instance is for data that lie so that 16 bytes can be accessed at once, going by its mangled name.

    Rows of the bijections never do: x and raw differ in length.
    """
    rows = re.search(r"row_kernelILi\d+ELi\d+ELi(\d+)E", kernel)  # threads, items, vector
    return int(rows[1]) > 1 if rows else "linear_kernelI" in kernel or "step_kernelI" in kernel


def test_accesses_of_16_bytes() -> None:
    wide = {name: kernel.wide or (0, 0) for name, kernel in reports()[DISASSEMBLED].items()}
    assert len([name for name in wide if takes_vectors(name)]) >= 100
    assert [name for name in wide if takes_vectors(name) and not all(wide[name])] == []
    assert [name for name in wide if "strided_kernelI" in name and any(wide[name])] == []


@pytest.mark.parametrize(
    "source",
    {
        "an array indexed at run time": """
            __global__ void bad(int* out, const int* in) {
              int values[32];
              for (int i = 0; i < 32; ++i) values[i] = in[i * 7];
              for (int i = 0; i < 32; ++i) out[i] = values[in[i] & 31];
            }""",
        "too few registers": """
            __global__ void __launch_bounds__(1024, 2) bad(float* out, const float* in) {
              float values[64], sum = 0;
            #pragma unroll
              for (int i = 0; i < 64; ++i) values[i] = in[1024 * i + threadIdx.x];
              __syncthreads();
            #pragma unroll
              for (int i = 0; i < 64; ++i) values[i] += sum = sum * values[i] + values[63 - i];
            #pragma unroll
              for (int i = 0; i < 64; ++i) out[1024 * i + threadIdx.x] = values[i] * sum;
            }""",
    }.items(),
    ids=lambda source: source[0],
)
def test_local_memory_is_noticed(source: tuple[str, str], tmp_path: Path) -> None:
    file, cubin = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    file.write_text(source[1])
    emulation.run([NVCC or "nvcc", "-cubin", "-arch=sm_90", str(file), "-o", str(cubin)])
    (kernel,) = cuda_compiler.kernels_in(cubin, 90).values()
    assert kernel.local >= 128
