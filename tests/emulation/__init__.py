"""The CUDA kernels of csrc/cuda, compiled by the host compiler against an emulation of the CUDA execution model.

The same ``.cu`` files register the same operators under ``constrained_ops_emulated``, for CPU tensors. What stands in
for the GPU: ``include/cuda_runtime.h`` (built-ins and runtime), ``fibers.cpp`` (a fiber per CUDA thread) or for
sanitizers ``threads.cpp`` (a thread each), and ``torch_cuda.cpp`` (device guard and stream).
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from constrained_ops import _library

NAMESPACE = "constrained_ops_emulated"
FOLDER = Path(__file__).parent
CSRC = FOLDER.parent.parent / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++") or "g++"

# Aliasing: vectors are read from memory that holds numbers. Visibility: torch's stable headers are hidden.
FLAGS = [
    *("-std=c++20", "-fPIC", "-pthread", "-march=native", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes", f"-I{FOLDER / 'include'}"),
]
_TORCH = Path(torch.__file__).parent
_TORCH_FLAGS = [
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-I{_TORCH / 'include'}"),
    *(f"-DCO_NAMESPACE={NAMESPACE}", "-DCO_DISPATCH_KEY=CPU"),
]
_TORCH_LIBRARIES = ["-shared", "-Wl,-Bsymbolic", f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]


def available() -> bool:
    wanted = os.environ.get("CONSTRAINED_OPS_TEST_EMULATION") != "off"
    return wanted and sys.platform == "linux" and shutil.which(CXX) is not None


def _sources() -> list[Path]:
    folders = (CSRC, CSRC / "math", CSRC / "cuda", FOLDER, FOLDER / "include")
    return sorted(p for folder in folders for p in folder.iterdir() if p.suffix in (".h", ".cuh", ".cu", ".cpp"))


@functools.cache
def cache_folder(common: tuple[str, ...] = (*FLAGS, *_TORCH_FLAGS), sources: tuple[Path, ...] = ()) -> Path:
    """Where builds of exactly these sources, by this compiler for this torch and processor, are kept."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    state = hashlib.sha256(repr((CXX, common, torch.__version__, processor)).encode())
    for path in sources or _sources():
        state.update(path.read_bytes())
    root = Path(
        os.environ.get("CONSTRAINED_OPS_TEST_CACHE") or Path(tempfile.gettempdir()) / "constrained_ops_emulation"
    )
    folder = root / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    link: Sequence[str],
    common: Sequence[str] = FLAGS,
    folder: Path | None = None,
) -> Path:
    """Compile and link, unless the cache has it; two files at a time, and one process at a time."""
    folder = folder or cache_folder()
    target = folder / name
    lock_file = folder / f"{name}.lock"
    with lock_file.open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target

        def compile_one(source: Path) -> str:
            output = f"{scratch}/{source.stem}.o"
            run([CXX, *common, *flags, "-x", "c++", "-c", str(source), "-o", output])
            return output

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(scratch) / name
        run([CXX, *common, *flags, *objects, *link, "-o", str(linked)])
        linked.replace(target)
    return target


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done


@functools.cache
def load() -> dict[str, dict[str, Callable[..., Any]]]:
    """The emulated kernels: ``load()[transform][kernel]`` takes what the operator ``transform_kernel`` takes."""
    kernels = sorted(CSRC.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)
    library = build(
        "libemulated.so",
        [*kernels, FOLDER / "fibers.cpp", FOLDER / "torch_cuda.cpp"],
        [*_TORCH_FLAGS, "-O1"],
        _TORCH_LIBRARIES,
    )
    definitions = torch.library.Library(NAMESPACE, "DEF")
    _definitions.append(definitions)
    table: dict[str, dict[str, Callable[..., Any]]] = {}
    for transform, members in _library.TRANSFORMS.items():
        for kernel, (arguments, results) in members.items():
            name, _, variant = kernel.partition(".")
            schema = f"{transform}_{kernel}({arguments}) -> " + (
                "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
            )
            definitions.define(schema)
            packet = getattr(getattr(torch.ops, NAMESPACE), f"{transform}_{name}")
            table.setdefault(transform, {})[kernel] = getattr(packet, variant or "default")
    definitions.define(_library.STEP)
    table["step"] = {"step": getattr(torch.ops, NAMESPACE).step.default}
    torch.ops.load_library(str(library))
    return table


# --- Which kernels were launched -------------------------------------------------------------------------------------

KERNEL = re.compile(r"_ZN15constrained_ops\d+\w+_kernelI")
LAUNCHES = "launches.txt"  # in the cache: lines of a test and a kernel that it launched, in the order of the tests
_noted: set[str] = set()


def kernels_of(library: Path) -> dict[str, int]:
    """Mangled names of the kernels in a library of the emulation, and where in it they are."""
    lines = [line.split() for line in run(["nm", str(library)]).stdout.splitlines()]
    return {name: int(at, 16) for at, _, name in filter(lambda line: len(line) == 3, lines) if KERNEL.match(name)}


def instances() -> dict[str, int]:
    """Those of the library that :func:`load` has built; none if it has not."""
    library = cache_folder() / "libemulated.so"
    return kernels_of(library) if library.exists() else {}


@functools.cache
def _symbols() -> tuple[Callable[..., int], dict[int, str]]:
    library = cache_folder() / "libemulated.so"
    launched: Any = ctypes.CDLL(str(library)).emulation_launched
    at = re.search(r"^(\w+) T emulation_launched$", run(["nm", str(library)]).stdout, re.MULTILINE)
    assert at is not None
    base = (ctypes.cast(launched, ctypes.c_void_p).value or 0) - int(at[1], 16)
    return launched, {base + offset: name for name, offset in instances().items()}


def note_launches(test: str) -> None:
    """Remember for :func:`launches` what was launched since the last call. Nothing where nothing was emulated."""
    if not load.cache_info().currsize:
        return
    launched, names = _symbols()
    found = (ctypes.c_void_p * len(names))()
    count = launched(found, len(found))
    lines = {f"{test} {names[address]}\n" for address in found[:count]} - _noted
    if lines:
        _noted.update(lines)
        with (cache_folder() / LAUNCHES).open("a") as file:
            file.write("".join(sorted(lines)))


def launches() -> dict[str, set[str]]:
    """The tests that have launched a kernel since its sources last changed, by its mangled name."""
    tests: dict[str, set[str]] = {}
    path = cache_folder() / LAUNCHES
    for line in path.read_text().splitlines() if path.exists() else ():
        test, kernel = line.split()
        tests.setdefault(kernel, set()).add(test)
    return tests


_definitions: list[torch.library.Library] = []  # operators live as long as their Library


def __getattr__(name: str) -> Any:
    """``KERNELS``: the table that :func:`load` gives, built at first use."""
    if name == "KERNELS":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
