"""Pictures of what ``python -m benchmarks --csv`` wrote: ``python -m benchmarks.plots results.csv FOLDER``.

One PNG per job: time per step of every peer over the shapes with its quartiles, and below the share of the speed of a
copy.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .harness import COPY, OURS

Row = dict[str, str]


def draw(job: str, rows: Sequence[Row], path: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(7, 6), layout="constrained")
    times, shares = figure.subplots(2, sharex=True)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = [row for row in rows if row["peer"] == peer]
        at = [shapes.index(row["shape"]) for row in own]
        median, low, high = (
            [float(row[name]) for row in own] for name in ("median_us", "quartile1_us", "quartile3_us")
        )
        off = [[m - q for m, q in zip(median, low, strict=True)], [q - m for m, q in zip(median, high, strict=True)]]
        style = {"linewidth": 2.5 if peer == OURS else 1.2, "linestyle": ":" if peer == COPY else "-"}
        times.errorbar(at, median, off, label=peer, capsize=2, **style)
        if peer != COPY:
            shares.plot(at, [100 * float(row["share_of_copy"]) for row in own], label=peer, marker=".", **style)
    times.set(yscale="log", ylabel="microseconds per step", title=f"{job}, {rows[0]['machine']}")
    times.legend(fontsize="small")
    shares.set(ylim=0, ylabel="% of the speed of copy_", xticks=range(len(shapes)), xticklabels=shapes, xlabel="shape")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    results, folder = map(Path, arguments)
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    for job in dict.fromkeys(row["job"] for row in rows):
        draw(job, [row for row in rows if row["job"] == job], folder / f"{job}.png")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
