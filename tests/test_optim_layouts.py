"""Parameters and gradients in any layout, without elements, and without dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import OPTIMIZERS, copy_of, noise, set_grads
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam

pytestmark = pytest.mark.usefixtures("backend")


def layouts() -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """value -> (tensor of that value in some layout, the memory around it)."""

    def strided(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.full((t.shape[0] * 2 + 1, t.shape[1] * 3 + 2), 7.0, dtype=t.dtype)
        view = memory[1::2, 2::3]
        return view.copy_(t), memory

    def transposed(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = t.t().contiguous()
        return memory.t(), memory

    def unaligned(t: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.full((t.numel() + 3,), 7.0, dtype=t.dtype)
        return memory[1:-2].view(t.shape).copy_(t), memory

    return {
        "contiguous": lambda t: (t.clone(), t),
        "strided": strided,
        "transposed": transposed,
        "unaligned": unaligned,
    }


@pytest.mark.parametrize("constraint", [None, constraints.unit_interval, constraints.simplex, co.Simplex(0)], ids=repr)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_layouts_of_parameter_and_gradient(kind: type[Any], constraint: Any) -> None:
    value, grads = torch.softmax(torch.randn(5, 4), 0 if isinstance(constraint, co.Simplex) else -1), noise(3, 5, 4)
    grads[2] = grads[2, :1, :1]
    want = Parameter(value.clone())
    optimizer = kind([want], lr=1e-2, constraint=constraint)
    for g in grads:
        want.grad = g.clone()
        optimizer.step()
    for name, place in layouts().items():
        for grad_name, place_grad in layouts().items():
            data, memory = place(value)
            with torch.no_grad():
                outside = memory.clone().as_strided(data.shape, data.stride(), data.storage_offset())
                around = memory.sum() - outside.sum()
            p = Parameter(data)
            assert p.stride() == data.stride() and p.data_ptr() == data.data_ptr()
            optimizer = kind([p], lr=1e-2, constraint=constraint)
            for i, g in enumerate(grads):
                p.grad = g[:1, :1].expand(5, 4) if i == 2 and grad_name != "contiguous" else place_grad(g)[0]
                optimizer.step()
            torch.testing.assert_close(p.detach(), want.detach(), atol=1e-6, rtol=1e-6, msg=f"{name}, {grad_name}")
            if name in ("strided", "unaligned"):
                assert float(memory.sum() - p.detach().sum()) == pytest.approx(float(around), abs=1e-3)


def test_nothing_outside_a_strided_view_is_written() -> None:
    memory = torch.full((9, 10), 0.5)
    p = Parameter(memory[1::2, 2::3])
    for kind in OPTIMIZERS:
        optimizer = kind([p], lr=1e-2, constraint=constraints.unit_interval)
        p.grad = torch.ones(4, 3)
        optimizer.step()
    inside = torch.zeros(9, 10, dtype=torch.bool)
    inside[1::2, 2::3] = True
    assert (memory[inside] < 0.5).all()
    assert (memory[~inside] == 0.5).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("places", [(0,), (1,), (3,), (0, 2, 4)])
def test_parameters_without_elements_are_harmless_anywhere(kind: type[Any], places: tuple[int, ...]) -> None:
    full = [Parameter(torch.full((3, n + 1), 0.5)) for n in range(3)]
    alone = copy_of(full)
    mixed = list(full)
    for place in places:
        mixed.insert(place, Parameter(torch.zeros(2, 0, 3)))
    groups = [{"params": mixed[:2]}, {"params": mixed[2:]}]
    ours, theirs = (kind(each, lr=1e-2, constraint=constraints.unit_interval) for each in (groups, alone))
    for _ in range(3):
        set_grads(mixed)
        set_grads(alone, like=full)
        ours.step()
        theirs.step()
    assert all(map(torch.equal, full, alone))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 11, 16, 20, 32, 33, 64, 100, 300, 1500])
def test_a_row_goes_where_it_would_go_alone(length: int) -> None:
    rows = [Parameter(torch.softmax(torch.randn(1, length), -1)) for _ in range(37)]  # no multiple of anything
    if rows[0].device.type != "cpu":
        pytest.skip("of the CPU's loops, which take rows in many ways")
    together = Parameter(torch.cat(list(rows)).detach())
    ours, theirs = (ProjectedAdam(each, lr=1e-2, constraint=constraints.simplex) for each in ([together], rows))
    with torch.no_grad():  # not a row of the simplex: more of the projection is wanted than of its neighbours'
        for row, value in ((5, 1e6), (7, 0.0), (20, -3e4)):
            together[row] = rows[row][0] = value * torch.linspace(-1, 2, length)
    for _ in range(3):
        together.grad = noise(*together.shape)
        together.grad[11] = math.nan
        for row, grad in zip(rows, together.grad.split(1), strict=True):
            row.grad = grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(together.detach(), torch.cat(list(rows)).detach(), atol=0, rtol=0, equal_nan=True)
    finite = together.isfinite().all(1)
    assert not finite[11] and finite.sum() == 36
    torch.testing.assert_close(together[finite].sum(1), torch.ones(36), atol=1e-6, rtol=0)


def test_scalars_are_parameters_too() -> None:
    for kind in OPTIMIZERS:
        p, q = Parameter(torch.tensor(0.5)), Parameter(torch.tensor(1.0))
        optimizer = kind([{"params": [p], "constraint": constraints.unit_interval},
                          {"params": [q], "constraint": constraints.simplex}], lr=1.0)  # fmt: skip
        for _ in range(3):
            p.grad, q.grad = torch.tensor(1.0), torch.tensor(5.0)
            optimizer.step()
        assert 0 <= p < 0.3
        assert q == 1
