"""Whole optimizer steps, in place of ``torch.optim.Adam`` and what holds its parameters in their set.

A run of the projected kind is ``optimizer.step()`` and, for the peers, the projection; one on raw is, for the peers,
transform, backward and ``optimizer.step()``. Gradients change their sign before each sample, so that parameters stay
where they are and nothing fades to denormal numbers.

torch.optim's Adam and ``entmax.sparsemax`` take the Euclidean projection. What ``ProjectedAdam`` does by default is
another and harder one, in Adam's metric; with ``metric="euclidean"`` it does the same, and both are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co

from .harness import COMPILED, OURS, Job, Peer, Shape, Step, optional

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8
AGREEMENT_STEPS = 3  # moments and their corrections differ from the second step on
WHOLE = f"{COMPILED}, whole step"  # Adam written out, and the constraint, in one compiled function
SPARSEMAX = "fused, entmax.sparsemax"
EUCLIDEAN = f"{OURS}, euclidean"
Transform = Callable[[Tensor], Tensor]
Project = Callable[[list[Parameter], torch.optim.Adam], None]


class Inputs(NamedTuple):
    values: list[Tensor]
    grads: list[Tensor]


def stepping(run: Callable[[], object], values: Callable[[], Sequence[Tensor]], grads: list[Tensor]) -> Step:
    def results() -> list[Tensor]:
        for _ in range(AGREEMENT_STEPS):
            run()
        return [value.detach().clone() for value in values()]

    return Step(run, results, before=lambda: torch._foreach_neg_(grads))


def with_gradients(values: list[Tensor], grads: list[Tensor]) -> tuple[list[Parameter], list[Tensor]]:
    """Parameters of their own, and gradients, for one peer."""
    params = [Parameter(value.clone()) for value in values]
    grads = [g.clone() for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params, grads


def ours(kind: type[co.optim.ProjectedAdam | co.optim.ReparametrizedAdam], constraint: object, **options: str) -> Peer:
    def peer(inputs: Inputs) -> Step:
        params, grads = with_gradients(*inputs)
        optimizer = kind(params, lr=LR, constraint=constraint, **options)
        return stepping(optimizer.step, lambda: params, grads)

    return peer


def adam_and(project: Project, **how: bool) -> Peer:
    def peer(inputs: Inputs) -> Step:
        params, grads = with_gradients(*inputs)
        optimizer = torch.optim.Adam(params, lr=LR, **how)

        def run() -> None:
            optimizer.step()
            with torch.no_grad():
                project(params, optimizer)

        return stepping(run, lambda: params, grads)

    return peer


def on_raw(transform: Transform, inverse: Transform, with_compile: bool = False) -> Peer:
    def peer(inputs: Inputs) -> Step:
        raws, grads = [Parameter(inverse(value)) for value in inputs.values], [g.clone() for g in inputs.grads]
        optimizer = torch.optim.Adam(raws, lr=LR, fused=True)
        forward = torch.compile(transform, fullgraph=True) if with_compile else transform

        def run() -> None:
            optimizer.zero_grad()
            torch.autograd.backward([forward(raw) for raw in raws], grads)
            optimizer.step()

        return stepping(run, lambda: [transform(raw) for raw in raws], grads)

    return peer


def written_out(
    grad_of: Callable[[Tensor, Tensor], Tensor], inverse: Transform, bound: Transform, transform: Transform | None
) -> Peer:
    """Adam in plain lines, compiled together with what holds the constraint.

    Args:
        grad_of: (raw, gradient of x) -> gradient of raw.
        bound: of the new raw.
        transform: raw -> x, a fresh one each time; without one x is raw.
    """

    def update(
        raws: list[Tensor], grads: list[Tensor], moments: list[tuple[Tensor, Tensor]], size: Tensor, correction: Tensor
    ) -> list[Tensor]:
        values = []
        for raw, grad_x, (exp_avg, exp_avg_sq) in zip(raws, grads, moments, strict=True):
            g = grad_of(raw, grad_x)
            exp_avg.lerp_(g, 1 - BETA1)
            exp_avg_sq.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            new = bound(raw - size * exp_avg / (exp_avg_sq.sqrt() / correction + EPS))
            if transform:
                values.append(transform(new))
            raw.copy_(new)
        return values

    def peer(inputs: Inputs) -> Step:
        raws, grads = [inverse(value).clone() for value in inputs.values], [g.clone() for g in inputs.grads]
        moments = [(torch.zeros_like(raw), torch.zeros_like(raw)) for raw in raws]
        compiled = torch.compile(update, fullgraph=True, dynamic=False)
        steps = 0

        def run() -> None:
            nonlocal steps
            steps += 1
            # Tensors: for every new float it would compile anew.
            size = torch.tensor(LR / (1 - BETA1**steps))
            compiled(raws, grads, moments, size, torch.tensor(math.sqrt(1 - BETA2**steps)))

        return stepping(run, lambda: [transform(raw) for raw in raws] if transform else raws, grads)

    return peer


# --- Projections ---------------------------------------------------------------------------------------------------


def clamp_each(lower: float, upper: float) -> Project:
    def project(params: list[Parameter], _: torch.optim.Adam) -> None:
        for p in params:
            p.clamp_(lower, upper)

    return project


def clamp_all(lower: float, upper: float) -> Project:
    def project(params: list[Parameter], _: torch.optim.Adam) -> None:
        torch._foreach_clamp_min_(params, lower)
        if upper != math.inf:
            torch._foreach_clamp_max_(params, upper)

    return project


def by(projection: Transform) -> Project:
    def project(params: list[Parameter], _: torch.optim.Adam) -> None:
        for p in params:
            p.copy_(projection(p))

    return project


def sort_in_the_metric(params: list[Parameter], optimizer: torch.optim.Adam) -> None:
    """The projection onto the simplex in Adam's metric, by sorting."""
    for y in params:
        state = optimizer.state[y]
        d = (state["exp_avg_sq"] / (1 - BETA2 ** state["step"])).sqrt() + EPS  # on a GPU the step is there, too
        falling, order = (d * y).sort(-1, descending=True)
        multipliers = (y.gather(-1, order).cumsum(-1) - 1) / d.reciprocal().gather(-1, order).cumsum(-1)
        last = (falling > multipliers).sum(-1, keepdim=True) - 1
        y.copy_((y - multipliers.gather(-1, last) / d).clamp_(min=0))


# --- Sets, and the map onto them -----------------------------------------------------------------------------------


def sigmoid(raw: Tensor) -> Tensor:
    return -1.0 + 3.0 * torch.sigmoid(raw)


def logit(x: Tensor) -> Tensor:
    return torch.logit((x + 1) / 3)


def sigmoid_backward(raw: Tensor, grad: Tensor) -> Tensor:
    s = torch.sigmoid(raw)
    return 3.0 * grad * s * (1 - s)


def softmax(raw: Tensor) -> Tensor:
    return torch.softmax(raw, -1)


def softmax_backward(raw: Tensor, grad: Tensor) -> Tensor:
    x = torch.softmax(raw, -1)
    return x * (grad - (grad * x).sum(-1, keepdim=True))


def as_it_is(x: Tensor) -> Tensor:
    return x


def box_peers(constraint: object, lower: float, upper: float) -> dict[str, Peer]:
    return {
        "fused, clamp_": adam_and(clamp_each(lower, upper), fused=True),
        "foreach, clamp": adam_and(clamp_all(lower, upper), foreach=True),
        WHOLE: written_out(lambda _, grad: grad, as_it_is, lambda x: x.clamp(lower, upper), None),
        OURS: ours(co.optim.ProjectedAdam, constraint),
    }


def raw_peers(constraint: object, transform: Transform, inverse: Transform, backward: Callable) -> dict[str, Peer]:
    return {
        "eager, fused": on_raw(transform, inverse),
        COMPILED: on_raw(transform, inverse, with_compile=True),
        WHOLE: written_out(backward, inverse, as_it_is, transform),
        OURS: ours(co.optim.ReparametrizedAdam, constraint),
    }


def without(peers: dict[str, Peer], peer: str) -> dict[str, Peer]:
    return {name: make for name, make in peers.items() if name != peer}


# --- Jobs ----------------------------------------------------------------------------------------------------------


def tensors(start: Transform, shapes: Sequence[Shape]) -> Inputs:
    values = [start(torch.randn(shape)) for shape in shapes]
    # Away from 0: there a step's direction hangs on the rounding of a gradient.
    return Inputs(values, [torch.randn(shape).sign() * (0.5 + torch.rand(shape)) for shape in shapes])


def one(start: Transform) -> Callable[[Shape], Inputs]:
    return lambda shape: tensors(start, [shape])


def several(start: Transform) -> Callable[[Shape], Inputs]:
    """The first dimension of a shape counts tensors."""
    return lambda shape: tensors(start, [shape[1:]] * shape[0])


def transformer() -> list[Shape]:
    """The shapes of a small model's parameters."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(256, 4, 1024) for _ in range(2)]
        model = nn.ModuleList([nn.Embedding(4096, 256), *layers])
    return [tuple(p.shape) for p in model.parameters()]


def model(start: Transform) -> Callable[[Shape], Inputs]:
    return lambda _: tensors(start, MODEL)


INTERVAL = constraints.interval(-1.0, 2.0)
BOX = box_peers(INTERVAL, -1.0, 2.0)
RAW = raw_peers(INTERVAL, sigmoid, logit, sigmoid_backward)
ORTHANT = box_peers(constraints.nonnegative, 0.0, math.inf)
SIMPLEX: dict[str, Peer] = {"fused, sort": adam_and(sort_in_the_metric, fused=True)}
if entmax := optional("entmax"):
    SIMPLEX[SPARSEMAX] = adam_and(by(entmax.sparsemax), fused=True)
    SIMPLEX[EUCLIDEAN] = ours(co.optim.ProjectedAdam, constraints.simplex, metric="euclidean")
SIMPLEX[OURS] = ours(co.optim.ProjectedAdam, constraints.simplex)
AGREES = {EUCLIDEAN: SPARSEMAX, SPARSEMAX: SPARSEMAX}
SOFTMAX = raw_peers(constraints.simplex, softmax, torch.log, softmax_backward)

MODEL = transformer()
SIZES: list[Shape] = [(2**10,), (2**14,), (2**17,), (2**20,), (2**24,), (2**27,)]
MANY: list[Shape] = [(200, 64), (10_000, 64)]
ROWS: list[Shape] = [(2**18, 4), (2**15, 32), (2**10, 1024), (2**4, 65536)]
WEIGHTS: list[Shape] = [(sum(map(math.prod, MODEL)),)]
ON_PARAM, ON_RAW = (7,), (8,)  # x, g, m, v -> x, m, v;  raw, g, m, v -> raw, x, m, v

LONG_SUMS = 1e-4  # of the agreement: a multiplier is the sum of a row, which a sort adds up in another order

# Written out for hundreds of tensors, Adam compiles for minutes.
FEW, MANY_BOX, MANY_RAW = MANY[:1], without(BOX, WHOLE), without(RAW, WHOLE)
METRIC = "Adam and the projection onto the simplex in its metric"

JOBS = [
    Job("step_box", "Adam in a box", SIZES, one(sigmoid), BOX, ON_PARAM, headline=True),
    Job("step_box_many", "Adam in a box, many tensors", MANY, several(sigmoid), MANY_BOX, ON_PARAM, quick=FEW),
    Job("step_box_model", "Adam in a box, a transformer's parameters", WEIGHTS, model(sigmoid), BOX, ON_PARAM),
    Job("step_orthant", "Adam above 0", SIZES, one(torch.sigmoid), ORTHANT, ON_PARAM),
    Job("step_raw", "Adam on the raw values of an interval", SIZES, one(sigmoid), RAW, ON_RAW, headline=True),
    Job("step_raw_many", "the same, many tensors", MANY, several(sigmoid), MANY_RAW, ON_RAW, quick=FEW),
    Job("step_raw_model", "the same, a transformer's parameters", WEIGHTS, model(sigmoid), RAW, ON_RAW),
    Job("step_simplex", METRIC, ROWS, one(softmax), SIMPLEX, ON_PARAM, AGREES, LONG_SUMS),
    Job(
        "step_simplex_many",
        "the same, many tensors",
        MANY,
        several(softmax),
        SIMPLEX,
        ON_PARAM,
        AGREES,
        LONG_SUMS,
        quick=FEW,
    ),
    Job("step_softmax", "Adam on the raw values of a softmax", ROWS, one(softmax), SOFTMAX, ON_RAW),
]
