"""The step on GPUs, all kinds and dtypes in one launch, against the reference in float64: CUDA in the emulation, Triton
in its interpreter, and both on a GPU where there is one.

test_optim has the optimizers as a whole; here the kernels take one step at a time from states of every kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import emulation
import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from constrained_ops import _library
from constrained_ops._constraints import Box, Record, SimplexOf
from constrained_ops._library import compute_dtype
from constrained_ops.optim import _tables
from constrained_ops.optim._plans import Hyper, Slot
from constrained_ops.optim._reference import ReferencePlan
from constrained_ops.optim._tables import CudaPlan, TablePlan, TritonPlan

INF = math.inf
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
BACKENDS = ["emulated"] if emulation.available() else []
BACKENDS += ["triton"] if _library.has_triton else []
BACKENDS += ["cuda"] if DEVICE == "cuda" and _library.has_cuda_library else []

INTERPRETED = DEVICE == "cpu"  # a tenth of a second for each work item
# The formats that differ in the Triton kernel; the interpreter is too slow for all.
CASES = [
    (backend, dtypes)
    for backend in BACKENDS
    for dtypes in DTYPES
    if backend != "triton" or not INTERPRETED or dtypes in (DTYPES[0], DTYPES[1], DTYPES[5])
]

GROUPS = [
    Hyper(1e-2, 0.9, 0.999, 1e-8, 0.0, False, False, False, "adam"),
    Hyper(0.1, 0.8, 0.95, 1e-3, 0.1, False, True, False, "euclidean"),
    Hyper(0.05, 0.5, 0.9, 1e-6, 0.2, True, False, False, "adam"),
]


@pytest.fixture(params=BACKENDS)
def plan_class(request: pytest.FixtureRequest) -> Iterator[type[TablePlan]]:
    if request.param == "emulated":
        operator = emulation.load()["step"]["step"]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield type("Emulated", (CudaPlan,), {"_op": staticmethod(operator), "device": "cpu"})
        torch.set_num_threads(before)
    elif request.param == "triton":
        request.getfixturevalue("triton_interpreter")
        yield type("Triton", (TritonPlan,), {"device": DEVICE})
    else:
        yield type("Cuda", (CudaPlan,), {"device": "cuda"})


def placed(value: Tensor, offset: int, device: str) -> Tensor:
    """A copy, ``offset`` elements after a multiple of 16 bytes."""
    memory = torch.zeros(value.numel() + offset, dtype=value.dtype, device=device)
    return memory[offset:].view(value.shape).copy_(value)


def record_of(kind: str, shape: Sequence[int], dtype: torch.dtype) -> Record | None:
    lower = torch.where(torch.arange(math.prod(shape)) % 3 == 0, -INF, -0.5).view(*shape).to(compute_dtype(dtype))
    upper = torch.where(torch.arange(math.prod(shape)) % 2 == 0, INF, 1.5).view(*shape).to(compute_dtype(dtype))
    records: dict[str, Record | None] = {
        "plain": None,
        "box": Box(-0.5, 0.25),
        "box_by_element": Box(lower, upper),
        "interval": Box(-0.5, 1.5),
        "lower_only": Box(-0.25, INF),
        "upper_only": Box(-INF, 0.75),
        "bounded_by_element": Box(lower, upper),
        "exponential": Box(0.125, INF, "exponential"),
        "exponential_by_element": Box(upper.where(upper < INF, 0.5), torch.full_like(upper, INF), "exponential"),
        "simplex": SimplexOf(len(shape) - 1, 1.5),
        "softmax": SimplexOf(len(shape) - 1),
    }
    return records[kind]


def make_slot(
    kind: str,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
    group: int = 0,
    amsgrad: bool = False,
    offset: int = 0,
    dim: int = -1,
    steps: float = 6.0,
) -> Slot:
    """Somewhere on the way: after ``steps`` steps, with moments of all sizes."""
    dtype, state = dtypes
    record = record_of(kind, shape, dtype)
    raw = None
    if isinstance(record, SimplexOf):
        record = replace(record, dim=dim % len(shape))
        x = torch.softmax(torch.randn(*shape, dtype=torch.float64), record.dim) * record.total
    else:
        x = torch.randn(*shape, dtype=torch.float64) / 2
    if kind not in ("plain", "box", "box_by_element", "simplex"):
        raw = torch.randn(*shape, dtype=torch.float64).to(compute_dtype(dtype))
        assert record is not None
        x = record.forward(raw, dtype)
    v = torch.rand(*shape, dtype=torch.float64) * 10 ** (torch.rand(*shape, dtype=torch.float64) * 4 - 3)
    on = lambda value, to: placed(value.to(to), offset, device)  # noqa: E731
    if isinstance(record, Box) and isinstance(record.lower, Tensor):
        record = replace(record, lower=record.lower.to(device), upper=record.upper.to(device))  # type: ignore[union-attr]
    return Slot(
        param=on(x, dtype),
        exp_avg=on(torch.randn(*shape, dtype=torch.float64) * v.sqrt() / 3, state),
        exp_avg_sq=on(v, state),
        max_exp_avg_sq=on(v * torch.rand(*shape, dtype=torch.float64) * 2, state) if amsgrad else None,
        step=torch.tensor(steps, device=device),
        raw=None if raw is None else placed(raw, offset, device),
        constraint=record,
        group=group,
        grad_stride=torch.empty(*shape).stride(),
    )


def in_double(slot: Slot) -> Slot:
    record = slot.constraint
    if isinstance(record, Box) and isinstance(record.lower, Tensor):
        record = replace(record, lower=record.lower.double().cpu(), upper=record.upper.double().cpu())  # type: ignore
    # clone: double() and cpu() may give back what they got
    tensors: Any = {n: t.double().cpu().clone() for n, t in slot._asdict().items() if isinstance(t, Tensor)}
    return slot._replace(**{**tensors, "step": slot.step.cpu().clone(), "constraint": record})


def gradients(slots: Sequence[Slot], offset: int = 0) -> list[Tensor]:
    scale = lambda t: 10 ** (torch.rand(t.shape) * 3 - 2)  # noqa: E731
    return [
        placed((torch.randn(s.param.shape) * scale(s.param)).to(s.param.dtype), offset, str(s.param.device))
        for s in slots
    ]


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5, torch.float64: 1e-12}


def interpreted(plan_class: Any) -> bool:
    return INTERPRETED and issubclass(plan_class, TritonPlan)


def check_steps(plan_class: Any, slots: list[Slot], hyper: list[Hyper] = GROUPS, **given: Tensor) -> TablePlan:
    """Two steps, each from the state that the plan is in; one where it takes long."""
    plan = plan_class(slots)
    for _ in range(1 if interpreted(plan_class) else 2):
        grads = gradients(slots)
        oracle = [in_double(slot) for slot in slots]
        versions = [slot.param._version for slot in slots]
        plan.run(grads, hyper, **given)
        scale = {name: value.cpu() for name, value in given.items() if name == "grad_scale"}
        ReferencePlan(oracle).run([g.double().cpu() for g in grads], hyper, **scale)
        for i, (slot, want) in enumerate(zip(slots, oracle, strict=True)):
            for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "raw", "step"):
                got, expected = getattr(slot, name), getattr(want, name)
                if got is None:
                    continue
                tolerance = TOLERANCE[got.dtype]
                torch.testing.assert_close(
                    got.double().cpu(), expected.double(), rtol=tolerance, atol=tolerance / 4, equal_nan=True,
                    msg=lambda m, i=i, name=name: f"slot {i}, {name}: {m}\n{slots[i].constraint}",
                )  # fmt: skip
            assert slot.param._version == versions[i] + 1
        assert (plan._tables.progress[:, 0] == 0).all()
    return plan


ELEMENTWISE = [kind for kind in _tables.KINDS if kind not in ("simplex", "softmax")]


@pytest.mark.parametrize(("plan_class", "dtypes"), CASES, ids=str, indirect=["plan_class"])
def test_all_elementwise_kinds_in_one_launch(plan_class: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Every kind with every size, each in one of the groups, aligned or not, with and without amsgrad."""
    sizes = [33, 1025] if interpreted(plan_class) else [0, 1, 31, 32, 33, 1023, 1024, 1025]
    turns = itertools.cycle(itertools.product(range(3), (False, True), (0, 1)))
    slots = []
    for kind, size in itertools.product(ELEMENTWISE, sizes):
        group, amsgrad, offset = next(turns)
        slots.append(make_slot(kind, (size,), dtypes, plan_class.device, group, amsgrad, offset))
    check_steps(plan_class, slots)


@pytest.mark.skipif("triton" not in BACKENDS or not INTERPRETED, reason="all formats are among CASES")
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if ("triton", d) not in CASES], ids=str)
def test_the_other_formats_in_the_interpreter(dtypes: Any, triton_interpreter: None) -> None:
    plan_class = type("Triton", (TritonPlan,), {"device": DEVICE})
    slots = [
        make_slot("interval", (33,), dtypes, DEVICE, amsgrad=True),
        make_slot("simplex", (3, 5), dtypes, DEVICE, 1),
    ]
    check_steps(plan_class, slots)


ROWS = {  # shape, dim
    "1": ((5, 1), 1),
    "3": ((100, 3), 1),
    "32": ((9, 32), 1),
    "33": ((9, 33), 1),
    "200": ((3, 200), 1),
    "1000": ((2, 1000), 1),
    "5000": ((2, 5000), 1),
    "columns": ((7, 3), 0),
    "columns between": ((2, 40, 5), 1),
    "long columns": ((700, 33), 0),
}
SLOW = {
    "3": (9, 3),
    "200": (1, 200),
    "1000": (1, 1000),
    "5000": (1, 5000),
    "columns between": (2, 20, 5),
    "long columns": (100, 3),
}


@pytest.mark.parametrize(("plan_class", "dtypes"), CASES, ids=str, indirect=["plan_class"])
@pytest.mark.parametrize("kind", ["simplex", "softmax"])
def test_rows_of_all_shapes_in_one_launch(plan_class: Any, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    turns = itertools.cycle(itertools.product(range(3), (False, True), (0, 1)))
    slots = []
    for name, (shape, dim) in ROWS.items():
        if name in SLOW and interpreted(plan_class):
            shape = SLOW[name]
        group, amsgrad, offset = next(turns)
        slots.append(make_slot(kind, shape, dtypes, plan_class.device, group, amsgrad, offset, dim))
    plan = check_steps(plan_class, slots)
    if kind == "simplex" and isinstance(plan, CudaPlan):  # both ways: in shared memory, and read again and again
        assert 0 < plan._cache <= 48 // compute_dtype(dtypes[0]).itemsize
    for slot in slots:
        total = slot.param.double().sum(slot.constraint.dim)  # type: ignore[union-attr]
        assert (total - slot.constraint.total).abs().max() <= TOLERANCE[dtypes[0]] * 4  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", ["adam", "euclidean"])
def test_supports_of_one_and_of_all(plan_class: Any, metric: str) -> None:
    hyper = [GROUPS[0]._replace(lr=lr, metric=metric) for lr in (10.0, 1e-4)]
    dtypes = (torch.float64, torch.float64)
    slots = [make_slot("simplex", (4, 50), dtypes, plan_class.device, group) for group in (0, 1)]
    check_steps(plan_class, slots, hyper)
    assert (slots[0].param != 0).sum(1).max() < 10
    assert (slots[1].param != 0).all()


@pytest.mark.parametrize("kind", ["simplex", "softmax"])
def test_a_nan_stays_in_its_row(plan_class: Any, kind: str) -> None:
    dtypes = (torch.float32, torch.float32)
    for length in (5, 4000) if interpreted(plan_class) else (5, 40, 300, 4000):
        slots = [make_slot(kind, (3, length), dtypes, plan_class.device)]
        grads = gradients(slots)
        grads[0][1, length // 2] = math.nan
        plan_class(slots).run(grads, GROUPS)
        found = slots[0].param.isnan().any(1)
        assert found.tolist() == [False, True, False]
        assert slots[0].param[1].isnan().all()


def test_a_gradient_that_was_never_there_does_not_take_all(plan_class: Any) -> None:
    """The floor of the metric."""
    slot = make_slot("simplex", (1, 4), (torch.float64, torch.float64), plan_class.device, steps=0.0)
    slot.param.fill_(0.375)
    for moment in (slot.exp_avg, slot.exp_avg_sq):
        moment.zero_()
    g = torch.tensor([[1.0, 2.0, 4.0, 0.0]], dtype=torch.float64, device=plan_class.device)
    plan_class([slot]).run([g], [GROUPS[0]._replace(lr=0.01)])
    y, u = torch.tensor([[0.365, 0.365, 0.365, 0.375]]).double(), torch.tensor([[1.0, 0.5, 0.25, 250.0]]).double()
    torch.testing.assert_close(slot.param.cpu(), y + u * 0.03 / u.sum(), atol=1e-7, rtol=0)


# --- What the device tells --------------------------------------------------------------------------------------------


def small_slots(device: str, **options: Any) -> list[Slot]:
    kinds = ("plain", "interval", "simplex", "softmax")
    shapes = ((40,), (2500,), (9, 6), (4, 50))
    dtypes = (torch.float32, torch.float32)
    return [make_slot(kind, shape, dtypes, device, **options) for kind, shape in zip(kinds, shapes, strict=True)]


def test_found_inf_and_grad_scale(plan_class: Any) -> None:
    slots = small_slots(plan_class.device, amsgrad=True)
    scale = torch.tensor(64.0, device=plan_class.device)
    zero = torch.zeros((), device=plan_class.device)
    check_steps(plan_class, slots, grad_scale=scale, found_inf=zero)
    before = [t.clone() for slot in slots for t in slot if isinstance(t, Tensor)]
    plan = plan_class(slots)
    plan.run(gradients(slots), GROUPS, scale, zero + 1)
    after = [t for slot in slots for t in slot if isinstance(t, Tensor)]
    assert all(map(torch.equal, before, after))
    plan.run(gradients(slots), GROUPS, scale, zero)
    assert {slot.step.item() for slot in slots} == {8.0 if interpreted(plan_class) else 9.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_on_the_device(plan_class: Any, dtype: torch.dtype) -> None:
    lr = torch.tensor(0.0, dtype=dtype, device=plan_class.device)
    slots = small_slots(plan_class.device)
    plan = plan_class(slots)
    for value in (0.01, 0.25):
        lr.fill_(value)
        oracle = [in_double(slot) for slot in slots]
        grads = gradients(slots)
        plan.run(grads, [GROUPS[0]._replace(lr=lr)])
        ReferencePlan(oracle).run([g.double().cpu() for g in grads], [GROUPS[0]._replace(lr=value)])
        for slot, want in zip(slots, oracle, strict=True):
            torch.testing.assert_close(slot.param.double().cpu(), want.param, rtol=1e-4, atol=1e-5)


def test_step_counters_where_the_kernel_cannot_reach_them(plan_class: Any) -> None:
    counted = type("Counted", (plan_class,), {"_counts_elsewhere": lambda self, slot: True})
    slots = [slot._replace(step=slot.step.cpu()) for slot in small_slots(plan_class.device)]
    plan = counted(slots)
    for expected, write in ((7.0, None), (8.0, None), (101.0, 100.0)):
        if write is not None:
            slots[1].step.fill_(write)
        oracle = [in_double(slot) for slot in slots]
        grads = gradients(slots)
        plan.run(grads, GROUPS)
        ReferencePlan(oracle).run([g.double().cpu() for g in grads], GROUPS)
        assert slots[1].step.item() == expected
        for slot, want in zip(slots, oracle, strict=True):
            torch.testing.assert_close(slot.param.double().cpu(), want.param, rtol=1e-4, atol=1e-5)


# --- The tables -------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_sent(plan_class: Any) -> None:
    slots = small_slots(plan_class.device)
    plan, grads, hyper = plan_class(slots), gradients(slots), list(GROUPS)
    with patch.object(_tables, "_host", wraps=_tables._host) as sent:
        for changed, expected in (("all", 2), ("nothing", 0), ("lr", 1), ("gradients", 1), ("nothing", 0)):
            if changed == "lr":
                hyper[0] = hyper[0]._replace(lr=0.5)
            if changed == "gradients":
                grads = gradients(slots)
            sent.reset_mock()
            plan.run(grads, hyper)
            assert sum(len(call.args[0]) > 0 for call in sent.call_args_list) == expected, changed


def test_a_captured_launch_has_tables_of_its_own(plan_class: Any) -> None:
    slots = small_slots(plan_class.device)
    plan, grads = plan_class(slots), gradients(slots)
    plan.run(grads, GROUPS)
    known = plan._known_grads, plan._known_groups, plan._tables.grads.clone(), plan._tables.groups.clone()
    oracle, others = [in_double(slot) for slot in slots], gradients(slots)
    with patch.object(plan, "_current", plan._capture):
        plan.run(others, [GROUPS[0]._replace(lr=0.5)])
    ReferencePlan(oracle).run([g.double().cpu() for g in others], [GROUPS[0]._replace(lr=0.5)])
    for slot, want in zip(slots, oracle, strict=True):
        torch.testing.assert_close(slot.param.double().cpu(), want.param, rtol=1e-4, atol=1e-5)
    assert (plan._known_grads, plan._known_groups) == known[:2]
    assert torch.equal(plan._tables.grads, known[2]) and torch.equal(plan._tables.groups, known[3])


def test_layouts(plan_class: Any) -> None:
    """A parameter with gaps, bounds that are expanded, gradients that lie otherwise; nothing else is written."""
    device, dtypes = plan_class.device, (torch.float32, torch.float32)
    memory = torch.full((13, 20), 7.0, device=device)
    column = torch.linspace(-1, 0, 6, device=device)[:, None].expand(6, 9)
    slots = [make_slot(kind, (6, 9), dtypes, device) for kind in ("box_by_element", "simplex", "box_by_element")]
    slots[0] = slots[0]._replace(param=memory[1::2, 2::2].copy_(slots[0].param), grad_stride=(1, 6))
    slots[1] = slots[1]._replace(grad_stride=(0, 0))
    slots[2] = slots[2]._replace(constraint=Box(column, torch.tensor(0.25, device=device).expand(6, 9)))
    around = memory.double().sum() - slots[0].param.double().sum()
    oracle = [in_double(slot) for slot in slots]
    grads = gradients(slots)
    grads = [grads[0].t().contiguous().t(), grads[1][:1, :1].expand(6, 9), grads[2]]
    versions = [slot.param._version for slot in slots]
    plan_class(slots).run(grads, GROUPS)
    ReferencePlan(oracle).run([g.double().cpu() for g in grads], GROUPS)
    for slot, want in zip(slots, oracle, strict=True):
        torch.testing.assert_close(slot.param.double().cpu(), want.param, rtol=1e-5, atol=1e-5)
    assert [slot.param._version for slot in slots] == [v + 1 for v in versions]
    torch.testing.assert_close(memory.double().sum() - slots[0].param.double().sum(), around)


def test_the_default_device_does_not_matter(plan_class: Any) -> None:
    slots = small_slots(plan_class.device)
    oracle, grads = [in_double(slot) for slot in slots], gradients(slots)
    plan = plan_class(slots)
    with torch.device("meta"):
        plan_class(slots)
        plan.run(grads, GROUPS)
    ReferencePlan(oracle).run([g.double().cpu() for g in grads], GROUPS)
    for slot, want in zip(slots, oracle, strict=True):
        torch.testing.assert_close(slot.param.double().cpu(), want.param, rtol=1e-4, atol=1e-5)
