"""What Hypothesis draws for test_fuzz and test_fuzz_optim: shapes, numbers up to the edges of each dtype, layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import constrained_ops as co
from constrained_ops._library import compute_dtype

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
fuzz = settings(derandomize=True, database=None, deadline=None, max_examples=200)

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
# From 0 dimensions and none of a size up to several hundred elements.
shapes = st.one_of(
    st.lists(st.integers(0, 6), max_size=4).map(tuple),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 40)),
)
row_shapes = shapes.filter(lambda s: all(s))


# --- Numbers and layouts ----------------------------------------------------------------------------------------------


def ordinary(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * 3


def any_magnitude(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Exponents far beyond those of 16 bits; what a dtype cannot hold becomes 0 or infinite in it."""
    exponent = torch.rand(shape, generator=g, dtype=torch.float64) * 90 - 50
    return torch.randn(shape, generator=g, dtype=torch.float64) * 10**exponent


def special(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    several = [
        NAN,
        INF,
        -INF,
        0.0,
        -0.0,
        1.0,
        -1.0,
        65504.0,
        -3.38e38,
        1.79e308,
        6e-8,
        -1e-45,
        17.0,
        -88.0,
        104.0,
        -709.0,
    ]
    which = torch.randint(0, 2 * len(several), shape, generator=g)
    values = torch.tensor([*several, *[0.5] * len(several)], dtype=torch.float64)[which]
    return torch.where(which < len(several), values, ordinary(shape, g))


NUMBERS = [ordinary, any_magnitude, special]


def contiguous(t: Tensor) -> Tensor:
    return t.clone()


def permuted(t: Tensor) -> Tensor:
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards)


def sliced(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t.clone()
    spacious = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), NAN, dtype=t.dtype)
    spacious[..., 1::2] = t
    return spacious[..., 1::2]


def expanded(t: Tensor) -> Tensor:
    """Along its first dimension; other numbers than those of ``t``."""
    return t[:1].clone().expand(t.shape) if t.dim() and t.shape[0] else t.clone()


def unaligned(t: Tensor) -> Tensor:
    spacious = torch.full((t.numel() + 1,), NAN, dtype=t.dtype)
    spacious[1:] = t.reshape(-1)
    return spacious[1:].view(t.shape)


LAYOUTS = [contiguous, permuted, sliced, expanded, unaligned]
layouts = st.sampled_from(LAYOUTS)
numbers = st.sampled_from(NUMBERS)


def agree(got: Tensor, want: Tensor, tolerance: Tensor | float, what: str) -> None:
    """Equal where either is not finite, elsewhere within the tolerance and what 16 bits round."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    held = torch.finfo(want.dtype)
    got, want = got.detach().double(), want.detach().double()
    # Rounding may decide whether a number next to the largest one is infinite.
    edge = torch.minimum(got.abs(), want.abs()) >= held.max * (1 - 4 * held.eps)
    same = (got == want) | (got.isnan() & want.isnan()) | (edge & (got.sign() == want.sign()))
    rounding = held.eps if held.bits == 16 else 0.0
    allowed = tolerance + rounding * want.abs() + 2 * held.smallest_normal * held.eps
    wrong = ~(same | ((got - want).abs() <= allowed))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()}, got {got[wrong][0]!r}, want {want[wrong][0]!r}"
    )


def on_both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What it gives on the compiled library and on the reference; errors, which must be the documented ones, alike."""
    results: list[Any] = []
    for backend in ("cpu", "reference"):
        with co.backend(backend):
            try:
                results.append(call())
            except (ValueError, TypeError) as error:
                results.append((type(error), str(error)))
    return results[0], results[1]


def failed(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


def stays(t: Tensor) -> Callable[[], bool]:
    """Whether ``t``, and what lies around it in memory, is still what it was."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    before = whole.clone()
    return lambda: torch.equal(whole.nan_to_num(7.5), before.nan_to_num(7.5))


def both_bounds(raw: Tensor, lower: Any, upper: Any) -> tuple[Tensor, ...]:
    """In raw's shape and compute dtype."""
    whole = (b.detach() if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64) for b in (lower, upper))
    return tuple(b.to(compute_dtype(raw.dtype)).expand(raw.shape) for b in whole)
