"""The main job: archetypes of handwritten digits, learnt on several roads side by side.

Every one of the 1797 digits X [1797, 64] is to be a mixture of K archetypes that are themselves pictures:

    minimise mean (X - W H)^2   over  W [1797, K], rows on the simplex;  H [K, 64] in (0, 16)

A road is one way to keep W and H inside while Adam works. All roads start from the same values. Those that claim to
walk the first road's trajectory are held to it, and all are held to the constraints.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

import constrained_ops as co

BRIGHTEST = 16.0  # the digits' pixels are whole numbers from 0 to 16
LEARNING_RATE = 0.05
BLOCK = 20  # steps of one road before it is another's turn
# One step rounds the loss by 1e-7 of itself. Adam divides each gradient by its own size, rounding included, so that
# trajectories drift: PyTorch itself, started one rounding away, came out up to 1e-4 off over many seeds and several K.
# This is ten times as much.
TOLERANCE = 1e-3


class Model(NamedTuple):
    """What a road makes of the starting values: its leaves, their optimizer, and the way from them to (W, H)."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    constrain: Callable[[], tuple[Tensor, Tensor]]


class Road(NamedTuple):
    name: str
    make: Callable[[Tensor, Tensor], Model]  # from raw_w [N, K], raw_h [K, 64]
    follows_first: bool = True  # walks the trajectory of the first road
    strict: bool = True  # never rounds H onto a bound


def _transform_road(simplex: Callable[[Tensor], Tensor], bounded: Callable[[Tensor], Tensor]) -> Any:
    def make(raw_w: Tensor, raw_h: Tensor) -> Model:
        leaves = [raw.clone().requires_grad_() for raw in (raw_w, raw_h)]
        try:
            adam = torch.optim.Adam(leaves, lr=LEARNING_RATE, fused=True)
        except RuntimeError:  # no fused Adam for this device
            adam = torch.optim.Adam(leaves, lr=LEARNING_RATE)
        return Model(leaves, adam, lambda: (simplex(leaves[0]), bounded(leaves[1])))

    return make


def _optimizer_road(optimizer: Any) -> Any:
    """W and H themselves are the leaves."""

    def make(raw_w: Tensor, raw_h: Tensor) -> Model:
        leaves = [co.simplex(raw_w).requires_grad_(), co.bounded(raw_h, 0.0, BRIGHTEST).requires_grad_()]
        sets = constraints.simplex, constraints.interval(0.0, BRIGHTEST)
        groups = [{"params": [leaf], "constraint": each} for leaf, each in zip(leaves, sets, strict=True)]
        return Model(leaves, optimizer(groups, lr=LEARNING_RATE), lambda: (leaves[0], leaves[1]))

    return make


ROADS = [
    Road(
        "PyTorch",
        _transform_road(lambda raw: torch.softmax(raw, -1), lambda raw: BRIGHTEST * torch.sigmoid(raw)),
        strict=False,  # its sigmoid rounds to 1 as soon as raw exceeds 16.6
    ),
    Road("transforms", _transform_road(co.simplex, lambda raw: co.bounded(raw, 0.0, BRIGHTEST))),
    Road("ReparametrizedAdam", _optimizer_road(co.optim.ReparametrizedAdam)),
    Road("ProjectedAdam", _optimizer_road(co.optim.ProjectedAdam), follows_first=False, strict=False),
]


class Training:
    """One road under way; at the end its line in the table. Times are medians, in seconds."""

    step_time = own_time = difference = math.nan

    def __init__(self, road: Road, images: Tensor, start: Sequence[Tensor], steps: int) -> None:
        self.road, self.images = road, images
        self.model = road.make(*start)
        self.losses = images.new_empty(steps)
        self.done = 0  # steps
        self.on_bound = 0  # the most values of H seen on 0 or 16
        self.broken: set[str] = set()  # rules
        self.upstream = self.constrained()

    def constrained(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            w, h = self.model.constrain()
            return w.clone(), h.clone()

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            self.model.optimizer.zero_grad()
            w, h = self.model.constrain()
            loss = torch.nn.functional.mse_loss(w @ h, self.images)
            torch.autograd.backward(loss)
            self.model.optimizer.step()
            self.losses[self.done] = loss.detach()
            self.done += 1

    def own_share(self, times: int) -> None:
        """A step without the model: transforms, forward and backward from fixed gradients, and the optimizer."""
        for _ in range(times):
            self.model.optimizer.zero_grad()
            torch.autograd.backward(self.model.constrain(), self.upstream)
            self.model.optimizer.step()

    def check(self) -> None:
        w, h = (x.cpu() for x in self.constrained())
        off = (w.double().sum(-1) - 1).abs()
        on_bound = int(((h == 0) | (h == BRIGHTEST)).sum())
        self.on_bound = max(self.on_bound, on_bound)
        rules = {
            "W >= 0": bool((w >= 0).all()),
            "rows of W sum to 1": bool((off <= w.shape[-1] * torch.finfo(w.dtype).eps).all()),
            f"0 <= H <= {BRIGHTEST:g}": bool(((h >= 0) & (h <= BRIGHTEST)).all()),
            f"0 < H < {BRIGHTEST:g}": on_bound == 0 or not self.road.strict,
        }
        self.broken |= {rule for rule, holds in rules.items() if not holds}

    def problems(self) -> list[str]:
        problems = [f"{self.road.name} breaks the constraint {rule}" for rule in sorted(self.broken)]
        if self.road.follows_first and not self.difference <= TOLERANCE:
            problems.append(f"the losses of {self.road.name} and {ROADS[0].name} differ by more than rounding")
        return problems


def _take_turns(
    works: Sequence[Callable[[int], None]], times: int, device: torch.device, after: Callable[[int, int], None]
) -> list[float]:
    """Median seconds per run of each work. They alternate in short blocks, there and back: whatever slows the machine
    down for a while slows all of them."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    seconds: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    for first in range(0, times, BLOCK):
        block = min(BLOCK, times - first)
        for i in order:
            start = now()
            works[i](block)
            seconds[i].append((now() - start) / block)
            after(i, block)
        order.reverse()
    return [statistics.median(blocks) for blocks in seconds]


def train(images: Tensor, archetypes: int, steps: int, seed: int) -> list[Training]:
    """Walk all roads, with a progress bar."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    shapes = (images.shape[0], archetypes), (archetypes, images.shape[1])
    start = [torch.randn(shape, generator=generator).to(images.device) for shape in shapes]
    for road in ROADS:  # warm-up, thrown away
        training = Training(road, images, start, BLOCK)
        training.learn(BLOCK)
        training.own_share(BLOCK)
    trainings = [Training(road, images, start, steps) for road in ROADS]
    still = [Training(road, images, start, 0) for road in ROADS]  # to measure on, and not to learn
    for t in still:
        for group in t.model.optimizer.param_groups:
            group["lr"] = 0.0
    with tqdm(total=steps * len(ROADS), unit=" steps", desc="learning") as bar:

        def report(i: int, block: int) -> None:
            if i < len(trainings):
                trainings[i].check()
                bar.set_postfix(loss=f"{float(trainings[i].losses[trainings[i].done - 1]):.4f}", refresh=False)
                bar.update(block)

        works = [t.learn for t in trainings] + [t.own_share for t in still]
        medians = _take_turns(works, steps, images.device, report)
    first = trainings[0].losses.cpu().double()
    for i, t in enumerate(trainings):
        t.step_time, t.own_time = medians[i], medians[i + len(trainings)]
        t.difference = float(((t.losses.cpu().double() - first) / first).abs().max())
    return trainings


def table(trainings: Sequence[Training]) -> str:
    rows = [("", "final loss", "time per step", "speed", "without the model", "speed")]
    base = trainings[0]
    for t in trainings:
        step = f"{t.step_time * 1e6:.1f} us", f"{base.step_time / t.step_time:.2f}x"
        own = f"{t.own_time * 1e6:.1f} us", f"{base.own_time / t.own_time:.2f}x"
        rows.append((t.road.name, f"{float(t.losses[-1]):.6f}", *step, *own))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _tiles(training: Training, labels: Tensor) -> Any:
    """The archetypes as one picture, in the order of the digits that they serve most."""
    w, h = (x.cpu() for x in training.constrained())
    digits = torch.nn.functional.one_hot(labels).float()
    share = w.T @ (digits / digits.sum(0))  # [K, 10]: the part of each digit that an archetype makes up
    order = sorted(range(len(h)), key=lambda k: (int(share[k].argmax()), -float(share[k].max())))
    columns = max(1, math.isqrt(len(h)))
    rows = math.ceil(len(h) / columns)
    picture = torch.full((9 * rows + 1, 9 * columns + 1), torch.nan)  # a pixel between tiles
    for place, k in enumerate(order):
        top, left = 9 * (place // columns) + 1, 9 * (place % columns) + 1
        picture[top : top + 8, left : left + 8] = h[k].view(8, 8)
    return picture.numpy()


def draw(trainings: Sequence[Training], labels: Tensor, path: Path) -> None:
    """Write one picture: loss curves, times, archetypes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    colours = ["#f6b79a", "#1f5a99", "#2a9d62", "#7b3fa0"]
    names = [t.road.name for t in trainings]
    n, k = trainings[0].upstream[0].shape
    device = trainings[0].images.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}"
    style: Any = {"font.size": 15, "axes.titlesize": 17, "axes.titlepad": 12, "axes.titlelocation": "left"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#777777"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(17, 8), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15))
        figure.suptitle(f"{n} handwritten digits as mixtures of {k} learnt archetypes", fontsize=21)
        grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1, 1))

        for row, unit in enumerate(("step", "seconds")):
            curves = figure.add_subplot(grid[row, 0], xlabel=unit, xscale="log", yscale="log")
            for i, t in enumerate(trainings):
                # Where curves coincide, the dashes of one show in the gaps of another.
                pen: Any = {"lw": 2.4, "ls": (3 * i, (3, 3 * (len(trainings) - 2)))} if row == 0 and i else {"lw": 2.4}
                if row == 0 and i == 0:
                    pen = {"lw": 9, "solid_capstyle": "round"}
                places = torch.arange(1, t.done + 1) * (t.step_time if row else 1)
                curves.plot(places.numpy(), t.losses.cpu().numpy(), color=colours[i % 4], label=names[i], **pen)
            curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            curves.yaxis.set_minor_formatter(NullFormatter())
            for axis in curves.xaxis, curves.yaxis:
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            if row == 0:
                curves.set_title("Mean squared error")
                curves.legend(frameon=False, loc="lower left", fontsize=11, borderaxespad=0.2)

        panels = [[t.step_time for t in trainings], [t.own_time for t in trainings]]
        for row, (title, seconds) in enumerate(zip(("Time per step", "... without the model"), panels, strict=True)):
            bars = figure.add_subplot(grid[row, 1], title=f"{title} ({machine})")
            texts = [f" {1e6 * s:.0f} µs" + (f"  ({seconds[0] / s:.2f}x)" if i else "") for i, s in enumerate(seconds)]
            bars.bar_label(bars.barh(names, seconds, color=colours, height=0.6), texts)
            bars.set(xlim=(0, 1.7 * max(seconds)), xticks=[])
            bars.invert_yaxis()  # the first road on top
            bars.spines["bottom"].set_visible(False)
            bars.tick_params(left=False)

        tiles = figure.add_subplot(grid[:, 2], title="Archetypes", anchor="N")
        colour_map = matplotlib.colormaps["gray_r"].with_extremes(bad="#c9d6e6")
        tiles.imshow(_tiles(trainings[-1], labels), cmap=colour_map, vmin=0, vmax=BRIGHTEST, interpolation="nearest")
        tiles.set_axis_off()
        figure.savefig(path)


def run(args: argparse.Namespace) -> int:
    """The command: 0 if the roads agree and the constraints hold, 1 if not, 2 if packages are missing."""
    try:
        for package in ("sklearn.datasets", "matplotlib.figure", "tqdm"):
            import_module(package)
    except ImportError as error:
        install = 'pip install "constrained_ops[demo]", or pip install ".[demo]" from a clone'
        print(f"the demo needs scikit-learn, matplotlib and tqdm ({error}): {install}", file=sys.stderr)
        return 2
    data = import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.data, dtype=torch.float32, device=args.device)
    trainings = train(images, args.archetypes, args.steps, args.seed)

    print(f"\n{table(trainings)}\n")
    for t in trainings:
        if t.road.follows_first and t is not trainings[0]:
            roads = f"{t.road.name} and {ROADS[0].name}"
            print(f"Losses of {roads}: largest relative difference {t.difference:.1e} (allowed: {TOLERANCE:.0e})")
        if t.on_bound:
            print(f"{t.road.name} rounded {t.on_bound} values of H onto 0 or {BRIGHTEST:g}")
    draw(trainings, torch.tensor(data.target), args.output)
    print(f"Picture: {args.output}")
    problems = [problem for t in trainings for problem in t.problems()]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError("must be a .png, .pdf or .svg file in an existing folder")
    return path


def add_parser(commands: Any) -> None:
    summary = "archetypes of handwritten digits, learnt on four roads: PyTorch's transforms, ours, and two optimizers"
    parser = commands.add_parser("demo", help=summary, description=summary)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--steps", type=_count, default=4000, help="of each road (%(default)s)")
    parser.add_argument("--archetypes", type=_count, default=20, metavar="K", help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting values (%(default)s)")
    parser.add_argument("--device", type=_device, default=default, help="of torch (%(default)s)")
    parser.add_argument("--output", type=_picture, default="constrained_ops_demo.png", help="picture (%(default)s)")
    parser.set_defaults(run=run)
