"""``python -m benchmarks``: time the transforms beside eager PyTorch, torch.compile and a copy of the same bytes."""

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
    harness,
)

BENCHES = (
    bench_bijection,
    bench_bounded,
    bench_distributions,
    bench_flat,
    bench_parametrize,
    bench_positive,
    bench_projection,
    bench_simplex,
    bench_steps,
)
JOBS = {job.name: job for bench in BENCHES for job in bench.JOBS}


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=harness.__doc__)
    parser.add_argument("--only", action="append", choices=JOBS, metavar="NAME", help=f"{', '.join(JOBS)}; repeatable")
    parser.add_argument("--quick", action="store_true", help="few sizes and samples, less than two minutes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--threads", type=_count, metavar="N", help=f"CPU threads ({torch.get_num_threads()})")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(%(default)s)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the results there, too")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="begin no case after that time")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.threads:
        torch.set_num_threads(args.threads)
    jobs = [JOBS[name] for name in dict.fromkeys(args.only or JOBS)]
    with Path(args.csv or os.devnull).open("w", newline="") as file:
        failed = harness.run(jobs, args.device, args.quick, not args.no_compile, file, args.seconds)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
