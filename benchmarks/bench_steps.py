"""Whole optimizer steps, in place of ``torch.optim.Adam`` and what holds its parameters in their set.

A step of the projected kind is ``optimizer.step()`` and, for the peers, the projection; one on raw is, for the peers,
transform, backward and ``optimizer.step()``. Gradients are there before and stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co

from .harness import COMPILED, OURS, Job, Shape, Step, assert_close, copy_step

LR = 1e-2
Transform = Callable[[Tensor], Tensor]
# (values, gradients) -> a step, which returns the parameters
Peer = Callable[[list[Tensor], list[Tensor]], Step]


def with_gradients(values: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    params = [Parameter(value.clone()) for value in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def ours(kind: type[co.optim.ProjectedAdam | co.optim.ReparametrizedAdam], constraint: object) -> Peer:
    def peer(values: list[Tensor], grads: list[Tensor]) -> Step:
        params = with_gradients(values, grads)
        optimizer = kind(params, lr=LR, constraint=constraint)

        def step() -> tuple[Tensor, ...]:
            optimizer.step()
            return tuple(params)

        return step

    return peer


def adam_and(project: Callable[[list[Parameter], torch.optim.Adam], None], **how: bool) -> Peer:
    def peer(values: list[Tensor], grads: list[Tensor]) -> Step:
        params = with_gradients(values, grads)
        optimizer = torch.optim.Adam(params, lr=LR, **how)

        def step() -> tuple[Tensor, ...]:
            optimizer.step()
            with torch.no_grad():
                project(params, optimizer)
            return tuple(params)

        return step

    return peer


def on_raw(transform: Transform, inverse: Transform) -> Peer:
    def peer(values: list[Tensor], grads: list[Tensor]) -> Step:
        raws = [Parameter(inverse(value)) for value in values]
        optimizer = torch.optim.Adam(raws, lr=LR, fused=True)

        def step() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            for raw, g in zip(raws, grads, strict=True):
                transform(raw).backward(g)
            optimizer.step()
            return tuple(raws)

        step.value_of = transform
        return step

    return peer


def clamp_each(lower: float, upper: float) -> Callable[[list[Parameter], torch.optim.Adam], None]:
    def project(params: list[Parameter], _: torch.optim.Adam) -> None:
        for p in params:
            p.clamp_(lower, upper)

    return project


def clamp_all(lower: float, upper: float) -> Callable[[list[Parameter], torch.optim.Adam], None]:
    def project(params: list[Parameter], _: torch.optim.Adam) -> None:
        torch._foreach_clamp_min_(params, lower)
        if upper != math.inf:
            torch._foreach_clamp_max_(params, upper)

    return project


def sort_in_the_metric(params: list[Parameter], optimizer: torch.optim.Adam) -> None:
    """The projection onto the simplex in Adam's metric, by sorting."""
    for y in params:
        state = optimizer.state[y]
        d = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8  # on a GPU the step is there, too
        falling, order = (d * y).sort(-1, descending=True)
        multipliers = (y.gather(-1, order).cumsum(-1) - 1) / d.reciprocal().gather(-1, order).cumsum(-1)
        last = (falling > multipliers).sum(-1, keepdim=True) - 1
        y.copy_((y - multipliers.gather(-1, last) / d).clamp_(min=0))


@dataclass(frozen=True)
class StepJob:
    """As :class:`.harness.Job`. Of ``several`` the first dimension of a shape counts tensors."""

    name: str
    about: str
    shapes: Sequence[Shape]
    peers: Mapping[str, Peer]
    moved: Sequence[int]
    start: Callable[[Tensor], Tensor] = torch.sigmoid
    several: bool = False
    grows: int = 0

    chosen_shapes = Job.chosen_shapes

    def steps(self, shape: Shape, device: str, with_compile: bool) -> dict[str, Step]:
        """The steps of all peers, agreement asserted, and of the copy."""
        torch.manual_seed(0)
        with torch.device(device):
            each = shape[1:] if self.several else shape
            values = [self.start(torch.randn(each)) for _ in range(shape[0] if self.several else 1)]
            # Away from 0: there a step's direction hangs on the rounding of a gradient.
            grads = [torch.randn(each).sign() * (0.5 + torch.rand(each)) for _ in values]
        steps = {peer: make(values, grads) for peer, make in self.peers.items() if with_compile or peer != COMPILED}
        torch.compiler.reset()
        first, *others = steps
        wanted = values_after(steps[first])
        for peer in others:
            for got, want in zip(values_after(steps[peer]), wanted, strict=True):
                assert_close(f"{self.name} {shape}: {peer} and {first} differ\n", got, want)
        return {**steps, "copy_": copy_step(self, torch.ones(shape, device=device))}


def values_after(step: Step) -> list[Tensor]:
    value_of = getattr(step, "value_of", lambda t: t)
    return [value_of(t.detach()).clone() for t in step()]


def sigmoid(raw: Tensor) -> Tensor:
    return -1.0 + 3.0 * torch.sigmoid(raw)


def softmax(raw: Tensor) -> Tensor:
    return torch.softmax(raw, -1)


def between(raw: Tensor) -> Tensor:
    return 3 * torch.sigmoid(raw) - 1


def box_peers(constraint: object, lower: float, upper: float) -> dict[str, Peer]:
    return {
        "fused, clamp_": adam_and(clamp_each(lower, upper), fused=True),
        "foreach, clamp": adam_and(clamp_all(lower, upper), foreach=True),
        OURS: ours(co.optim.ProjectedAdam, constraint),
    }


def raw_peers(constraint: object, transform: Transform, inverse: Transform) -> dict[str, Peer]:
    compiled = torch.compile(transform, fullgraph=True)
    return {
        "eager, fused": on_raw(transform, inverse),
        COMPILED: on_raw(compiled, inverse),
        OURS: ours(co.optim.ReparametrizedAdam, constraint),
    }


BOX = box_peers(constraints.interval(-1.0, 2.0), -1.0, 2.0)
RAW = raw_peers(constraints.interval(-1.0, 2.0), sigmoid, lambda x: torch.logit((x + 1) / 3))
SIZES: list[Shape] = [(1024,), (2**20,), (2**24,)]
MANY: list[Shape] = [(200, 64)]
ROWS: list[Shape] = [(2**18, 4), (2**15, 32), (2**10, 1024)]
ON_PARAM, ON_RAW = (7,), (8,)  # x, g, m, v -> x, m, v;  raw, g, m, v -> raw, x, m, v

JOBS = [
    StepJob("step_box", "Adam in a box", SIZES, BOX, ON_PARAM, between),
    StepJob("step_box_many", "Adam in a box, 200 tensors", MANY, BOX, ON_PARAM, between, several=True),
    StepJob("step_orthant", "Adam above 0", SIZES, box_peers(constraints.nonnegative, 0.0, math.inf), ON_PARAM),
    StepJob("step_raw", "Adam on the raw values of an interval", SIZES, RAW, ON_RAW, between),
    StepJob("step_raw_many", "the same, 200 tensors", MANY, RAW, ON_RAW, between, several=True),
    StepJob(
        "step_simplex",
        "Adam and the projection onto the simplex in its metric",
        ROWS,
        {
            "fused, sort": adam_and(sort_in_the_metric, fused=True),
            OURS: ours(co.optim.ProjectedAdam, constraints.simplex),
        },
        ON_PARAM,
        softmax,
    ),
    StepJob(
        "step_softmax",
        "Adam on the raw values of a softmax",
        ROWS,
        raw_peers(constraints.simplex, softmax, torch.log),
        ON_RAW,
        softmax,
    ),
]
