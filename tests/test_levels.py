"""The instruction sets below the one that this processor would take, which runs in all other tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import constrained_ops as co

LEVELS = ["baseline", "x86-64-v3", "x86-64-v4"]
TESTS = Path(__file__).parent
FILES = [
    *("test_levels.py", "test_backends.py", "test_bijection.py", "test_optim_memory.py", "test_projection.py"),
    *("test_optim_long_rows.py", "test_step.py"),
]
OWN = str(co.build_info()["simd"])


def test_the_cpu_takes_the_level_that_is_asked_for() -> None:
    assert os.environ.get("CONSTRAINED_OPS_SIMD", OWN) == OWN


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(OWN)] if OWN in LEVELS else [])
def test_lesser_instruction_sets(level: str) -> None:
    tests = [str(TESTS / name) for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpu and not emulated"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "CONSTRAINED_OPS_SIMD": level, "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
