"""What became slower from one run to another: ``python -m benchmarks.compare OLD.csv NEW.csv``

For each case of both, let c be the new median over the old one. The machine's own change is the median c of all others:
peers and the copy. Ours became slower if c / machine > 1 + noise, where the noise is the sum of

- 5%;
- the range between our quartiles over the median, old and new;
- the largest distance of another's c / machine from 1: where the others do not agree, nobody knows the machine.

So a machine that is slower than it was flags nothing, and neither does a case that jitters. Exit status 3 if anything
became slower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .harness import OURS
from .report import Row, read

SLOWER = 3  # exit status
LEAST_NOISE = 0.05
SAME = ("machine", "device", "backend", "simd", "threads", "torch", "python")  # or else a comparison means less


class Change(NamedTuple):
    job: str
    shape: str
    ours: float  # new / old, over the machine's
    machine: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.ours > 1 + self.noise


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["job"], row["shape"]), {})[row["peer"]] = row
    return cases


def spread(row: Row) -> float:
    return (float(row["quartile3_us"]) - float(row["quartile1_us"])) / float(row["median_us"])


def change_of(case: tuple[str, str], old: Mapping[str, Row], new: Mapping[str, Row]) -> Change:
    ratios = {peer: float(new[peer]["median_us"]) / float(old[peer]["median_us"]) for peer in old if peer in new}
    ours = ratios[OURS]
    others = [ratio for peer, ratio in ratios.items() if not peer.startswith(OURS)]
    machine = statistics.median(others)
    doubt = max(abs(ratio / machine - 1) for ratio in others)
    return Change(*case, ours / machine, machine, LEAST_NOISE + spread(old[OURS]) + spread(new[OURS]) + doubt)


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Of every case that both have."""
    before, after = by_case(old), by_case(new)
    return [change_of(case, before[case], after[case]) for case in before if case in after]


def report(old: Sequence[Row], new: Sequence[Row]) -> int:
    """Print what became slower; return an exit status."""
    for name in SAME if old and new else ():
        if str(old[0].get(name)) != str(new[0].get(name)):
            print(f"warning: {name} was {old[0].get(name)} and is {new[0].get(name)}")
    found = changes(old, new)
    slower = sorted((change for change in found if change.slower), key=lambda change: -change.ours)
    print(f"\n{len(slower)} of {len(found)} cases that both runs have became slower")
    for change in slower:
        print(
            f"{change.job:<24}{change.shape:>13}  {change.ours:.2f}x as long, noise {change.noise:.0%}"
            f" (the others: {change.machine:.2f}x)"
        )
    return SLOWER if slower else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    return report(read(args.old), read(args.new))


if __name__ == "__main__":
    sys.exit(main())
