"""What the host does for a step on GPUs: tables, work items, and memory that captured graphs read."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import weakref
from typing import Any
from unittest.mock import patch

import emulation
import pytest
import torch
from test_step import GROUPS, INF, ROWS, gradients, make_slot
from torch import Tensor
from torch.distributions import constraints
from torch.nn import Parameter

from constrained_ops._constraints import SimplexOf
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam, _plans, _tables
from constrained_ops.optim._tables import TablePlan, Tables

BY_ELEMENT = constraints.interval(torch.zeros(4), torch.tensor([1.0, 2.0, INF, 3.0]))


class Recorded(TablePlan):
    launches = 0

    def _launch(self, tables: Any, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.launches += 1


def test_captures_in_a_row_need_no_memory_of_the_host_and_never_change_what_they_were_given() -> None:
    slots = [make_slot("plain", (n,), (torch.float32, torch.float32), "cpu") for n in (5, 0, 70)]
    plan = Recorded(slots)
    plan.run(gradients(slots), GROUPS)
    of_each = [gradients(slots) for _ in range(_tables.CAPTURES)]
    with patch.object(plan, "_current", plan._capture), patch.object(_tables, "_pinned", side_effect=MemoryError):
        for t, grads in enumerate(of_each):
            plan.run(grads, [GROUPS[0]._replace(lr=float(t))])
        with pytest.raises(MemoryError):
            plan.run(of_each[0], GROUPS)
    for t, (grads, (staging, tables, *_)) in enumerate(zip(of_each, plan.in_graphs, strict=True)):
        assert staging[:3].tolist() == [g.data_ptr() for g in grads]
        assert staging[3:4].view(torch.float64).item() == t
        assert tables is plan._tables
    plan.run(gradients(slots), GROUPS)
    with patch.object(plan, "_current", plan._capture), patch.object(_tables, "_pinned", side_effect=MemoryError):
        plan.run(of_each[0], GROUPS)
    assert len({staging.data_ptr() for staging, *_ in plan.in_graphs}) == _tables.CAPTURES + 1


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_what_graphs_read_stays_as_long_as_the_optimizer(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Captured(Recorded):
        def _current(self, grads: list[int], groups: bytes) -> Tables:
            return self._capture(grads, groups)

    monkeypatch.setattr(_plans, "plan_class", lambda *_: Captured)
    p = Parameter(torch.rand(6, 4))
    optimizer = kind([p], capturable=True, constraint=BY_ELEMENT)
    p.grad = torch.ones(6, 4)
    optimizer.step()
    staging, tables, kept, *_ = optimizer._in_graphs[0]
    read = [weakref.ref(t) for t in (staging, *tables, *kept)]
    assert len(kept) == 2
    del staging, tables, kept
    p.grad = torch.ones(4, 6).t()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [Parameter(torch.rand(3))], "constraint": None})
    optimizer.step()
    gc.collect()
    assert len(optimizer._in_graphs) == 3
    assert all(each() is not None for each in read)
    del optimizer, p
    gc.collect()
    assert not any(each() is not None for each in read)


def test_copies_of_an_optimizer_have_no_graphs() -> None:
    optimizer = ProjectedAdam([Parameter(torch.rand(3))])
    optimizer._in_graphs.append("a graph's")
    assert copy.deepcopy(optimizer)._in_graphs == []


@pytest.mark.parametrize("kind", [ProjectedAdam, ReparametrizedAdam])
def test_a_step_that_needs_preparation_is_not_captured(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write the start of the state into the graph, and so in every replay."""
    p = Parameter(torch.full((4,), 0.5))
    p.grad = torch.ones(4)
    optimizer = kind([p], lr=0.1, capturable=True, constraint=BY_ELEMENT)
    with monkeypatch.context() as capturing:
        capturing.setattr(kind, "_capturing", lambda self: True)
        with pytest.raises(RuntimeError, match=rf"^{kind.__name__}: the first step, .* take a step like it before$"):
            optimizer.step()
        assert not optimizer.state and (p == 0.5).all()
    optimizer.step()
    with monkeypatch.context() as capturing:
        capturing.setattr(kind, "_capturing", lambda self: True)
        optimizer.step()
        p.grad = torch.ones(8)[::2]
        with pytest.raises(RuntimeError, match="cannot be captured"):
            optimizer.step()
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("processors", [1, 132])
def test_work_is_shared_out(processors: int) -> None:
    """Items cover all there is once; a lone large tensor fills the device, and tiny ones have one item each."""
    dtypes = (torch.float32, torch.float32)
    large = make_slot("plain", (300_000,), dtypes, "cpu")
    tiny = [make_slot("plain", (5,), dtypes, "cpu") for _ in range(500)]
    rows = [make_slot("simplex", shape, dtypes, "cpu", dim=dim) for shape, dim in ROWS.values()]
    empty = make_slot("interval", (0,), dtypes, "cpu")
    with patch.object(_tables, "_processors", lambda device: processors):
        for slots in ([large], tiny, [empty], [*tiny, large, *rows, empty]):
            plan = Recorded(slots)
            work = plan._tables.work.tolist()
            for i, slot in enumerate(slots):
                count = slot.param.numel()
                if isinstance(slot.constraint, SimplexOf):
                    count //= slot.param.shape[slot.constraint.dim]
                spans = [(begin, end) for index, begin, end, _ in work if index == i]
                assert spans[0][0] == 0 and spans[-1][1] == count
                assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
                assert plan._tables.progress[i].tolist() == [0, len(spans)]
            plan.run(gradients(slots), GROUPS)
            assert plan.launches == 1
            if slots[0] is large:
                assert len(work) >= 293 if processors > 1 else 8 <= len(work) <= 16
            if slots is tiny:
                assert len(work) == len(tiny)


def test_kinds_and_records_are_those_of_the_header() -> None:
    header = (emulation.CSRC / "step.h").read_text()
    body = re.search(r"enum class StepKind[^{]*{(.*?)};", header, re.DOTALL)
    assert body is not None
    found = re.findall(r"^\s*(\w+) = (\d+),", body[1], re.MULTILINE)
    assert [(name, int(value)) for name, value in found] == [(name, i) for i, name in enumerate(_tables.KINDS)]


@pytest.mark.skipif(not emulation.available(), reason="the emulation needs g++ on Linux")
def test_tables_that_do_not_fit_are_refused() -> None:
    operator = emulation.load()["step"]["step"]
    x = torch.zeros(4)
    plan = Recorded([make_slot("plain", (4,), (torch.float32, torch.float32), "cpu")])
    good = plan._tables
    operator(x, x, *good._replace(work=good.work[:0]), None, None, 0)
    for wrong, name in (
        (good._replace(slots=good.slots[:, :8]), "slots"),
        (good._replace(progress=good.progress.long()), "progress"),
        (good._replace(work=good.work.int()), "work"),
    ):
        with pytest.raises(RuntimeError, match=f"step: {name} must be"):
            operator(x, x, *wrong, None, None, 0)
    with pytest.raises(RuntimeError, match="step: grad_scale must be"):
        operator(x, x, *good, torch.zeros(2), None, 0)
    with pytest.raises(RuntimeError, match="step: cache must be from 0 to 12"):
        operator(x, x, *good, None, None, 13)
    with pytest.raises(RuntimeError, match="step: exp_avg must be of param's dtype"):
        operator(x, x.half(), *good, None, None, 0)
