"""Compare peers that compute the same: first assert that they agree, then time them side by side.

One step of a peer is what training does: gradients set to None, forward, backward, all outputs freshly allocated.
A sample is as many steps in a row as last 2 ms; peers take their samples in turns, in a random order each round, so
that whatever slows the machine down for a while slows all of them. The ceiling runs among them: ``copy_`` of the bytes
that every pass must read and write at the least, into memory that is already there.

On a GPU time is taken by events on the stream, which sees the gaps between small kernels as training does. Shapes of a
million numbers and more are larger there than on a CPU, so that what a step moves does not fit into the L2 cache; where
it does, a column says so.
"""

from __future__ import annotations

import csv
import math
import platform
import random
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

import constrained_ops as co

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

OURS, COMPILED, COPY = "constrained_ops", "torch.compile", "copy_"
SAMPLE_SECONDS = 2e-3
QUICK_LARGEST = 2**20
GPU_FACTOR, GPU_LARGEST = 64, 2**28  # how much larger large shapes are on a GPU, and the most numbers in one

Shape = tuple[int, ...]
Step = Callable[[], tuple[Tensor, ...]]


def one_leaf(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape)]


def on_gpu(shape: Shape, grows: int) -> Shape:
    numbers = math.prod(shape)
    factor = min(GPU_FACTOR, GPU_LARGEST // numbers) if numbers >= QUICK_LARGEST else 1
    return *shape[:grows], shape[grows] * factor, *shape[grows + 1 :]


@dataclass(frozen=True)
class Job:
    """One comparison, at several shapes."""

    name: str
    about: str
    shapes: Sequence[Shape]  # from small to large
    peers: Mapping[str, Callable[..., Tensor]]  # leaves -> x; OURS must be one of them
    moved: Sequence[int]  # per pass: how many tensors of this shape it must read and write
    leaves: Callable[[Shape], list[Tensor]] = one_leaf
    reference: str = "eager"  # the peer that the others must agree with, and that torch.compile compiles
    order: int = 1  # 2: backward through the gradient, which torch.compile cannot differentiate
    grows: int = 0  # the dimension that is larger on a GPU

    def chosen_shapes(self, quick: bool, device: str) -> list[Shape]:
        """All shapes, or for a quick run the first and the last of moderate size."""
        moderate = [shape for shape in self.shapes if math.prod(shape) <= QUICK_LARGEST]
        shapes = moderate[:1] + moderate[1:][-1:] if quick else list(self.shapes)
        return [on_gpu(shape, self.grows) for shape in shapes] if device == "cuda" else shapes

    def steps(self, shape: Shape, device: str, with_compile: bool) -> dict[str, Step]:
        return steps_of(self, shape, device, with_compile)


class Timing(NamedTuple):
    """Seconds per step."""

    quartile1: float
    median: float
    quartile3: float
    repeats: int  # steps per sample


# --- Steps ---------------------------------------------------------------------------------------------------------


def training_step(order: int, function: Callable[..., Tensor], leaves: list[Tensor], grads: list[Tensor]) -> Step:
    def first_order() -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        x = function(*leaves)
        x.backward(grads[0])
        return (x,)

    def second_order() -> tuple[Tensor, ...]:
        (raw,) = leaves
        raw.grad = None
        x = function(raw)
        (grad_raw,) = torch.autograd.grad(x, raw, grads[0], create_graph=True)
        grad_raw.backward(grads[1])
        return x, grad_raw

    return first_order if order == 1 else second_order


def copy_step(job: Job, like: Tensor) -> Step:
    # Ones and not empty: pages that nobody has written to are one and the same page of zeros, and always in cache.
    sources = [like.new_ones(math.ceil(like.numel() * tensors / 2)) for tensors in job.moved]
    targets = [torch.ones_like(source) for source in sources]

    def step() -> tuple[Tensor, ...]:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return ()

    return step


def assert_close(who: str, got: Tensor, want: Tensor) -> None:
    atol = 1e-6 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=atol, msg=lambda text: who + text)


def assert_agreement(job: Job, steps: Mapping[str, Step], leaves: list[Tensor]) -> None:
    """Values and gradients of all peers are the reference's, to rounding."""

    def results(step: Step) -> list[Tensor]:
        return [*(value.detach() for value in step()), *(leaf.grad for leaf in leaves)]

    wanted = results(steps[job.reference])
    for peer, step in steps.items():
        who = f"{job.name} {tuple(leaves[0].shape)}: {peer} and {job.reference} differ\n"
        for got, want in zip(results(step), wanted, strict=True):
            assert_close(who, got, want)


def steps_of(job: Job, shape: Shape, device: str, with_compile: bool) -> dict[str, Step]:
    """The steps of all peers, agreement asserted, and of the copy."""
    torch.manual_seed(0)
    with torch.device(device):
        leaves = [leaf.requires_grad_() for leaf in job.leaves(shape)]
        grads = [torch.randn(shape) for _ in range(job.order)]
    peers = dict(job.peers)
    if with_compile and job.order == 1:
        torch.compiler.reset()  # every shape is compiled for itself, and none counts towards the recompilation limit
        compiled = torch.compile(job.peers[job.reference], fullgraph=True, dynamic=False)
        peers = {job.reference: peers.pop(job.reference), COMPILED: compiled, **peers}
    steps = {peer: training_step(job.order, function, leaves, grads) for peer, function in peers.items()}
    assert_agreement(job, steps, leaves)
    return {**steps, COPY: copy_step(job, grads[0])}


# --- Time ----------------------------------------------------------------------------------------------------------


def seconds_for(step: Step, repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return time.perf_counter() - begin


def repeats_for(step: Step, device: str) -> int:
    repeats = 1
    while min(seconds_for(step, repeats, device) for _ in range(3)) < SAMPLE_SECONDS:
        repeats *= 2
    return repeats


def measure(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, Timing]:
    repeats = {peer: repeats_for(step, device) for peer, step in steps.items()}
    samples: dict[str, list[float]] = {peer: [] for peer in steps}
    warm_up, order, shuffled = rounds // 10 + 1, list(steps), random.Random(0)
    for _ in range(warm_up + rounds):
        shuffled.shuffle(order)
        for peer in order:
            samples[peer].append(seconds_for(steps[peer], repeats[peer], device) / repeats[peer])
    quartiles = {peer: statistics.quantiles(s[warm_up:], n=4, method="inclusive") for peer, s in samples.items()}
    return {peer: Timing(*quartiles[peer], repeats[peer]) for peer in steps}


# --- Reports -------------------------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """The GPU's name, or the CPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def l2_cache(device: str) -> int:
    """Its bytes; 0 on a CPU."""
    return torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 0


def rows_of(job: Job, shape: Shape, timings: Mapping[str, Timing], device: str, rounds: int) -> list[dict[str, Any]]:
    moved = 4 * sum(job.moved) * math.prod(shape)
    return [
        {
            "job": job.name,
            "shape": "x".join(map(str, shape)),
            "peer": peer,
            "median_us": round(1e6 * timing.median, 3),
            "quartile1_us": round(1e6 * timing.quartile1, 3),
            "quartile3_us": round(1e6 * timing.quartile3, 3),
            "peer_to_ours": round(timing.median / timings[OURS].median, 4),
            "share_of_copy": round(timings[COPY].median / timing.median, 4),
            "moved_bytes": moved,
            "gb_per_s": round(moved / timing.median / 1e9, 2),
            "fits_in_l2": moved < l2_cache(device),
            "samples": rounds,
            "steps_per_sample": timing.repeats,
        }
        for peer, timing in timings.items()
    ]


HEADING = f"{'shape':>13}  {'peer':<16}{'median us':>12}{'quartiles us':>23}{'peer / ours':>13}{'share of copy':>15}"


def line_of(row: Mapping[str, Any]) -> str:
    quartiles = f"{row['quartile1_us']:,.1f} - {row['quartile3_us']:,.1f}"
    times = f"{row['median_us']:>12,.1f}{quartiles:>23}"
    return f"{row['shape']:>13}  {row['peer']:<16}{times}{row['peer_to_ours']:>12.2f}x{row['share_of_copy']:>15.1%}"


def progress(cases: Sequence[tuple[Job, Shape]]) -> Iterator[tuple[Job, Shape]]:
    bar = tqdm(cases, unit="case", disable=None) if tqdm else cases
    for i, (job, shape) in enumerate(bar):
        if tqdm:
            bar.set_description(f"{job.name} {shape}")
        else:
            print(f"[{i + 1}/{len(cases)}] {job.name} {shape}", file=sys.stderr, flush=True)
        yield job, shape


def run(
    jobs: Sequence[Job], device: str, quick: bool, with_compile: bool, file: TextIO, seconds: float = math.inf
) -> int:
    """Run the jobs; print a table for each, and write ``file`` as comma-separated values.

    After ``seconds`` no other case is begun. Returns how many cases failed, which does not keep others from running.
    """
    say = tqdm.write if tqdm else print
    end, failed, left_out = time.monotonic() + seconds, 0, 0
    info, rounds = co.build_info(), 9 if quick else 51
    facts = {"machine": machine(device), "backend": info["backends"][device], "threads": torch.get_num_threads()}
    facts |= {"torch": info["torch"], "constrained_ops": info["version"]}
    facts |= {"l2_bytes": l2_cache(device)} if device == "cuda" else {}
    say(", ".join(f"{name} {value}" for name, value in facts.items()))
    if facts["backend"] == "reference":
        say(f"warning: no compiled kernels beside {co.__file__}: constrained_ops is plain PyTorch here")
    cases = [(job, shape) for job in jobs for shape in job.chosen_shapes(quick, device)]
    writer = headed = None
    for job, shape in progress(cases):
        if time.monotonic() > end:
            left_out += 1
            continue
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            timings = measure(job.steps(shape, device, with_compile), device, rounds)
        except Exception:  # the GPU's memory may be too small for one, a compiler may fail
            say(f"\n{job.name} {shape} failed\n{traceback.format_exc()}")
            failed += 1
            continue
        if headed is not job:
            say(f"\n{job.name}: {job.about}\n{HEADING}")
            headed = job
        rows = rows_of(job, shape, timings, device, rounds)
        say("\n".join(map(line_of, rows)))
        if writer is None:
            writer = csv.DictWriter(file, [*facts, *rows[0]])
            writer.writeheader()
        writer.writerows({**facts, **row} for row in rows)
        file.flush()
        sys.stdout.flush()
    if left_out:
        say(f"\n{left_out} of {len(cases)} cases were left out after {seconds:.0f} s")
    return failed
