"""The floors that a release has to meet, and how far results meet them: ``python -m benchmarks.floors RESULTS.csv...``

A floor is a ratio of two medians of one run, the peer's to ours. Where the peer is ``copy_`` it is a share of the
ceiling. The share that ours would have at the floor tells how far the floor is from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .bench_steps import SPARSEMAX
from .harness import COMPILED, COPY, LENGTHS, OURS, Job, Shape, on_gpu, rows
from .report import Case, Row, read, shape_name

AS_FAST = 0.95  # a peer whose time over ours is less is named
LARGE = ((2**20,), (2**24,))  # on a GPU 2^26 and 2^28


class Floor(NamedTuple):
    device: str
    job: str
    shape: Shape
    peer: str
    at_least: float


def cpu(job: str, shapes: Sequence[Shape], peer: str, *at_least: float) -> list[Floor]:
    ratios = at_least * len(shapes) if len(at_least) == 1 else at_least
    return [Floor("cpu", job, shape, peer, ratio) for shape, ratio in zip(shapes, ratios, strict=True)]


def gpu(job: str, shapes: Sequence[Shape], peer: str, at_least: float, grows: int = 0) -> list[Floor]:
    return [Floor("cuda", job, on_gpu(shape, grows), peer, at_least) for shape in shapes]


FROM_4 = rows([length for length in LENGTHS if length >= 4])
FLOORS = [
    *cpu("bounded", [(8,), (64,), (1024,)], "eager", 1.15),
    *cpu("bounded", [(8,), (64,), (1024,)], COMPILED, 2.5),
    *cpu("bounded", [(2**16,), (2**20,), (2**24,)], "eager", 1.7, 4, 2.2),
    *cpu("bounded", [(2**16,), (2**20,), (2**24,)], COMPILED, 1.2, 1.2, 1.0),
    *cpu("bounded_tensor", [(2**20,)], "eager", 5),
    *cpu("bounded_tensor", [(2**20,)], COMPILED, 1.2),
    *cpu("positive", [(2**20,)], "F.softplus", 1.3),
    *cpu("positive_second_order", [(2**20,)], "F.softplus", 2),
    *cpu("simplex", rows([4, 32, 1024, 65536]), "torch.softmax", 30, 2, 1.2, 1.0),
    *cpu("simplex_dim0", [(32, 32768)], "torch.softmax", 2),
    *cpu("projection_forward", FROM_4, "entmax.sparsemax", 60),
    *cpu("projection_forward", FROM_4, COPY, 1 / 6),
    *cpu("step_box", [(2**10,), (2**20,), (2**24,)], "fused, clamp_", 1.5, 2.2, 1.25),
    *cpu("step_simplex", rows([4, 32, 1024]), SPARSEMAX, 40),
    *cpu("step_raw", [(2**10,), (2**20,), (2**24,)], "eager, fused", 4, 5, 12),
    *cpu("step_raw", [(2**20,), (2**24,)], COMPILED, 3, 4.5),
    *cpu("step_raw_many", [(200, 64)], "eager, fused", 60),
    *cpu("step_box_many", [(200, 64)], "fused, clamp_", 10),
    *(floor for job in ("bounded_forward", "bounded", "positive") for floor in gpu(job, LARGE, COPY, 0.95)),
    *(floor for job in ("bounded_forward", "bounded", "positive") for floor in gpu(job, LARGE, COMPILED, 1.0)),
    *(floor for job in ("simplex_forward", "simplex") for floor in gpu(job, FROM_4, COPY, 0.85)),
    *(floor for job in ("simplex_forward", "simplex") for floor in gpu(job, rows([4, 32, 1024, 65536]), COMPILED, 1.0)),
    *(floor for job in ("projection_forward", "projection") for floor in gpu(job, FROM_4, COPY, 0.85)),
    *gpu("step_box", LARGE, COPY, 0.92),
    *gpu("step_raw", LARGE, COPY, 0.92),
    *gpu("step_simplex", rows([4, 32, 1024]), COPY, 0.92),
    *gpu("step_softmax", rows([4, 32, 1024]), COPY, 0.92),
    *gpu("step_raw_many", [(10_000, 64)], "eager, fused", 20),
    *gpu("step_box_many", [(10_000, 64)], "fused, clamp_", 20),
]


def cases(jobs: Mapping[str, Job], device: str, with_compile: bool) -> list[Case]:
    """What to run so that every floor for a kind of device is measured, and nothing else."""
    peers: dict[tuple[str, Shape], list[str]] = {}
    for floor in FLOORS:
        if floor.device == device and floor.job in jobs:
            peers.setdefault((floor.job, floor.shape), []).append(floor.peer)
    return [Case(jobs[job], shape, with_compile, only) for (job, shape), only in peers.items()]


# --- The table -----------------------------------------------------------------------------------------------------


class Measured:
    """The rows of one file."""

    def __init__(self, results: Sequence[Row]) -> None:
        self.rows = {(row["job"], row["shape"], row["peer"]): row for row in results}

    def ratio(self, job: str, shape: str, peer: str) -> float | None:
        row = self.rows.get((job, shape, peer))
        return float(row["peer_to_ours"]) if row else None

    def share(self, job: str, shape: str) -> float | None:
        row = self.rows.get((job, shape, OURS))
        return float(row["share_of_copy"]) if row else None

    def below(self) -> list[tuple[str, str, str]]:
        """Where a peer is faster than ours."""
        return [
            where
            for where, row in self.rows.items()
            if where[2] != COPY and not where[2].startswith(OURS) and float(row["peer_to_ours"]) < AS_FAST
        ]


def table_of(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}x"


def shares(shares_of_copy: Sequence[float | None]) -> str:
    return " / ".join("?" if share is None else f"{share:.0%}" for share in shares_of_copy)


def report(results: Sequence[Measured], names: Sequence[str], device: str) -> tuple[str, bool]:
    """Markdown, and whether every floor is met in every file."""
    lines, misses = [], 0
    floors = [floor for floor in FLOORS if floor.device == device]
    for _, job, shape, peer, at_least in floors:
        name = shape_name(shape)
        ratios = [result.ratio(job, name, peer) for result in results]
        met = ["?" if ratio is None else "yes" if ratio >= at_least else "**no**" for ratio in ratios]
        misses += met.count("yes") < len(met)
        own = [result.share(job, name) for result in results]
        at_floor = [
            share * at_least / ratio if share and ratio else None for share, ratio in zip(own, ratios, strict=True)
        ]
        measured = [times(ratio) for ratio in ratios]
        ends = [shares(own), shares(at_floor), " / ".join(met)]
        lines.append([job, name, f"`{peer}`", times(at_least), *measured, *ends])
    heads = ["job", "shape", "peer", "at least", *names, "share of copy", "at the floor", "met"]
    text = f"{table_of(heads, lines)}\n\n{len(floors) - misses} of {len(floors)} floors are met.\n"
    below = dict.fromkeys(where for result in results for where in result.below())
    text += f"\n### Where a peer is faster: ours below {AS_FAST}x\n\n"
    if below:
        found = [
            [job, shape, f"`{peer}`", *(times(result.ratio(job, shape, peer)) for result in results)]
            for job, shape, peer in below
        ]
        text += table_of(["job", "shape", "peer", *names], found) + "\n"
    else:
        text += "Nowhere in these results.\n"
    return text, not misses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.floors", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.csv", help="that runs have written")
    parser.add_argument("--strict", action="store_true", help="exit status 1 unless every floor is met in every file")
    args = parser.parse_args(argv)
    files = [read(path) for path in args.results]
    devices = {row["device"] for results in files for row in results}
    if len(devices) != 1:
        parser.error(f"results must be of one kind of device, not of {sorted(devices)}")
    for path, results in zip(args.results, files, strict=True):
        about = ("machine", "threads", "backend", "simd", "torch", "python", "constrained_ops", "commit")
        print(f"- {path.stem}: " + ", ".join(f"{name} {results[0][name]}" for name in about if results[0][name]))
    text, met = report([Measured(results) for results in files], [path.stem for path in args.results], devices.pop())
    print(f"\n{text}", end="")
    return 1 if args.strict and not met else 0


if __name__ == "__main__":
    sys.exit(main())
