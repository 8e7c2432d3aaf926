"""What the bijections onto the simplex have in common: rows of x beside those of raw, which are one shorter."""

# ruff: noqa: N803  (Triton: constants in capitals)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numeric import to_compute, to_storage
from .simplex import rows_of_program


@triton.jit
def kept_positive(x, smallest):
    """A result strictly above 0, NaN if it was one."""
    return tl.where(x < smallest, smallest, x)


class Ends(NamedTuple):
    """A sum of what comes before each element of a block, and of all up to its end."""

    before: Any
    total: Any


@triton.jit
def sum_before(v, carry):
    """``carry``: the sum of all blocks before."""
    return Ends(carry + (tl.cumsum(v, 1) - v), carry + tl.sum(v, 1, keep_dims=True))


@triton.jit
def raw_rows_of(rows, outer, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr, WIDE: tl.constexpr):
    """The same rows of a tensor that is one shorter."""
    return rows_of_program(outer, rows.size - 1, inner, OUTERS, INNERS, WIDE)


@triton.jit
def load_raw(pointer, rows, first, BLOCK: tl.constexpr):
    """As ``load``, of elements that may come before the first."""
    k = first + tl.arange(0, BLOCK)[None, :, None]
    inside = rows.inside & (k >= 0) & (k < rows.size)
    return to_compute(tl.load(pointer + rows.start + (rows.lanes + k * rows.inner), inside, 0.0))


@triton.jit
def store_raw(pointer, rows, first, BLOCK: tl.constexpr, tile):
    k = first + tl.arange(0, BLOCK)[None, :, None]
    inside = rows.inside & (k >= 0) & (k < rows.size)
    tl.store(pointer + rows.start + (rows.lanes + k * rows.inner), to_storage(tile, pointer.dtype.element_ty), inside)


@triton.jit
def row_numbers(rows, outer, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr):
    """[OUTERS, 1, INNERS] the number of each row."""
    inner_blocks = tl.cdiv(inner, INNERS)
    o = (tl.program_id(0) // inner_blocks).to(tl.int64) * OUTERS + tl.arange(0, OUTERS)[:, None, None]
    i = (tl.program_id(0) % inner_blocks) * INNERS + tl.arange(0, INNERS)[None, None, :]
    return o * inner + i


@triton.jit
def load_number(pointer, rows, numbers):
    return to_compute(tl.load(pointer + numbers, rows.inside, 0.0))


@triton.jit
def store_number(pointer, rows, numbers, number):
    tl.store(pointer + numbers, to_storage(number, pointer.dtype.element_ty), rows.inside)
