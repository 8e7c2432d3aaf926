"""The compiled step on GPUs: one launch that finds all it needs in tables in device memory (``csrc/cuda/step.cuh``).

The tables are 8-byte words. From step to step they stay, and only what changed is sent again: gradients that moved,
hyperparameters, and step counters that somebody else wrote to. In the steady state a step is one launch and no copy.
The kernel counts steps itself, on counters of the plan's own where the optimizer's are on the CPU.

A captured CUDA graph reads memory of its plan in every replay. Nobody says when a graph is gone, and a plan goes when
another is made; so this memory goes with the optimizer, which has to outlive its graphs for its state's sake anyway.
"""

from __future__ import annotations

import functools
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from ctypes import c_float
from importlib import import_module
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _library
from .._constraints import SimplexOf
from ._plans import Hyper, Slot, named_step, register
from ._slots import DensePlan, bounds_of, for_all, kind_of, pointer, rows_of

# In the order of StepKind in csrc/step.h.
KINDS = (
    "plain", "box", "box_by_element", "interval", "lower_only", "upper_only", "bounded_by_element", "exponential",
    "exponential_by_element", "simplex", "softmax",
)  # fmt: skip

_SLOT = struct.Struct("=2i12q3d")  # StepSlot of csrc/step.h
_GROUP = struct.Struct("=5d3q")  # StepGroup of csrc/cuda/step.cuh
_DECOUPLED, _MAXIMIZE, _EUCLIDEAN, _LR_IS_DOUBLE = 1, 2, 4, 8
SLOT_WORDS, GROUP_WORDS, WORK_WORDS = _SLOT.size // 8, _GROUP.size // 8, 4

THREADS = 256  # of a block, step_threads of csrc/cuda/step.cuh
WAVES = 16  # work items per multiprocessor, where there is work for so many


CAPTURES = 8  # of CUDA graphs, in a row, for which there is pinned memory: allocating it meanwhile may be refused


class Tables(NamedTuple):
    """On the plan's device; int64 except for ``progress``."""

    slots: Tensor  # [slots, 16]
    grads: Tensor  # [slots] addresses
    groups: Tensor  # [groups, 8]
    work: Tensor  # [items, 4] slot, begin, end, and the index of its Tile
    progress: Tensor  # [slots, 2] int32: items of the slot that have started, 0 between launches, and all of them


class Tile(NamedTuple):
    """Rows that are worked on together, in memory [outers, length, inners]."""

    outers: int
    block: int  # of a row's elements, at a time
    inners: int
    one_block: bool  # whether that is all of them

    @classmethod
    def of(cls, length: int, inner: int) -> Tile:
        if inner > 1:
            return cls(1, 32, 32, length <= 32)
        if length <= 16:
            return cls(64, 16, 1, True)
        return cls(8, 128, 1, True) if length <= 128 else cls(1, 1024, 1, length <= 1024)


class TablePlan(DensePlan, ABC):
    """A plan by tables. Subclasses launch."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots)
        self.device = slots[0].param.device
        self.kinds: set[str] = set()
        self._aligned = True
        elsewhere = [i for i, slot in enumerate(slots) if self._counts_elsewhere(slot)]
        self._host_steps = [c_float.from_address(slots[i].step.data_ptr()) for i in elsewhere]
        self._device_steps = torch.empty(len(elsewhere), device=self.device)
        self._known_steps: list[float] | None = None if elsewhere else []
        places = dict(zip(elsewhere, range(self._device_steps.data_ptr(), 2**64, 4), strict=False))
        records = [
            self._record(slot, param, places.get(i, slot.step.data_ptr()))
            for i, (slot, param) in enumerate(zip(slots, self._params, strict=True))
        ]
        self._groups = 1 + max(slot.group for slot in slots)
        self.tiles: list[Tile] = []
        work, items = self._work()
        self._tables = Tables(
            slots=_words(b"".join(records)).view(-1, SLOT_WORDS).to(self.device, copy=True),
            grads=torch.zeros(len(slots), dtype=torch.int64, device=self.device),
            groups=torch.zeros(self._groups, GROUP_WORDS, dtype=torch.int64, device=self.device),
            work=torch.tensor(work, dtype=torch.int64, device=self.device).view(-1, WORK_WORDS),
            progress=torch.tensor([[0, n] for n in items], dtype=torch.int32, device=self.device),
        )
        self._grads: list[int] = []  # addresses in the present step
        self._known_grads: list[int] | None = None  # in the table
        self._known_groups: bytes | None = None
        self.in_graphs = []
        self._capturable = len(elsewhere) < len(slots)
        self._staging: list[Tensor] = []
        self._stock()

    @property
    def aligned(self) -> bool:
        """Whether all memory of this step may be accessed 16 bytes at a time, with nothing left over."""
        return self._aligned and not any(address % 16 for address in self._grads)

    @abstractmethod
    def _launch(self, tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None) -> None: ...

    @torch.no_grad()
    def run(
        self,
        grads: Sequence[Tensor],
        hyper: Sequence[Hyper],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if self._copied:
            grads = self._dense_grads(grads)
        if self._gaps:
            self._fill_gaps()
        self._count()
        self._grads = list(map(Tensor.data_ptr, grads))
        groups = b"".join([self._group(each) for each in hyper[: self._groups]])
        self._launch(self._current(self._grads, groups), grad_scale, found_inf)
        increment_version(self._written)
        if self._gaps:
            self._write_back()

    def _counts_elsewhere(self, slot: Slot) -> bool:
        """Whether the kernel cannot reach the step counter, and the plan keeps one for it."""
        return slot.step.device != self.device

    def _count(self) -> None:
        """The counters on the CPU one up; the plan's own, which the launch will count up, as those were."""
        counters = self._host_steps
        steps = [counter.value for counter in counters]
        if steps != self._known_steps:
            self._device_steps.copy_(_host(steps, torch.float32, self.device), non_blocking=True)
        for counter, step in zip(counters, steps, strict=True):
            counter.value = step + 1
        self._known_steps = [step + 1 for step in steps]

    def _current(self, grads: list[int], groups: bytes) -> Tables:
        """The tables with these gradients and hyperparameters."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._capture(grads, groups)
        self._stock()
        if groups != self._known_groups:
            words = _words(groups).view(-1, GROUP_WORDS).tolist()
            self._tables.groups.copy_(_host(words, torch.int64, self.device), non_blocking=True)
            self._known_groups = groups
        if grads != self._known_grads:
            self._tables.grads.copy_(_host(grads, torch.int64, self.device), non_blocking=True)
            self._known_grads = grads
        return self._tables

    def _capture(self, grads: list[int], groups: bytes) -> Tables:
        """Tables of the graph's own: it copies them anew in each replay, from host memory that is never changed.

        On the device they are the graph's, as everything that is allocated during a capture.
        """
        words = torch.cat([torch.tensor(grads, dtype=torch.int64, device="cpu"), _words(groups)])
        staging = (self._staging.pop() if self._staging else _pinned(1, words.numel())[0]).copy_(words)
        self.in_graphs.append((staging, self._tables, self._bounds, self._gaps, self._device_steps))
        table = staging.to(self.device, non_blocking=True)
        return self._tables._replace(grads=table[: len(grads)], groups=table[len(grads) :].view(-1, GROUP_WORDS))

    def _stock(self) -> None:
        """Host memory for captures to come. One that has been read by a graph is the graph's for good."""
        if self._capturable and not self._staging:
            self._staging = list(_pinned(CAPTURES, len(self.slots) + self._groups * GROUP_WORDS))

    # --- The tables --------------------------------------------------------------------------------------------------

    def _record(self, slot: Slot, param: Tensor, step: int) -> bytes:
        record = slot.constraint
        lower, upper = bounds_of(record)
        lower_each, upper_each = self._by_element(slot, lower), self._by_element(slot, upper)
        kind = kind_of(slot, record)
        self.kinds.add(kind)
        memory = (param, slot.exp_avg, slot.exp_avg_sq, slot.max_exp_avg_sq, slot.raw)
        left_over = 0 if isinstance(record, SimplexOf) else param.numel() % 16
        self._aligned = self._aligned and not left_over and not any(pointer(t) % 16 for t in memory)
        return _SLOT.pack(
            KINDS.index(kind),
            slot.group,
            param.numel(),
            *(rows_of(slot.exp_avg, record.dim) if isinstance(record, SimplexOf) else (1, 1, 1)),
            *map(pointer, memory),
            step,
            pointer(lower_each),
            pointer(upper_each),
            -math.inf if lower_each is not None else for_all(lower),
            math.inf if upper_each is not None else for_all(upper),
            record.total if isinstance(record, SimplexOf) else 0.0,
        )

    def _group(self, hyper: Hyper) -> bytes:
        lr, lr_at = 0.0, 0
        flags = _DECOUPLED * hyper.decoupled | _MAXIMIZE * hyper.maximize | _EUCLIDEAN * (hyper.metric == "euclidean")
        if not isinstance(hyper.lr, Tensor):
            lr = hyper.lr
        elif hyper.lr.device == self.device and hyper.lr.dtype in (torch.float32, torch.float64):
            lr_at = hyper.lr.data_ptr()
            flags |= _LR_IS_DOUBLE * (hyper.lr.dtype == torch.float64)
        else:
            lr = hyper.lr.item()
        return _GROUP.pack(lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, flags, lr_at, 0)

    def _work(self) -> tuple[list[int], list[int]]:
        """All work items as words, and how many each slot has.

        Their size depends on the total: much work makes large items, so that nobody waits for the last ones, and
        little work small ones, so that it spreads over the device. A slot without elements has an item that counts.
        """
        vector = THREADS * 16 // self.slots[0].param.element_size()  # one access of 16 bytes for each thread
        total = sum(slot.param.numel() for slot in self.slots)
        size = vector * max(1, math.ceil(total / (vector * WAVES * _processors(self.device))))
        work: list[int] = []
        items = []
        for index, slot in enumerate(self.slots):
            count, each, tile = slot.param.numel(), size, 0
            if isinstance(slot.constraint, SimplexOf):
                _, length, inner = rows_of(slot.exp_avg, slot.constraint.dim)
                shape = Tile.of(length, inner)
                if shape not in self.tiles:
                    self.tiles.append(shape)
                tile = self.tiles.index(shape)
                together = shape.outers * shape.inners
                count, each = count // length, together * max(1, size // (length * together))
            starts = range(0, max(count, 1), each)
            work += chain.from_iterable((index, start, min(start + each, count), tile) for start in starts)
            items.append(len(starts))
        return work, items


class CudaPlan(TablePlan):
    """By the compiled kernel. It keeps rows in shared memory if all of a simplex's fit."""

    _op = staticmethod(getattr(torch.ops, _library.NAMESPACE).step.default)

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots)
        first = slots[0]
        self._examples = first.param, first.exp_avg
        most = 48 // _library.compute_dtype(first.param.dtype).itemsize  # step_cache_limit of csrc/cuda/step.cuh
        projected = [slot for slot in slots if isinstance(slot.constraint, SimplexOf) and slot.raw is None]
        needed = [self._per_thread(slot, most) for slot in projected]
        self._cache = max((n for n in needed if n <= most), default=0)

    @staticmethod
    def _per_thread(slot: Slot, most: int) -> int:
        """How many elements of a row a thread has, as with_step_group of csrc/cuda/step.cuh has it."""
        assert isinstance(slot.constraint, SimplexOf)
        _, length, inner = rows_of(slot.exp_avg, slot.constraint.dim)
        columns = min(32, _power_of_two(inner))
        while columns > 8 and length > THREADS // columns * most:
            columns //= 2
        if inner > 1:
            return math.ceil(length / (THREADS // columns))
        return math.ceil(length / (min(32, _power_of_two(length)) if length <= 6 * 32 else THREADS))

    def _launch(self, tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._op(*self._examples, *tables, grad_scale, found_inf, self._cache)


class TritonPlan(TablePlan):
    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots)
        package = __package__.rpartition(".")[0]
        self._run = named_step(import_module(f"{package}.triton.step").launcher(self))

    def _launch(self, tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._run(tables, grad_scale, found_inf)


def _words(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data) or bytearray(8), dtype=torch.int64)[: len(data) // 8]


def _host(values: list[int] | list[float] | list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU, where a copy to the device need not wait. PyTorch keeps the memory until the copy is done."""
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def _pinned(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=torch.cuda.is_available())


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    return 1


if _library.has_cuda_library:
    register("cuda", "cuda", CudaPlan)
if _library.has_triton:
    register("triton", "cuda", TritonPlan)
    register("triton", "xpu", TritonPlan)
