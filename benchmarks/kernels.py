"""Every kernel by itself: ``python -m benchmarks.kernels``, and ``... --ncu FILE`` for what Nsight Compute saw of it.

``... --list`` prints a table of all of them: what the compiler made of each, its Triton twin, and its emulated tests.

The operators are called as they are registered, without autograd around them, on tensors beyond the L2 cache. Bytes are
those that an operator must read and write; the ceiling is a copy measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops import _library

from .harness import seconds_for

ROWS = (4, 20, 32, 128, 1024, 8192, 65536)
METRICS = {  # of Nsight Compute, in base units
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "DRAM bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}


class Case(NamedTuple):
    name: str
    run: Callable[[], Any]
    moved: int  # bytes


def distinct_bytes(tensors: Sequence[Any]) -> int:
    """Of the memory behind tensors, whatever is not expanded."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and any(t.stride()))


def of_operator(transform: str, kernel: str, about: str, *args: Any) -> Case:
    operator = _library.overload(transform, kernel)
    results = operator(*args)
    results = results if isinstance(results, tuple) else (results,)
    name = f"{transform}_{kernel} {about}".strip()
    return Case(name, lambda: operator(*args), distinct_bytes(args) + distinct_bytes(results))


def of_step(about: str, kind: type[Any], shape: Sequence[int], constraint: Any) -> Case:
    p = Parameter(torch.full(tuple(shape), 1 / shape[-1]))
    p.grad = torch.randn_like(p)
    optimizer = kind([p], lr=1e-4, constraint=constraint)
    optimizer.step()
    tensors = 7 if kind is co.optim.ProjectedAdam else 8  # x, g, m, v -> x, m, v;  raw, g, m, v -> raw, x, m, v
    return Case(f"step {about}", optimizer.step, tensors * distinct_bytes([p]))


def cases(n: int) -> Iterator[Case]:
    """Of ``n`` numbers each, a multiple of 65536. Made one by one, since each takes much memory."""
    bounds = (-1.0, 2.0)
    for dtype in (torch.float32, torch.bfloat16):
        raw, g, a = (torch.randn(n).to(dtype) for _ in range(3))
        about = str(dtype)[6:]
        yield of_operator("bounded", "forward", about, raw, *bounds)
        yield of_operator("bounded", "backward", about, g, None, raw, *bounds)
    raw, g, a = (torch.randn(n) for _ in range(3))
    low, high = -1 - torch.rand(n), 1 + torch.rand(n)
    yield of_operator("bounded", "forward_log_det", "", raw, *bounds)
    yield of_operator("bounded", "double_backward", "", a, g, None, raw, *bounds, 1 | 2)
    yield of_operator("bounded", "forward", "above 0", raw, 0.0, float("inf"))
    yield of_operator("bounded", "backward", "above 0", g, None, raw, 0.0, float("inf"))
    yield of_operator("exponential", "forward", "", raw, 0.0, float("inf"))
    yield of_operator("bounded", "forward.tensor", "", raw, low, high)
    yield of_operator("bounded", "backward.tensor", "", g, None, raw, low, high, 7)
    del low, high
    strided = raw.view(-1, 256).t()
    yield of_operator("bounded", "backward", "gradient transposed", g.view(256, -1), None, strided, *bounds)
    for length in ROWS:
        rows, grads, along = (t[: n // length * length].view(-1, length) for t in (raw, g, a))
        yield of_operator("simplex", "forward", f"rows of {length}", rows, 1)
        yield of_operator("simplex", "backward", f"rows of {length}", grads, rows, 1)
        if length in (32, 8192):
            yield of_operator("simplex", "double_backward", f"rows of {length}", along, grads, rows, 1, 3)
        yield of_operator("projection", "forward", f"rows of {length}", rows, 1, 1.0)
        y = _library.overload("projection", "forward")(rows, 1, 1.0)
        yield of_operator("projection", "backward", f"rows of {length}", grads, y, 1)
        if length in (32, 8192):
            yield of_operator("projection", "forward.weighted", f"rows of {length}", rows, along.abs() + 1, 1, 1.0)
    for length in (32, 8192):
        columns, grads = raw.view(length, -1), g.view(length, -1)
        yield of_operator("simplex", "forward", f"columns of {length}", columns, 0)
        yield of_operator("simplex", "backward", f"columns of {length}", grads, columns, 0)
        yield of_operator("projection", "forward", f"columns of {length}", columns, 0, 1.0)
    del raw, g, a, rows, grads, along, columns, y
    projected, reparametrized = co.optim.ProjectedAdam, co.optim.ReparametrizedAdam
    yield of_step("without a constraint", projected, (n,), None)
    yield of_step("in a box", projected, (n,), constraints.unit_interval)
    yield of_step("on raw, interval", reparametrized, (n,), constraints.interval(-1.0, 2.0))
    yield of_step("on raw, above 0", reparametrized, (n,), constraints.greater_than(-1.0))
    for length in (4, 32, 1024, 8192):
        yield of_step(f"on the simplex, rows of {length}", projected, (n // length, length), constraints.simplex)
        yield of_step(f"on raw, softmax, rows of {length}", reparametrized, (n // length, length), constraints.simplex)


def copy_speed(n: int, device: str) -> float:
    """Bytes per second, read and written."""
    source, target = torch.ones(n), torch.ones(n)
    return 8 * n / seconds_of(lambda: target.copy_(source), device)


def seconds_of(run: Callable[[], Any], device: str) -> float:
    run()
    samples = [seconds_for(lambda: (run(),), 3, device) / 3 for _ in range(7)]
    return statistics.median(samples)


def measure(n: int, device: str, path: Path | None) -> None:
    ceiling = copy_speed(n, device)
    print(f"copy_ of {4 * n / 2**20:.0f} MiB: {ceiling / 1e9:.1f} GB/s\n")
    print(f"{'kernel':<58}{'us':>11}{'GB/s':>9}{'of copy':>9}")
    rows = []
    for case in cases(n):
        seconds = seconds_of(case.run, device)
        speed = case.moved / seconds
        print(f"{case.name:<58}{1e6 * seconds:>11,.1f}{speed / 1e9:>9,.0f}{speed / ceiling:>9.1%}", flush=True)
        rows.append({
            "kernel": case.name, "us": round(1e6 * seconds, 2), "gb_per_s": round(speed / 1e9, 1),
            "share_of_copy": round(speed / ceiling, 4),
        })  # fmt: skip
        if path:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def short(kernel: str) -> str:
    """A demangled kernel without its parameters and our namespace."""
    name = kernel.replace("constrained_ops::", "").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    name = re.sub(r"^void ", "", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return name[:end]


def profiled(path: Path) -> list[dict[str, str]]:
    """The launches in what ``ncu --csv --print-units base`` wrote."""
    lines = path.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[int, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if row["ID"].strip().isdigit():  # and not the row of units
            launch = launches.setdefault(int(row["ID"]), row)
            if "Metric Name" in row:  # a row for each metric, and not a column
                launch[row["Metric Name"]] = row["Metric Value"]
    return list(launches.values())


def number(launch: dict[str, str], metric: str) -> float:
    return float((launch.get(metric) or "nan").replace(",", ""))


def summarize(path: Path) -> int:
    """Print what Nsight Compute wrote; returns how many launches it saw."""
    launches = profiled(path)
    print(" ".join(f"{name:>10}" for name in METRICS.values()), "      GB/s  kernel")
    for launch in launches:
        values = [number(launch, metric) for metric in METRICS]
        shown = " ".join(f"{value:>10,.1f}" if value % 1 else f"{value:>10,.0f}" for value in values)
        print(shown, f"{values[1] / values[0]:>10,.0f}  {short(launch['Kernel Name'])[:150]}")
    return len(launches)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--numbers", type=int, default=2**26, metavar="N", help="in each tensor (%(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(%(default)s)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the results there, too")
    parser.add_argument("--once", action="store_true", help="run every kernel, for a profiler, and measure nothing")
    parser.add_argument("--ncu", type=Path, metavar="PATH", help="summarize what Nsight Compute wrote")
    parser.add_argument("--ncu-metrics", action="store_true", help="print what to ask Nsight Compute for")
    parser.add_argument(
        "--list", action="store_true", help="list them: compiler, Triton twin, tests; with --ncu, the GPU"
    )
    args = parser.parse_args(argv)
    if args.list:
        from . import kernel_list

        return kernel_list.print_list(profiled(args.ncu) if args.ncu else [])
    if args.ncu_metrics:
        print(",".join(METRICS))
        return 0
    if args.ncu:
        return 0 if summarize(args.ncu) else 1
    torch.manual_seed(0)
    with torch.device(args.device):
        if args.once:
            for case in cases(args.numbers):
                print(case.name, flush=True)
        else:
            measure(args.numbers, args.device, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
