"""Compare peers that compute the same: first assert that they agree, then time them side by side.

A sample is as many runs in a row as last 2 ms; peers take their samples in turns, in a random order each round, so that
whatever slows the machine down for a while slows all of them. The ceiling runs among them: ``copy_`` of the bytes that
every pass must read and write at the least, into memory that is already there. As in training, gradients are set to
None, all outputs are freshly allocated, and what an optimizer is given has just been written.

On a GPU time is taken by events on the stream, which sees the gaps between small kernels as training does. Shapes of a
million numbers and more are larger there than on a CPU, so that what a run moves does not fit into the L2 cache; where
it does, a column says so.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

OURS, COMPILED, COPY, LIGER = "constrained_ops", "torch.compile", "copy_", "liger_kernel"
SAMPLE_SECONDS = 2e-3
QUICK_LARGEST = 2**20
LARGEST = {"cpu": 2**24, "cuda": 2**28}  # numbers in one tensor, unless asked for more
GPU_FACTOR = 64  # how much larger large shapes are on a GPU
NUMBERS = 2**20  # in all rows together
LENGTHS = (2, 3, 4, 5, 8, 12, 16, 20, 32, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

Shape = tuple[int, ...]
Function = Callable[..., Tensor]


class Step(NamedTuple):
    """What one peer does, on inputs that it holds."""

    run: Callable[[], Any]  # what is timed
    results: Callable[[], Sequence[Tensor]]  # runs it, and gives what peers must agree on
    before: Callable[[], Any] = lambda: None  # before each sample, and not timed


Peer = Callable[[Any], Step]  # of a job's inputs


class Timing(NamedTuple):
    """Seconds per run."""

    quartile1: float
    median: float
    quartile3: float
    repeats: int  # runs per sample
    samples: int


class Effort(NamedTuple):
    """How many samples of each peer: as many as the seconds for a case allow, between two bounds."""

    least: int
    most: int
    seconds: float


QUICK, FULL = Effort(5, 9, 0.5), Effort(7, 51, 6.0)

MISSING: list[str] = []


def optional(module: str) -> ModuleType | None:
    """A module whose package need not be installed; a run says which ones are missing."""
    try:
        return import_module(module)
    except ImportError:
        MISSING.append(module.partition(".")[0])
        return None


def rows(lengths: Sequence[int]) -> list[Shape]:
    """Shapes from many short rows to few long ones."""
    return [(NUMBERS // length, length) for length in lengths]


def on_gpu(shape: Shape, grows: int) -> Shape:
    """A shape beyond the L2 cache, longer in the dimension ``grows``."""
    numbers = math.prod(shape)
    factor = max(1, min(GPU_FACTOR, LARGEST["cuda"] // numbers)) if numbers >= QUICK_LARGEST else 1
    return *shape[:grows], shape[grows] * factor, *shape[grows + 1 :]


@dataclass(frozen=True)
class Job:
    """One comparison, at several shapes."""

    name: str
    about: str
    shapes: Sequence[Shape]  # from small to large
    inputs: Callable[[Shape], Any]
    peers: Mapping[str, Peer]
    moved: Sequence[int]  # per pass: how many tensors of this shape it must read and write
    agrees: Mapping[str, str] = field(default_factory=dict)  # with which other; if not told, with the first
    atol: float = 1e-6  # of what must agree, as a share of its largest
    grows: int = 0  # the dimension that is larger on a GPU
    quick: Sequence[Shape] | None = None  # in place of the first and the last of moderate size
    headline: bool = False  # torch.compile is among its peers in a quick run, too

    def chosen_shapes(self, quick: bool, device: str, largest: int | None = None) -> list[Shape]:
        """Those of up to ``largest`` numbers; for a quick run few of them."""
        moderate = [shape for shape in self.shapes if math.prod(shape) <= QUICK_LARGEST]
        shapes = (self.quick or moderate[:1] + moderate[1:][-1:]) if quick else self.shapes
        largest = largest or LARGEST[device]
        grown = [on_gpu(shape, self.grows) if device == "cuda" else shape for shape in shapes]
        return [shape for shape in dict.fromkeys(grown) if math.prod(shape) <= largest]

    def steps(
        self, shape: Shape, device: str, with_compile: bool = True, only: Sequence[str] | None = None
    ) -> dict[str, Step]:
        """The steps of all peers or of some and ours, agreement asserted, and of the copy."""
        first = next(iter(self.peers))
        there = {
            peer: make
            for peer, make in self.peers.items()
            if (with_compile or not peer.startswith(COMPILED)) and (device == "cuda" or peer != LIGER)
        }
        timed = [peer for peer in there if only is None or peer in only or peer == OURS]
        needed = {*timed, *(self.agrees.get(peer, first) for peer in timed)}
        torch.manual_seed(0)
        torch.compiler.reset()  # every shape is compiled for itself, and none counts towards the recompilation limit
        with torch.device(device):
            inputs = self.inputs(shape)
        steps = {peer: make(inputs) for peer, make in there.items() if peer in needed}
        results = self._results(shape, steps)
        for peer, got in results.items():
            reference = self.agrees.get(peer, first)
            for a, b in zip(got, results[reference], strict=True):
                assert_close(f"{self.name} {shape}: {peer} and {reference} differ\n", a, b, self.atol)
        timed = [peer for peer in timed if peer in results]
        return {**{peer: steps[peer] for peer in timed}, COPY: copy_step(self.moved, torch.ones(shape, device=device))}

    def _results(self, shape: Shape, steps: Mapping[str, Step]) -> dict[str, Sequence[Tensor]]:
        """Of all peers but those on which the compiler fails, which is told."""
        results = {}
        for peer, step in steps.items():
            try:
                results[peer] = step.results()
            except Exception as error:
                if not peer.startswith(COMPILED):
                    raise
                message = str(error).strip().partition("\n")[0]
                warnings.warn(f"{self.name} {shape}: {peer} is left out: {message}", stacklevel=3)
        return results


def assert_close(who: str, got: Tensor, want: Tensor, atol: float) -> None:
    atol *= float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol, msg=lambda text: who + text)


def copy_step(moved: Sequence[int], like: Tensor) -> Step:
    # Ones and not empty: pages that nobody has written to are one and the same page of zeros, and always in cache.
    sources = [like.new_ones(math.ceil(like.numel() * tensors / 2)) for tensors in moved]
    targets = [torch.ones_like(source) for source in sources]

    def run() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return Step(run, list)


# --- Transforms ----------------------------------------------------------------------------------------------------

ORDERS = (
    ("_forward", "forward alone, without a graph"),
    ("", "forward + backward"),
    ("_second_order", "forward + backward with create_graph + backward of the gradient"),
)


def one_leaf(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape)]


def passes(order: int, function: Function) -> Peer:
    """``function`` of a job's leaves, differentiated ``order`` times."""

    def peer(inputs: tuple[list[Tensor], list[Tensor]]) -> Step:
        leaves, grads = inputs
        raw = leaves[0]

        def forward() -> tuple[Tensor, ...]:
            return (function(*leaves),)

        def first_order() -> tuple[Tensor, ...]:
            for leaf in leaves:
                leaf.grad = None
            x = function(*leaves)
            x.backward(grads[0])
            return (x,)

        def second_order() -> tuple[Tensor, ...]:
            raw.grad = None
            x = function(raw)
            (grad_raw,) = torch.autograd.grad(x, raw, grads[0], create_graph=True)
            grad_raw.backward(grads[1])
            return x, grad_raw

        run = (forward, first_order, second_order)[order]

        def results() -> list[Tensor]:
            values = [value.detach() for value in run()]
            return values + [leaf.grad for leaf in leaves if leaf.grad is not None]

        return Step(run, results)

    return peer


def compiled(order: int, function: Function) -> Peer:
    return lambda inputs: passes(order, torch.compile(function, fullgraph=True, dynamic=False))(inputs)


def transform(
    order: int,
    name: str,
    about: str,
    shapes: Sequence[Shape],
    functions: Mapping[str, Function],
    moved: Sequence[int],
    leaves: Callable[[Shape], list[Tensor]] = one_leaf,
    with_compile: bool = True,
    **options: Any,
) -> Job:
    """A job that differentiates transforms ``order`` times: 0, 1 or 2.

    Args:
        functions: leaves -> x. The first one is compiled, too, but to second order, which torch.compile has not.
        moved: tensors that the passes read and write: forward, backward, its backward; at least ``order + 1``.
        leaves: of a shape of x.
    """

    def inputs(shape: Shape) -> tuple[list[Tensor], list[Tensor]]:
        raw, *others = [t.requires_grad_(order > 0) for t in leaves(shape)]
        return [raw, *others], [torch.randn(shape), torch.randn_like(raw, requires_grad=False)][:order]

    suffix, what = ORDERS[order]
    peers = {peer: passes(order, function) for peer, function in functions.items()}
    if with_compile and order < 2:
        first = next(iter(functions))
        peers = {first: peers.pop(first), COMPILED: compiled(order, functions[first]), **peers}
    return Job(name + suffix, f"{about}, {what}", shapes, inputs, peers, moved[: order + 1], **options)


# --- Time ----------------------------------------------------------------------------------------------------------


def seconds_for(run: Callable[[], Any], repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def repeats_for(step: Step, device: str) -> int:
    """Runs that last as long as a sample should, three times out of three."""
    repeats = 1
    while any(seconds_for(step.run, repeats, device) < SAMPLE_SECONDS for _ in range(3)):
        repeats *= 2
    return repeats


def measure(steps: Mapping[str, Step], device: str, effort: Effort) -> dict[str, Timing]:
    repeats = {peer: repeats_for(step, device) for peer, step in steps.items()}
    samples: dict[str, list[float]] = {peer: [] for peer in steps}
    order, shuffled = list(steps), random.Random(0)

    def take_a_round() -> None:
        shuffled.shuffle(order)
        for peer in order:
            steps[peer].before()
            samples[peer].append(seconds_for(steps[peer].run, repeats[peer], device) / repeats[peer])

    begin = time.perf_counter()
    take_a_round()
    rounds = int(effort.seconds / (time.perf_counter() - begin))
    rounds = min(max(rounds, effort.least), effort.most)
    warm_up = rounds // 10 + 1
    for _ in range(warm_up - 1 + rounds):
        take_a_round()
    quartiles = {peer: statistics.quantiles(s[warm_up:], n=4, method="inclusive") for peer, s in samples.items()}
    return {peer: Timing(*quartiles[peer], repeats[peer], rounds) for peer in steps}
