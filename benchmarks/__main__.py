"""``python -m benchmarks``: time operators and optimizers beside what they replace and a copy of the same bytes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import (
    bench_bijection,
    bench_bounded,
    bench_distributions,
    bench_flat,
    bench_parametrize,
    bench_positive,
    bench_projection,
    bench_simplex,
    bench_steps,
    compare,
    floors,
    harness,
    report,
)

BENCHES = (
    bench_bounded,
    bench_positive,
    bench_simplex,
    bench_projection,
    bench_steps,
    bench_flat,
    bench_parametrize,
    bench_bijection,
    bench_distributions,
)
JOBS = {job.name: job for bench in BENCHES for job in bench.JOBS}


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _cases(args: argparse.Namespace) -> list[report.Case]:
    jobs = {name: JOBS[name] for name in args.only or JOBS}
    if args.floors:
        return floors.cases(jobs, args.device, not args.no_compile)
    return [
        report.Case(job, shape, not args.no_compile and (job.headline or not args.quick))
        for job in jobs.values()
        for shape in job.chosen_shapes(args.quick, args.device, args.largest)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit status: 1 if a case failed, 3 if slower."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=harness.__doc__)
    parser.add_argument("--only", action="append", choices=JOBS, metavar="NAME", help=f"{', '.join(JOBS)}; repeatable")
    parser.add_argument("--quick", action="store_true", help="few sizes and samples, less than two minutes")
    parser.add_argument("--floors", action="store_true", help="only what benchmarks.floors asks for, up to ten minutes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=_count, metavar="N", help=f"CPU threads ({torch.get_num_threads()})")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(%(default)s)")
    parser.add_argument("--largest", type=_count, metavar="N", help="numbers in a tensor (2^24, on a GPU 2^28)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the results there, too")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="tell what is slower than there; exit status 3")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="begin no case after that time")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    old = report.read(args.compare) if args.compare else None  # before --csv, which may be the same file
    effort = harness.QUICK if args.quick else harness.FULL
    with Path(args.csv or os.devnull).open("w", newline="") as file:
        rows, failed = report.run(_cases(args), args.device, effort, file, args.seconds)
    slower = compare.report(old, rows) if old is not None else 0
    return 1 if failed else slower


if __name__ == "__main__":
    sys.exit(main())
