"""Many parameters at once: do they lie in their sets, and from which raws do they come?

To plain PyTorch a small tensor costs as much as one of thousands of elements. Small parameters whose constraints are
alike are therefore laid end to end, and asked together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._constraints import Record, SimplexOf

TOGETHER = 2**18  # elements at a time: what is copied must not grow with the parameters


def check(where: Callable[[int], str], records: Sequence[Record | None], params: Sequence[Tensor]) -> None:
    """ValueError if a parameter lies outside its constraint, with the first such, as ``where`` calls it."""
    if all(batch.record.holds(batch.joined(params)) for batch in _batches(records, params)):
        return
    for index, (record, param) in enumerate(zip(records, params, strict=True)):
        if record is not None:
            record.check(where(index), param)


def renewed(
    where: Callable[[int], str],
    records: Sequence[Record | None],
    raws: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> dict[int, Tensor]:
    """The raws of parameters that have none yet, or whose raw does not lead to them; ValueError as :func:`check`.

    In the compute dtype. Elements that agree with their raw keep it.
    """
    pairs = list(zip(records, raws, strict=True))
    without: list[Record | None] = [record if raw is None else None for record, raw in pairs]
    made: dict[int, Tensor] = {}  # by their raws: which elements
    for batch in _batches([None if raw is None else record for record, raw in pairs], params):
        mask = batch.record.made_by(batch.joined(raws), batch.joined(params))
        if not mask.all():
            made.update(each for each in zip(batch.indices, batch.parts(mask), strict=True) if not each[1].all())
    for index in made:
        without[index] = records[index]
    check(where, without, params)
    empty = [i for i, record in enumerate(without) if record is not None and not params[i].numel()]
    found = {i: torch.empty_like(params[i]) for i in empty}
    for batch in _batches(without, params):
        parts = batch.parts(batch.record.inverse(batch.joined(params)))
        for index, raw in zip(batch.indices, parts, strict=True):
            old = raws[index]
            found[index] = raw.clone() if old is None else torch.where(made[index], old, raw)
    return found


class _Batch(NamedTuple):
    """Tensors of one dtype and device, and the constraint of all. One alone stays as it is."""

    indices: list[int]
    shapes: list[torch.Size]
    dim: int  # to become the last of a matrix; -1 for elements in a line
    record: Record  # of what is joined

    def joined(self, tensors: Sequence[Any]) -> Tensor:
        if len(self.indices) == 1:
            return tensors[self.indices[0]]
        return torch.cat([_lines(tensors[index], self.dim) for index in self.indices])

    def parts(self, joined: Tensor) -> list[Tensor]:
        """The reverse, views."""
        if len(self.indices) == 1:
            return [joined]
        length = 1 if self.dim < 0 else joined.shape[1]
        parts = zip(joined.split([shape.numel() // length for shape in self.shapes]), self.shapes, strict=True)
        if self.dim < 0:
            return [part.view(shape) for part, shape in parts]
        last = self.dim + 1
        return [part.view(*shape[: last - 1], *shape[last:], length).movedim(-1, self.dim) for part, shape in parts]


def _lines(t: Tensor, dim: int) -> Tensor:
    return t.reshape(-1) if dim < 0 else t.movedim(dim, -1).reshape(-1, t.shape[dim])


def _batches(records: Sequence[Record | None], params: Sequence[Tensor]) -> Iterator[_Batch]:
    """Of all that have a constraint, and elements."""
    families: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index, (record, param) in enumerate(zip(records, params, strict=True)):
        numel = param.numel()
        if record is None or numel == 0:
            continue
        key = _family(record, param)
        members, total = families.get(key, ([], 0))
        if members and total + numel > TOGETHER:
            yield _batch(members, records, params)
            members, total = [], 0
        members.append(index)
        families[key] = members, total + numel
    for members, _ in families.values():
        yield _batch(members, records, params)


def _family(record: Record, param: Tensor) -> tuple[object, ...]:
    kind = param.dtype, param.device
    if isinstance(record, SimplexOf):
        if param.dim() == 0:
            return (id(param),)
        return *kind, record.dim, record.total, record.kind, param.shape[record.dim]
    if isinstance(record.lower, Tensor):
        return *kind, record.transform
    return *kind, record.transform, record.lower, record.upper


def _batch(members: list[int], records: Sequence[Record | None], params: Sequence[Tensor]) -> _Batch:
    shapes = [params[index].shape for index in members]
    first: Any = records[members[0]]
    if len(members) == 1:
        return _Batch(members, shapes, -1, first)
    if isinstance(first, SimplexOf):
        return _Batch(members, shapes, first.dim, replace(first, dim=1))
    if isinstance(first.lower, Tensor):
        boxes: list[Any] = [records[index] for index in members]
        lower = torch.cat([_lines(box.lower, -1) for box in boxes])
        upper = torch.cat([_lines(box.upper, -1) for box in boxes])
        first = replace(first, lower=lower, upper=upper)
    return _Batch(members, shapes, -1, first)
