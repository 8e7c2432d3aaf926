"""Pictures of what ``python -m benchmarks --csv`` wrote: ``python -m benchmarks.plots RESULTS.csv FOLDER``.

- ``time.png``: time against size for each family;
- ``ratios.png``: how many times as fast as each peer, at three sizes of each family;
- ``ceiling.png``: the share of the speed of a copy, ours and the fastest peer, at the largest size, and of rows at the
  length where the share is least;
- with ``--detail`` also ``jobs/NAME.png``, all shapes of one job, with quartiles.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .harness import COMPILED, COPY, OURS
from .report import Row, read

BLUE, GREY, INK = "#1f5fbf", "#9a9a9a", "#2b2b2b"
STYLE = {  # of peers, by how their names begin, the longer ones first
    f"{OURS}, ": {"color": "#6aa5f0", "linestyle": "--"},
    OURS: {"color": BLUE, "linewidth": 2.6, "zorder": 5},
    COPY: {"color": GREY, "linestyle": ":", "linewidth": 1.6, "marker": ""},
    f"{COMPILED}, ": {"color": "#7a3fa0"},
    COMPILED: {"color": "#d9822b"},
    "torch.distributions": {"color": "#3a9a8c"},
    "fused, entmax": {"color": "#3a9a8c"},
    "entmax": {"color": "#3a9a8c"},
    "foreach": {"color": "#3a9a8c"},
    "gpytorch": {"color": "#b5a12a"},
    "liger": {"color": "#7a3fa0"},
    "": {"color": "#c8433a"},  # what one writes in PyTorch
}


class Family(NamedTuple):
    job: str
    title: str
    rows: bool = False  # sizes are lengths of rows


FAMILIES = (
    Family("bounded", "bounded\nforward + backward"),
    Family("simplex", "simplex (softmax)\nforward + backward", rows=True),
    Family("projection_forward", "project_simplex\nforward", rows=True),
    Family("step_box", "ProjectedAdam, interval\nwhole step"),
    Family("step_raw", "ReparametrizedAdam, interval\nwhole step"),
    Family("step_simplex", "ProjectedAdam, simplex\nwhole step", rows=True),
)

CEILING = {  # jobs in that picture
    "bounded_forward": "bounded, forward",
    "bounded": "bounded, forward + backward",
    "bounded_tensor": "bounded, tensor bounds and their gradients",
    "positive": "positive, forward + backward",
    "positive_second_order": "positive, second order",
    "simplex_forward": "simplex, forward",
    "simplex": "simplex, forward + backward",
    "simplex_dim0": "simplex along dim 0, forward + backward",
    "ilr": "simplex, ILR, forward + backward",
    "projection_forward": "project_simplex, forward",
    "projection": "project_simplex, forward + backward",
    "step_box": "ProjectedAdam, interval",
    "step_raw": "ReparametrizedAdam, interval",
    "step_simplex": "ProjectedAdam, simplex",
    "step_softmax": "ReparametrizedAdam, simplex",
    "step_box_many": "ProjectedAdam, interval, many tensors",
    "step_raw_many": "ReparametrizedAdam, interval, many tensors",
}


def style_of(peer: str) -> dict[str, object]:
    plain = {"linewidth": 1.5, "marker": "o", "markersize": 3.5}
    return plain | next(style for start, style in STYLE.items() if peer.startswith(start))


def unique(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def of(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def size_of(row: Row, by_rows: bool) -> int:
    """Numbers in all, or in a row."""
    shape = [int(n) for n in row["shape"].split("x")]
    return shape[-1] if by_rows else math.prod(shape)


def short(n: int) -> str:
    """1024 as 1K, and 1000 as it is."""
    for unit, letter in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if n % unit == 0:
            return f"{n // unit}{letter}"
    return f"{n:,}".replace(",", " ") if n >= 10_000 else str(n)


def time(us: float) -> str:
    for unit, letter in ((1e6, "s"), (1e3, "ms"), (1, "µs")):
        if us >= unit:
            return f"{us / unit:.3g} {letter}"
    return f"{us * 1e3:.3g} ns" if us else "0"


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, which="both", color=GREY)


def about(row: Row) -> str:
    where = f"{row['threads']} thread{'s' * (row['threads'] != '1')}" if row["device"] == "cpu" else row["backend"]
    return f"{row['machine']}, {where}, torch {row['torch']}, float32, medians, commit {row['commit'] or 'unknown'}"


def head(figure: Figure, title: str, row: Row) -> None:
    """Title and footing, with room for them."""
    inch, left = 1 / figure.get_figheight(), 0.1 / figure.get_figwidth()
    figure.get_layout_engine().set(rect=(0, 0.3 * inch, 1, 1 - 0.8 * inch))
    figure.suptitle(title, x=left, y=1 - 0.1 * inch, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    figure.text(left, 0.1 * inch, about(row), fontsize=8.5, color="#666666", va="bottom")


def times_on(axes: Axes) -> None:
    """A logarithmic y axis of microseconds; one of few decades needs more than their ends."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: time(us)))
    axes.yaxis.set_minor_formatter(NullFormatter())


# --- Time against size ---------------------------------------------------------------------------------------------


def lines(axes: Axes, rows: Sequence[Row], by_rows: bool) -> None:
    """Medians of every peer, and between the quartiles a band."""
    for peer in unique(rows, "peer"):
        own = sorted(of(rows, peer=peer), key=lambda row: size_of(row, by_rows))
        sizes = [size_of(row, by_rows) for row in own]
        low, median, high = (
            [float(row[name]) for row in own] for name in ("quartile1_us", "median_us", "quartile3_us")
        )
        style = style_of(peer)
        axes.plot(sizes, median, label=peer, **style)
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    ticks = sorted({size_of(row, by_rows) for row in rows})
    if len(ticks) > 7:
        ticks = [n for n in ticks if n.bit_count() == 1][::3]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [short(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    times_on(axes)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    bare(axes)


def draw_time(rows: Sequence[Row], families: Sequence[Family]) -> Figure:
    across = min(3, len(families))
    down = math.ceil(len(families) / across)
    figure = Figure(figsize=(4.4 * across + 0.2, 4.3 * down + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, family in zip(panels, families, strict=False):
        own = of(rows, job=family.job)
        lines(axes, own, family.rows)
        axes.set_title(family.title, fontsize=10.5, color=INK, loc="left")
        numbers = short(math.prod(map(int, own[0]["shape"].split("x"))))
        axes.set_xlabel(f"length of a row, {numbers} numbers in all" if family.rows else "elements", fontsize=9)
        axes.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=1.6
        )
    for axes in list(panels):
        axes.set_visible(False)
    head(figure, "Time against size", rows[0])
    return figure


# --- Ratios --------------------------------------------------------------------------------------------------------


def at_three_sizes(rows: Sequence[Row], by_rows: bool) -> list[str]:
    """Shapes: a small one, the middle, a large one."""
    shapes = sorted(unique(rows, "shape"), key=lambda shape: size_of({"shape": shape}, by_rows))
    return list(dict.fromkeys(shapes[round(i * (len(shapes) - 1) / 2)] for i in range(3)))


def is_peer(row: Row) -> bool:
    return row["peer"] != COPY and not row["peer"].startswith(OURS)


def bars(axes: Axes, rows: Sequence[Row], family: Family) -> None:
    """A bar for each peer from 1 to its ratio, below the size."""
    y, names = 0, []
    for shape in at_three_sizes(rows, family.rows):
        size = short(size_of({"shape": shape}, family.rows))
        names.append((y, f"rows of {size}" if family.rows else f"{size} elements", "bold"))
        for row in (row for row in of(rows, shape=shape) if is_peer(row)):
            y += 1
            ratio = float(row["peer_to_ours"])
            names.append((y, row["peer"], "normal"))
            axes.barh(y, ratio - 1, left=1, height=0.8, color=style_of(row["peer"])["color"])
            text = f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
            axes.annotate(text, (max(ratio, 1), y), (4, 0), textcoords="offset points", fontsize=8.5, va="center",
                          color=INK, fontweight="bold" if ratio < 1 else "normal")  # fmt: skip
        y += 1
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(xscale="log", ylim=(y - 0.4, -0.6))
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(family.title.replace("\n", ", "), fontsize=10.5, color=INK, loc="left")
    bare(axes)
    axes.set_yticks([at for at, *_ in names], [name for _, name, _ in names])
    axes.tick_params(axis="y", length=0)
    for label, (*_, weight) in zip(axes.get_yticklabels(), names, strict=True):
        label.set(fontsize=8.5, fontweight=weight)
    axes.spines["left"].set_visible(False)


def draw_ratios(rows: Sequence[Row], families: Sequence[Family]) -> Figure:
    across = min(2, len(families))
    down = math.ceil(len(families) / across)
    columns = [families[i * down : (i + 1) * down] for i in range(across)]
    of_family = {family: of(rows, job=family.job) for family in families}
    heights = [  # of a row of panels: its lines, as many as the longer of both has
        max(
            len([row for row in of_family[f] if is_peer(row) and row["shape"] in at_three_sizes(of_family[f], f.rows)])
            for column in columns
            for f in column[i : i + 1]
        )
        + 5
        for i in range(down)
    ]
    figure = Figure(figsize=(6.6 * across, 0.2 * sum(heights) + 0.5 * down + 0.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    panels = figure.subplots(down, across, squeeze=False, height_ratios=heights, sharex=True)
    ratios = [float(row["peer_to_ours"]) for own in of_family.values() for row in own if is_peer(row)]
    for axes in panels.flat:
        axes.set_visible(False)
    for i, column in enumerate(columns):
        for axes, family in zip(panels[:, i], column, strict=False):
            axes.set_visible(True)
            bars(axes, of_family[family], family)
            axes.tick_params(labelbottom=True)
            axes.set_xlim(min(0.8, 0.9 * min(ratios, default=1)), 2 * max(ratios, default=1))
    for axes in panels[-1]:
        axes.set_xlabel("the peer's time over ours; left of 1 the peer is faster", fontsize=9)
    head(figure, "How many times as fast as what it replaces", rows[0])
    return figure


# --- The ceiling ---------------------------------------------------------------------------------------------------


def for_the_ceiling(rows: Sequence[Row]) -> Row:
    """Ours at the largest size; of many rows of one size in all, where the share is least."""
    ours = of(rows, peer=OURS)
    largest = max(size_of(row, by_rows=False) for row in ours)
    # Rows of 20 do not add up to quite as many.
    return min(
        (row for row in ours if size_of(row, by_rows=False) > 0.9 * largest),
        key=lambda row: float(row["share_of_copy"]),
    )


def draw_ceiling(rows: Sequence[Row]) -> Figure:
    jobs = unique(rows, "job")
    titles = {job: title for job, title in CEILING.items() if job in jobs} or {job: job for job in jobs}
    figure = Figure(figsize=(9.5, 0.36 * len(titles) + 1.6), layout="constrained")
    axes = figure.subplots()
    names = []
    for y, (job, title) in enumerate(titles.items()):
        ours = for_the_ceiling(of(rows, job=job))
        share = 100 * float(ours["share_of_copy"])
        names.append(f"{title}   {' x '.join(short(int(n)) for n in ours['shape'].split('x'))}")
        axes.barh(y, share, height=0.62, color=BLUE, label=OURS if y == 0 else None)
        peers = [row for row in of(rows, job=job, shape=ours["shape"]) if is_peer(row)]
        theirs = max((100 * float(row["share_of_copy"]) for row in peers), default=math.nan)
        label = "the fastest peer" if y == 0 else None
        axes.plot([theirs, theirs], [y - 0.4, y + 0.4], color="#f0a030", linewidth=3.5, label=label)
        axes.annotate(f"{share:.0f}%", (max(share, theirs), y), (5, 0), textcoords="offset points", va="center",
                      fontsize=8.5, color=INK, bbox={"color": "white", "pad": 0.5})  # fmt: skip
    axes.axvline(100, color=INK, linewidth=1.2, linestyle=":", label=COPY)
    axes.set(ylim=(len(titles) - 0.4, -0.6), xlim=(0, None))
    axes.set_yticks(range(len(titles)), names)
    axes.set_xlabel("% of the speed of copy_ of the same bytes", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    bare(axes)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend([handles[name] for name in (OURS, "the fastest peer", COPY)], [OURS, "the fastest peer", COPY],
                  loc="upper right", ncols=3, frameon=False, fontsize=9)  # fmt: skip
    head(figure, "Share of the ceiling", rows[0])
    return figure


# --- One job -------------------------------------------------------------------------------------------------------


def quartiles(rows: Sequence[Row]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Medians, and how far the quartiles are below and above."""
    low, median, high = ([float(row[f"{name}_us"]) for row in rows] for name in ("quartile1", "median", "quartile3"))
    below = [m - q for m, q in zip(median, low, strict=True)]
    return median, (below, [q - m for m, q in zip(median, high, strict=True)])


def bars_of_one_shape(axes: Axes, rows: Sequence[Row]) -> None:
    median, off = quartiles(rows)
    colors = [style_of(row["peer"])["color"] for row in rows]
    axes.barh(range(len(rows)), median, xerr=off, height=0.7, color=colors, ecolor=INK, capsize=3)
    for y, row in enumerate(rows):
        text = f"{time(median[y])}, {100 * float(row['share_of_copy']):.0f}% of the speed of copy_"
        axes.annotate(text, (median[y] + off[1][y], y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.5 * max(median)))
    axes.set_yticks(range(len(rows)), [row["peer"] for row in rows])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda us, _: time(us)))
    axes.set_xlabel(f"time per run, {rows[0]['shape']}", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    bare(axes)


def lines_over_shapes(times: Axes, shares: Axes, rows: Sequence[Row], shapes: Sequence[str]) -> None:
    for peer in unique(rows, "peer"):
        own = of(rows, peer=peer)
        at = [shapes.index(row["shape"]) for row in own]
        median, off = quartiles(own)
        times.errorbar(at, median, off, label=peer, capsize=2, **style_of(peer))
        if peer != COPY:
            shares.plot(at, [100 * float(row["share_of_copy"]) for row in own], **style_of(peer))
    times_on(times)
    times.set_ylabel("time per run", fontsize=9)
    shares.set_ylabel("% of the speed of copy_", fontsize=9)
    shares.set(ylim=(0, None), xticks=range(len(shapes)))
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(shapes) > 8 else {}
    shares.set_xticklabels(shapes, **slanted)
    for axes in (times, shares):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        bare(axes)


def draw_job(rows: Sequence[Row]) -> Figure:
    shapes = unique(rows, "shape")
    if len(shapes) == 1:
        figure = Figure(figsize=(9.5, 0.4 * len(rows) + 1.5), layout="constrained")
        bars_of_one_shape(figure.subplots(), rows)
    else:
        figure = Figure(figsize=(9.5, 6.4), layout="constrained")
        lines_over_shapes(*figure.subplots(2, sharex=True), rows, shapes)
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    head(figure, rows[0]["job"], rows[0])
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.csv")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--detail", action="store_true", help="a picture of each job, too")
    args = parser.parse_args(argv)
    rows = read(args.results)
    if not rows:
        print(f"{args.results} has no results", file=sys.stderr)
        return 1
    jobs = unique(rows, "job")
    families = [family for family in FAMILIES if family.job in jobs] or [Family(job, job) for job in jobs]
    figures = {"time": draw_time(rows, families), "ratios": draw_ratios(rows, families), "ceiling": draw_ceiling(rows)}
    if args.detail:
        figures |= {f"jobs/{job}": draw_job(of(rows, job=job)) for job in jobs}
    for name, figure in figures.items():
        path = args.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
