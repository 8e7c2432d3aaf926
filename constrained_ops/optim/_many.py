"""Many parameters at once: do they lie in their sets, and from which raws do they come?

To plain PyTorch a small tensor costs as much time as one of thousands of elements, and a large one ten times its
memory. Parameters whose constraints are alike are therefore cut and laid end to end, in batches of about one size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._constraints import Record, SimplexOf
from .._library import compute_dtype
from ._memory import empty

TOGETHER = 2**18  # elements of a batch; or one row, if that is longer


def check(where: Callable[[int], str], records: Sequence[Record | None], params: Sequence[Tensor]) -> None:
    """ValueError if a parameter lies outside its constraint, with the first such, as ``where`` calls it."""
    if all(batch.record.holds(*batch.operands) for batch in _batches(records, params)):
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

    def only(indices: Collection[int]) -> list[Record | None]:
        return [record if index in indices else None for index, record in enumerate(records)]

    new = {index for index, raw in enumerate(raws) if raw is None and records[index] is not None}
    strays: set[int] = set()
    for batch in _batches(only(set(range(len(raws))) - new), params, raws):
        x, raw = batch.operands
        made = batch.record.made_by(raw, x)
        if not made.all():
            strays.update(index for index, _, part in batch.parts(made) if not part.all())
    check(where, only(new | strays), params)

    found = {index: _empty_raw(records[index], params[index]) for index in (*new, *strays)}
    lines = {index: _lines(raw, _dim(records[index])) for index, raw in found.items()}  # views
    for batch in _batches(only(new), params):
        for index, begin, part in batch.parts(batch.record.inverse(*batch.operands)):
            lines[index][begin : begin + len(part)] = part
    for batch in _batches(only(strays), params, raws):
        x, raw = batch.operands
        mended = torch.where(batch.record.made_by(raw, x), raw, batch.record.inverse(x))
        for index, begin, part in batch.parts(mended):
            lines[index][begin : begin + len(part)] = part
    return found


@dataclass
class _Batch:
    """Elements in a line, or rows of a matrix, that come from several tensors."""

    record: Any  # of all of them together
    operands: list[Tensor]
    places: list[tuple[int, int, int]]  # (parameter, first of its elements or rows, how many)

    def parts(self, result: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(parameter, first of its elements or rows, what the result has for them)."""
        split = result.split([count for _, _, count in self.places])
        return ((index, begin, part) for (index, begin, _), part in zip(self.places, split, strict=True))


def _batches(records: Sequence[Record | None], *operands: Sequence[Any]) -> Iterator[_Batch]:
    """All that have a constraint, and elements. Each of ``operands`` has a tensor for each parameter, of its shape."""
    families: dict[tuple[object, ...], list[tuple[Record, int, int, list[Tensor]]]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for index, record in enumerate(records):
        if record is None or not (x := operands[0][index]).numel():
            continue
        dim = _dim(record)
        tensors = [each[index] for each in operands]
        if not isinstance(record, SimplexOf) and isinstance(record.lower, Tensor):
            tensors += [record.lower, record.upper]
        lines = [_lines(t, dim) for t in tensors]
        length = lines[0].shape[1] if dim is not None else 1
        family = _family(record, x, length)
        count, most = len(lines[0]), max(1, TOGETHER // length)
        for begin in range(0, count, most):
            pieces = lines if count <= most else [line[begin : begin + most] for line in lines]
            size = len(pieces[0]) * length
            if sizes.get(family, 0) + size > TOGETHER and family in families:
                yield _joined(families.pop(family), len(operands))
                sizes[family] = 0
            families.setdefault(family, []).append((record, index, begin, pieces))
            sizes[family] = sizes.get(family, 0) + size
    for members in families.values():
        yield _joined(members, len(operands))


def _joined(members: list[tuple[Record, int, int, list[Tensor]]], operands: int) -> _Batch:
    pieces = zip(*(pieces for *_, pieces in members), strict=True)
    joined = [each[0] if len(each) == 1 else torch.cat(each) for each in pieces]
    record: Any = members[0][0]
    if isinstance(record, SimplexOf):
        record = replace(record, dim=1)
    elif len(joined) > operands:
        record = replace(record, lower=joined[-2], upper=joined[-1])
    return _Batch(record, joined[:operands], [(index, begin, len(pieces[0])) for _, index, begin, pieces in members])


def _family(record: Record, x: Tensor, length: int) -> tuple[object, ...]:
    """What parameters must have in common to be joined."""
    if isinstance(record, SimplexOf):
        return x.dtype, x.device, record.total, record.kind, length
    bounds = () if isinstance(record.lower, Tensor) else (record.lower, record.upper)
    return x.dtype, x.device, record.transform, *bounds


def _dim(record: Record | None) -> int | None:
    """Along which elements belong together."""
    return record.dim if isinstance(record, SimplexOf) else None


def _lines(t: Tensor, dim: int | None) -> Tensor:
    """All elements, or rows along ``dim``: a view, if t is contiguous with ``dim`` as the last."""
    if dim is None:
        return t.reshape(-1)
    return t.movedim(dim, -1).reshape(-1, t.shape[dim]) if t.dim() else t.reshape(1, 1)


def _empty_raw(record: Record | None, x: Tensor) -> Tensor:
    """Memory for the raw of x, of which :func:`_lines` makes a view."""
    dim = _dim(record)
    if dim is None or x.dim() < 2:
        pattern = torch.empty(x.shape, device="meta")
    else:
        pattern = torch.empty((*x.shape[:dim], *x.shape[dim + 1 :], x.shape[dim]), device="meta").movedim(-1, dim)
    return empty("raw", x, pattern, compute_dtype(x.dtype))
