"""Steps along rows that the CPU does not copy, one at a time against an oracle in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adam import Adam, project_by_sorting
from conftest import implementations
from test_optim import assert_optimal, close
from torch import Tensor
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam
from constrained_ops.optim._reference import FLOOR

pytestmark = [
    pytest.mark.parametrize("backend", [each for each in implementations() if each.id == "cpu"], indirect=True),
    pytest.mark.usefixtures("backend"),
]
LONGEST_COPIED = 2**17  # csrc/cpu/step.h
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CASES: dict[str, tuple[tuple[int, ...], int, torch.dtype, torch.dtype]] = {  # dimension of rows, dtype, that of state
    "just too long": ((2, LONGEST_COPIED + 1), 1, F32, F32),
    "float64": ((2, LONGEST_COPIED + 1), 1, F64, F64),
    "bfloat16": ((2, LONGEST_COPIED + 1), 1, BF16, F32),
    "all in bfloat16": ((2, LONGEST_COPIED + 1), 1, BF16, BF16),
    "a million": ((1_000_000,), 0, F32, F32),
    "three side by side": ((300_001, 3), 0, F32, F32),
    "three of bfloat16": ((300_001, 3), 0, BF16, F32),
    "more than go together": ((LONGEST_COPIED + 511, 17), 0, F32, F32),
    "in between": ((2, LONGEST_COPIED + 64, 2), 1, F64, F64),
    "in between, all in bfloat16": ((2, LONGEST_COPIED + 64, 2), 1, BF16, BF16),
}


def rows(t: Tensor, dim: int) -> Tensor:
    return t.detach().movedim(dim, -1)


def with_grad(p: Parameter, dim: int, scale: float = 1.0, one_way: bool = False) -> Tensor:
    """Of all sizes and, in the second half of a row, below the floor of the metric."""
    g = torch.randn(p.shape) * torch.exp(2 * torch.randn(p.shape)) * scale
    g = g.abs() if one_way else g
    half = rows(g, dim).shape[-1] // 2
    rows(g, dim)[..., half:] *= 1e-5
    p.grad = g.to(p.dtype)
    return rows(p.grad, dim)


def take_moments(oracle: Adam, state: dict[str, Tensor], dim: int) -> None:
    oracle.m, oracle.v = (rows(state[name], dim).double() for name in ("exp_avg", "exp_avg_sq"))
    if oracle.amsgrad:
        oracle.v_max = rows(state["max_exp_avg_sq"], dim).double()


def check_moments(oracle: Adam, state: dict[str, Tensor], dim: int) -> None:
    wanted = {"exp_avg": oracle.m, "exp_avg_sq": oracle.v} | (
        {"max_exp_avg_sq": oracle.v_max} if oracle.amsgrad else {}
    )
    for name, want in wanted.items():
        got = rows(state[name], dim)
        close(got, want, 0.51 if got.dtype == BF16 else 2000, scale=float(want.abs().mean()))  # m may have cancelled


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
@pytest.mark.parametrize("case", CASES)
def test_adam_and_the_projection(case: str, metric: str) -> None:
    shape, dim, dtype, state_dtype = CASES[case]
    length = shape[dim]
    p = Parameter(torch.softmax(torch.randn(shape, dtype=F64), dim).to(dtype))
    options = {"lr": 0.5 / length, "amsgrad": len(shape) > 1, "weight_decay": 0.1}
    optimizer = ProjectedAdam([p], constraint=co.Simplex(dim), metric=metric, state_dtype=state_dtype, **options)
    oracle = Adam(**options, floor=FLOOR if metric == "adam" else 0.0)
    for step in range(2):
        g = with_grad(p, dim, one_way=step == 0)  # all go down, and lambda is negative
        if step > 0:
            take_moments(oracle, optimizer.state[p], dim)
        y, d = oracle.step(g, rows(p, dim))
        d = d if metric == "adam" else torch.ones_like(d)
        want = project_by_sorting(y, d)
        optimizer.step()
        check_moments(oracle, optimizer.state[p], dim)
        x = rows(p, dim)
        close(x, want, 0.51 if dtype == BF16 else 64, scale=1 / length)
        if dtype != BF16:
            eps = torch.finfo(dtype).eps
            assert ((x.double().sum(-1) - 1).abs() <= 8 * eps).all()
            assert_optimal(x, y, d, 64 * eps)
    assert 0.1 < (p > 0).double().mean() < 0.99


@pytest.mark.parametrize("lr", [1e-7, 1e-2, 1.0, 1e3, 1e8])
def test_a_step_that_leaves_the_simplex_by_far(lr: float) -> None:
    """From the middle, a few numbers, and a corner."""
    length = LONGEST_COPIED + 100
    like = torch.softmax(torch.tensor([[1.0], [30.0]]) * torch.randn(2, length, dtype=torch.float64), -1).float()
    p = Parameter(torch.cat([like, torch.nn.functional.one_hot(torch.tensor([7]), length)]))
    optimizer, oracle = ProjectedAdam([p], lr=lr, constraint=co.Simplex()), Adam(lr=lr, floor=FLOOR)
    for _ in range(3):
        y, d = oracle.step(with_grad(p, 1), p.detach())
        want = project_by_sorting(y, d)
        optimizer.step()
        assert ((p.double() - want).abs() <= 4e-7 * (1 + y.abs().amax(-1, keepdim=True))).all()
        assert (p >= 0).all() and ((p.double().sum(-1) - 1).abs() <= 4e-6).all()


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_nan_stays_in_its_row(kind: Any, dim: int) -> None:
    length = LONGEST_COPIED + 30
    p = Parameter(torch.full((3, length) if dim else (length, 3), 1 / length))
    optimizer = kind([p], lr=1e-6, constraint=co.Simplex(dim))
    with_grad(p, dim)[1, length - 2] = math.nan
    optimizer.step()
    x = rows(p, dim)
    assert x[1].isnan().all()
    assert not x[[0, 2]].isnan().any()


@pytest.mark.parametrize("case", CASES)
def test_softmax_and_adam_on_raw(case: str) -> None:
    shape, dim, dtype, state_dtype = CASES[case]
    logits = 3 * torch.randn(shape, dtype=F64)
    if len(shape) > 1 and dtype != F64:  # a row with nearly all in one place, which takes the oracle digits
        rows(logits, dim)[(0,) * (len(shape) - 1)][5] = 30.0
    x = Parameter(torch.softmax(logits, dim).to(dtype))
    options = {"lr": 0.01, "amsgrad": len(shape) > 1, "weight_decay": 0.1}
    optimizer = ReparametrizedAdam([x], constraint=co.Simplex(dim), state_dtype=state_dtype, **options)
    oracle = Adam(**options)
    for step in range(3):
        g = with_grad(x, dim, float(shape[dim]))
        if step == 0:  # after which there is a raw to start from
            optimizer.step()
            oracle.t = 1
            continue
        leaf = rows(optimizer.state[x]["raw"], dim).double().requires_grad_()
        take_moments(oracle, optimizer.state[x], dim)
        (grad_raw,) = torch.autograd.grad(torch.softmax(leaf, -1), leaf, g.double())
        want, _ = oracle.step(grad_raw, leaf.detach())
        optimizer.step()
        check_moments(oracle, optimizer.state[x], dim)
        raw = rows(optimizer.state[x]["raw"], dim)
        close(raw, want, 2000, scale=1.0)
        close(rows(x, dim), torch.softmax(raw.double(), -1), 0.51 if dtype == BF16 else 64)
        assert (x > 0).all()
