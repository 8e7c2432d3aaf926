"""Run cases one after the other; print a table for each job, and write all of it as comma-separated values."""

from __future__ import annotations

import csv
import math
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

import constrained_ops as co

from .harness import COPY, MISSING, OURS, Effort, Job, Shape, Timing, measure

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

ROOT = Path(__file__).resolve().parent.parent

Row = Mapping[str, Any]  # of a file: strings


class Case(NamedTuple):
    job: Job
    shape: Shape
    with_compile: bool = True
    only: Sequence[str] | None = None  # these peers beside ours, if not all


def shape_name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def machine(device: str) -> str:
    """The GPU's name, or the CPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str:
    """Of this clone, with "-dirty" behind it if files differ from it; empty where this is no clone."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def facts(device: str) -> dict[str, Any]:
    """What the same benchmark may depend on."""
    info = co.build_info()
    return {
        "machine": machine(device),
        "device": device,
        "backend": info["backends"][device],
        "simd": info["simd"] if device == "cpu" else "",
        "threads": torch.get_num_threads(),
        "l2_bytes": torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0,
        "torch": info["torch"],
        "python": platform.python_version(),
        "constrained_ops": info["version"],
        "commit": commit(),
    }


def rows_of(job: Job, shape: Shape, timings: Mapping[str, Timing], l2_bytes: int) -> list[dict[str, Any]]:
    moved = 4 * sum(job.moved) * math.prod(shape)
    return [
        {
            "job": job.name,
            "shape": shape_name(shape),
            "peer": peer,
            "median_us": round(1e6 * timing.median, 3),
            "quartile1_us": round(1e6 * timing.quartile1, 3),
            "quartile3_us": round(1e6 * timing.quartile3, 3),
            "peer_to_ours": round(timing.median / timings[OURS].median, 4),
            "share_of_copy": round(timings[COPY].median / timing.median, 4),
            "moved_bytes": moved,
            "gb_per_s": round(moved / timing.median / 1e9, 2),
            "fits_in_l2": moved < l2_bytes,
            "samples": timing.samples,
            "runs_per_sample": timing.repeats,
        }
        for peer, timing in timings.items()
    ]


HEADING = f"{'shape':>13}  {'peer':<27}{'median us':>12}{'quartiles us':>25}{'peer / ours':>13}{'share of copy':>15}"


def line_of(row: Row) -> str:
    quartiles = f"{row['quartile1_us']:,.1f} - {row['quartile3_us']:,.1f}"
    times = f"{row['median_us']:>12,.1f}{quartiles:>25}"
    return f"{row['shape']:>13}  {row['peer']:<27}{times}{row['peer_to_ours']:>12.2f}x{row['share_of_copy']:>15.1%}"


def progress(cases: Sequence[Case]) -> Iterator[Case]:
    bar = tqdm(cases, unit="case", disable=None) if tqdm else cases
    for i, case in enumerate(bar):
        if tqdm:
            bar.set_description(f"{case.job.name} {case.shape}")
        else:
            print(f"[{i + 1}/{len(cases)}] {case.job.name} {case.shape}", file=sys.stderr, flush=True)
        yield case


def say(text: str) -> None:
    (tqdm.write if tqdm else print)(text)
    sys.stdout.flush()


def run(
    cases: Sequence[Case], device: str, effort: Effort, file: TextIO, seconds: float = math.inf
) -> tuple[list[dict[str, Any]], int]:
    """Run the cases; print a table for each job, and write ``file``.

    After ``seconds`` no other case is begun. Returns the rows and how many cases failed, which does not keep others
    from running.
    """
    end, failed, left_out = time.monotonic() + seconds, 0, 0
    about = facts(device)
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    if about["backend"] == "reference":
        say(f"warning: no compiled kernels beside {co.__file__}: constrained_ops is plain PyTorch here")
    for package in dict.fromkeys(MISSING):
        say(f"{package} is not installed: its peers are left out")
    results: list[dict[str, Any]] = []
    writer = headed = None
    for job, shape, with_compile, only in progress(cases):
        if time.monotonic() > end:
            left_out += 1
            continue
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            timings = measure(job.steps(shape, device, with_compile, only), device, effort)
        except Exception:  # the GPU's memory may be too small for one, a compiler may fail
            say(f"\n{job.name} {shape} failed\n{traceback.format_exc()}")
            failed += 1
            continue
        if headed is not job:
            say(f"\n{job.name}: {job.about}\n{HEADING}")
            headed = job
        rows = rows_of(job, shape, timings, about["l2_bytes"])
        say("\n".join(map(line_of, rows)))
        if writer is None:
            writer = csv.DictWriter(file, [*about, *rows[0]])
            writer.writeheader()
        writer.writerows({**about, **row} for row in rows)
        file.flush()
        results += [{**about, **row} for row in rows]
    if left_out:
        say(f"\n{left_out} of {len(cases)} cases were left out after {seconds:.0f} s")
    return results, failed


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that a run has written."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
