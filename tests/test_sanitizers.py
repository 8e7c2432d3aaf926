"""The CPU's loops under AddressSanitizer and UBSan, without Python: ``cpu_loops/sanitize.cpp`` calls them."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import emulation
import pytest

CPU = emulation.CSRC / "cpu"
DRIVER = Path(__file__).parent / "cpu_loops" / "sanitize.cpp"
SOURCES = [CPU / "loops" / f"{name}.cpp" for name in ("projection", "bounded", "simplex", "step", "positive")]
# As in CMakeLists.txt, but for optimization, which would hide mistakes and takes the compiler long. What is left out of
# UBSan, checks of every pointer, AddressSanitizer sees as well, and they double the time of the build.
FLAGS = [
    *("-std=c++20", "-Og", "-g1", "-fno-var-tracking", "-fopenmp-simd"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
    *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow", "-fno-sanitize-recover=all"),
    "-DCO_EXTERNAL_LIMITS",
]
# The widest that there is; what the processor must have, as in csrc/cpu/levels.cpp.
AVX2 = {"avx2", "fma", "bmi2"}
LEVELS = {"x86-64-v3": AVX2, "x86-64-v4": AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}
# Memory that the loops take for themselves is full of NaN: what is used before it was written shows in results.
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@functools.cache
def program() -> Path:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    level = ["-DCO_LEVEL=baseline"]
    for name, needed in LEVELS.items():
        if needed <= flags:
            level = [f"-march={name}", f"-DCO_LEVEL={name.replace('-', '_')}"]
    headers = [
        path for folder in (emulation.CSRC, emulation.CSRC / "math", CPU, CPU / "loops") for path in folder.iterdir()
    ]
    read = tuple(sorted(path for path in [*headers, DRIVER] if path.suffix in (".h", ".cpp")))
    common = (*FLAGS, *level)
    folder = emulation.cache_folder(common, read)
    return emulation.build("sanitize_loops", [*SOURCES, CPU / "limits.cpp", DRIVER], [], [], common, folder)


@pytest.mark.skipif(not emulation.available(), reason="needs g++ on Linux")
@pytest.mark.parametrize("dtype", ["half", "bfloat16", "float32", "float64"])
def test_the_loops_stay_in_their_memory(dtype: str) -> None:
    # Addresses as they are: sanitizers of older compilers cannot live with much randomness in them.
    done = subprocess.run(
        ["setarch", "-R", str(program()), dtype], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
