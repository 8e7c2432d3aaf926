"""Hypothesis over steps of both optimizers: the compiled CPU library against the reference, and wrong input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drawn import (
    INF,
    NAN,
    agree,
    any_magnitude,
    both_bounds,
    contiguous,
    dtypes,
    fuzz,
    layouts,
    ordinary,
    permuted,
    row_shapes,
    seeds,
    sliced,
    special,
    stays,
    unaligned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops import _library
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

pytestmark = pytest.mark.skipif(not _library.has_cpu_library, reason="the compiled library is missing")


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Tensor, Any]:
    """A start, and a constraint that it fulfils."""
    shape, dtype, layout = (
        draw(row_shapes),
        draw(dtypes),
        draw(st.sampled_from([contiguous, permuted, sliced, unaligned])),
    )
    g = torch.Generator().manual_seed(draw(seeds))
    start = torch.rand(shape, generator=g, dtype=torch.float64)
    kind = draw(st.sampled_from(["none", "interval", "lower", "upper", "tensors", "exp", "simplex", "tiny", "huge"]))
    huge = 1e4 if dtype == torch.float16 else 1e30
    if kind == "simplex":
        dim = draw(st.integers(0, 3)) % len(shape) if shape else 0
        start = torch.softmax(start * 3, dim) if shape else torch.ones(())
        return layout(start.to(dtype)), co.Simplex(dim)
    if kind == "tensors":
        ends = [torch.where(torch.rand(shape, generator=g) < 0.3, INF, 2.0 + i) for i in range(2)]
        return layout(start.to(dtype)), co.Bounded(-ends[0], ends[1])
    given = {
        "none": None,
        "interval": co.Bounded(-0.5, 1.5),
        "lower": co.Positive(-1.0),
        "upper": co.Bounded(-INF, 1.25),
        "exp": co.Positive(-1.0, kind="exp"),
        "tiny": co.Bounded(-1e-3, 1e-3),
        "huge": co.Bounded(-huge, huge),
    }
    start = start * {"tiny": 1e-3, "huge": huge / 2}.get(kind, 1.0)
    return layout(start.to(dtype)), given[kind]


options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled_weight_decay": st.booleans(),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
gradients = st.tuples(layouts, st.sampled_from([ordinary, ordinary, any_magnitude, special]), seeds) | st.none()


def pair_of(kind: type[Any], chosen: list[tuple[Tensor, Any]], groups: list[dict[str, Any]]) -> list[Any]:
    """Two optimizers over equal parameters."""
    return [
        kind(
            [
                {"params": [Parameter(start.clone())], "constraint": given, **o}
                for (start, given), o in zip(chosen, groups, strict=True)
            ]
        )
        for _ in range(2)
    ]


def leaves(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: Any) -> list[Tensor]:
    state = [t for p in leaves(optimizer) for t in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*leaves(optimizer), *state)]


def in_its_set(p: Tensor, given: Any, strictly: bool, total: float = 1.0) -> Tensor:
    """Where p is in its constraint; NaN is not."""
    x = p.detach()
    if given is None:
        return ~x.isnan()
    record = given.record()
    if isinstance(given, co.Simplex):
        rows = x.double().sum(record.dim, keepdim=True) if x.dim() else x.double()
        return (x > 0 if strictly else x >= 0) & ((rows - total).abs() <= 1e-5 + 8 * torch.finfo(x.dtype).eps)
    low, high = both_bounds(x, record.lower, record.upper)
    if strictly:
        return (x > low) & (x < high)
    return (x >= low.to(x.dtype)) & (x <= high.to(x.dtype))


@settings(fuzz, max_examples=150)
@given(
    st.sampled_from([ProjectedAdam, ReparametrizedAdam]),
    st.lists(st.tuples(parameters(), options, st.tuples(gradients, gradients)), min_size=1, max_size=4),
    st.sampled_from([None, "sparse", "state", "outside"]),
    st.integers(0, 3),
)
def test_optimizers(kind: type[Any], drawn: list[Any], fault: str | None, at: int) -> None:
    chosen, groups = [each[0] for each in drawn], [each[1] for each in drawn]
    pair = pair_of(kind, chosen, groups)
    at %= len(drawn)
    clean = [True] * len(drawn)  # whether all gradients so far were ordinary numbers
    for t in range(2):
        grads = []
        for i, (start, _) in enumerate(chosen):
            how = drawn[i][2][t]
            if how is None:
                grads.append(None)
                continue
            layout, number, seed = how
            clean[i] &= number is ordinary
            grads.append(layout(number(tuple(start.shape), torch.Generator().manual_seed(seed)).to(start.dtype)))
        untouched = [stays(g) for g in grads if g is not None]
        before = [p.detach().clone() for p in leaves(pair[0])]
        for backend, optimizer in zip(("cpu", "reference"), pair, strict=True):
            for p, g in zip(leaves(optimizer), grads, strict=True):
                p.grad = g
            with co.backend(backend):
                optimizer.step()
        assert all(check() for check in untouched)
        for i, (p, q) in enumerate(zip(*map(leaves, pair), strict=True)):
            given = chosen[i][1]
            if grads[i] is None:
                assert torch.equal(p.nan_to_num(7.5), before[i].nan_to_num(7.5))
            if clean[i] and (grads[i] is not None or t == 0):
                held = in_its_set(p, given, kind is ReparametrizedAdam and grads[i] is not None)
                assert held.all(), (p, given)
                scale = 1.0
                if isinstance(given, co.Bounded) and all(isinstance(b, float) for b in (given.lower, given.upper)):
                    scale = max((abs(b) for b in (given.lower, given.upper) if math.isfinite(b)), default=1.0)
                sixteen = torch.finfo(p.dtype).bits == 16
                loose = 64 * torch.finfo(p.dtype).eps * (1 if sixteen else 64)
                tolerance = loose * (q.detach().double().abs() + scale + groups[i]["lr"])
                agree(p.detach(), q.detach(), tolerance, f"{kind.__name__}, {given}")

    optimizer = pair[0]
    p, given = leaves(optimizer)[at], chosen[at][1]
    for q in leaves(optimizer):
        q.grad = torch.ones_like(q)
    error: type[Exception] = ValueError
    if fault == "sparse" and p.dim():
        p.grad, error = torch.ones(p.shape, dtype=p.dtype).to_sparse(), RuntimeError
    elif fault == "state" and optimizer.state.get(p):
        optimizer.state[p]["exp_avg"] = torch.zeros(7, 1, 1, 1, 1, 1)
    elif fault == "outside" and kind is ReparametrizedAdam and given is not None:
        with torch.no_grad():
            p.fill_(NAN)
    else:
        return
    saved = everything(optimizer)
    with co.backend("cpu"), pytest.raises(error):
        optimizer.step()
    assert all(
        torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(saved, everything(optimizer), strict=True)
    )
