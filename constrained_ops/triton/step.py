"""The step of the optimizers in one launch: ``csrc/cuda/step.cuh``, whose tables it reads, and ``csrc/math/adam.h``."""

# ruff: noqa: N803, N806, RET505, SIM300  (Triton: constants in capitals, static branches)

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optim._tables import KINDS, TablePlan, Tables
from .bounded import by_element, interval, lower_only, upper_only
from .elementwise import Bounds, bounds_of_element
from .launch import device_of
from .numeric import INFINITY, clamp, divide, exp, log, next_above, next_below, square_root, to_compute, to_storage
from .positive import exponential
from .projection import READINGS, ascent_from, minus_product, rest_of
from .projection import step as ascend
from .simplex import softmax_backward, softmax_value, softmax_weight

PLAIN, BOX, BOX_BY_ELEMENT, INTERVAL, LOWER_ONLY, UPPER_ONLY, BOUNDED_BY_ELEMENT, EXPONENTIAL = map(
    tl.constexpr, range(8)
)
EXPONENTIAL_BY_ELEMENT, SIMPLEX, SOFTMAX = map(tl.constexpr, range(8, 11))

# Words of a slot, of a group and of a work item.
GROUP, LENGTH, INNER, PARAM, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, RAW, STEP = map(
    tl.constexpr, (0, 3, 4, *range(5, 11))
)
LOWER_EACH, UPPER_EACH, LOWER, UPPER, TOTAL, SLOT_WORDS = map(tl.constexpr, range(11, 17))
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, FLAGS, LR_AT, GROUP_WORDS = map(tl.constexpr, (*range(7), 8))
DECOUPLED, MAXIMIZE, EUCLIDEAN, LR_IS_DOUBLE = map(tl.constexpr, (1, 2, 4, 8))
FLOOR = tl.constexpr(1e-3)

BLOCK = 1024


@triton.jit
def number(record, WORD: tl.constexpr):
    return tl.load(record + WORD).to(tl.float64, bitcast=True)


# --- Adam -------------------------------------------------------------------------------------------------------------


class Adam(NamedTuple):
    """The hyperparameters as the formulas want them, for one parameter in one step."""

    grad_factor: Any  # of the gradient as it comes
    weight_decay: Any
    decay: Any
    beta1_rest: Any  # 1 - beta1
    beta2: Any
    beta2_rest: Any
    step_size: Any  # lr r / (1 - beta1^t), with r = sqrt(1 - beta2^t), as in csrc/math/adam.h
    eps: Any  # eps r


@triton.jit
def adam_at(group, flags, step, grad_scale, COMPUTE: tl.constexpr):
    """`step` counts this one in: 1 in the first."""
    lr_at = tl.load(group + LR_AT)
    as_double = tl.load(lr_at.to(tl.pointer_type(tl.float64)), (lr_at != 0) & ((flags & LR_IS_DOUBLE) != 0), 0.0)
    as_float = tl.load(lr_at.to(tl.pointer_type(tl.float32)), (lr_at != 0) & ((flags & LR_IS_DOUBLE) == 0), 0.0)
    lr = number(group, LR) + as_double + as_float.to(tl.float64)
    beta1, beta2, weight_decay = number(group, BETA1), number(group, BETA2), number(group, WEIGHT_DECAY)
    decoupled = (flags & DECOUPLED) != 0
    sign = tl.where((flags & MAXIMIZE) != 0, -1.0, 1.0).to(tl.float64)
    t = step.to(tl.float64)
    root = tl.sqrt(1.0 - exp(t * log(beta2)))
    return Adam(
        grad_factor=(sign / grad_scale).to(COMPUTE),
        weight_decay=tl.where(decoupled, 0.0, weight_decay).to(COMPUTE),
        decay=tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(COMPUTE),
        beta1_rest=(1.0 - beta1).to(COMPUTE),
        beta2=beta2.to(COMPUTE),
        beta2_rest=(1.0 - beta2).to(COMPUTE),
        step_size=(lr * root / (1.0 - exp(t * log(beta1)))).to(COMPUTE),
        eps=(number(group, EPS) * root).to(COMPUTE),
    )


class Memory(NamedTuple):
    """Where a slot's numbers are."""

    param: Any
    raw: Any
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any
    amsgrad: Any  # whether max_exp_avg_sq is there
    grads: Any


@triton.jit
def pointer(record, WORD: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(record + WORD).to(tl.pointer_type(DTYPE))


@triton.jit
def memory_of(slot, grads, STORAGE: tl.constexpr, STATE: tl.constexpr, COMPUTE: tl.constexpr):
    return Memory(
        pointer(slot, PARAM, STORAGE),
        pointer(slot, RAW, COMPUTE),
        pointer(slot, EXP_AVG, STATE),
        pointer(slot, EXP_AVG_SQ, STATE),
        pointer(slot, MAX_EXP_AVG_SQ, STATE),
        tl.load(slot + MAX_EXP_AVG_SQ) != 0,
        pointer(grads, 0, STORAGE),
    )


@triton.jit
def addresses(pointer, at, ALIGNED: tl.constexpr):
    """Triton knows nothing of what was an integer; where ALIGNED it may access 16 bytes at a time."""
    if ALIGNED:
        return tl.multiple_of(pointer + at, 16)
    else:
        return pointer + at


@triton.jit
def load(pointer, at, inside, ALIGNED: tl.constexpr):
    return to_compute(tl.load(addresses(pointer, at, ALIGNED), inside, 0.0))


@triton.jit
def store(pointer, at, inside, value, ALIGNED: tl.constexpr):
    tl.store(addresses(pointer, at, ALIGNED), to_storage(value, pointer.dtype.element_ty), inside)


class Moments(NamedTuple):
    m: Any
    v: Any
    largest_v: Any
    d: Any  # the metric


@triton.jit
def moments_after(memory, at, inside, adam, g, x, ALIGNED: tl.constexpr):
    """Moments and metric after a gradient g at x; g after its transform's derivative."""
    amsgrad = inside & memory.amsgrad
    m = load(memory.exp_avg, at, inside, ALIGNED)
    v = load(memory.exp_avg_sq, at, inside, ALIGNED)
    largest_v = load(memory.max_exp_avg_sq, at, amsgrad, ALIGNED)
    g += tl.where(adam.weight_decay == 0.0, 0.0, adam.weight_decay * x)  # x may be infinite
    m += adam.beta1_rest * (g - m)
    v = adam.beta2 * v + adam.beta2_rest * g * g
    largest_v = tl.where((v > largest_v) | (v != v), v, largest_v)  # NaN if either is
    d = square_root(tl.where(amsgrad, largest_v, v)) + adam.eps
    return Moments(m, v, largest_v, d)


@triton.jit
def store_moments(memory, at, inside, moments, ALIGNED: tl.constexpr):
    store(memory.exp_avg, at, inside, moments.m, ALIGNED)
    store(memory.exp_avg_sq, at, inside, moments.v, ALIGNED)
    store(memory.max_exp_avg_sq, at, inside & memory.amsgrad, moments.largest_v, ALIGNED)


@triton.jit
def target(adam, x, m, d):
    """Where Adam goes from x in the metric d, before a projection."""
    return x * adam.decay - adam.step_size * divide(m, d)


# --- Element by element -----------------------------------------------------------------------------------------------


@triton.jit
def transform(KIND: tl.constexpr, raw, bounds):
    if KIND == INTERVAL:
        return interval(raw, bounds)
    elif KIND == LOWER_ONLY:
        return lower_only(raw, bounds)
    elif KIND == UPPER_ONLY:
        return upper_only(raw, bounds)
    elif KIND == BOUNDED_BY_ELEMENT:
        return by_element(raw, bounds)
    else:
        return exponential(raw, bounds)


@triton.jit
def bounds_at(slot, at, inside, KIND: tl.constexpr, STORAGE: tl.constexpr, COMPUTE: tl.constexpr):
    lower, upper = number(slot, LOWER), number(slot, UPPER)
    width = (upper - lower).to(COMPUTE)
    low, high = lower.to(COMPUTE), upper.to(COMPUTE)
    if (KIND == BOX_BY_ELEMENT) | (KIND == BOUNDED_BY_ELEMENT) | (KIND == EXPONENTIAL_BY_ELEMENT):
        lower_each = pointer(slot, LOWER_EACH, COMPUTE)
        upper_each = pointer(slot, UPPER_EACH, COMPUTE)
        lower = tl.load(lower_each + at, inside & (tl.load(slot + LOWER_EACH) != 0), low)
        upper = tl.load(upper_each + at, inside & (tl.load(slot + UPPER_EACH) != 0), high)
        return bounds_of_element(lower, upper, STORAGE)
    else:
        return Bounds(low, high, width, width, width, next_above(low, STORAGE), next_below(high, STORAGE))


@triton.jit
def step_elements(
    KIND: tl.constexpr,
    slot,
    memory,
    adam,
    item,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end = tl.load(item + 1), tl.load(item + 2)
    if ALIGNED:
        begin, end = tl.multiple_of(begin, 16), tl.multiple_of(end, 16)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        g = load(memory.grads, at, inside, ALIGNED) * adam.grad_factor
        if KIND == PLAIN:
            x = load(memory.param, at, inside, ALIGNED)
            moments = moments_after(memory, at, inside, adam, g, x, ALIGNED)
            value = target(adam, x, moments.m, moments.d)
        elif (KIND == BOX) | (KIND == BOX_BY_ELEMENT):
            bounds = bounds_at(slot, at, inside, KIND, STORAGE, COMPUTE)
            x = load(memory.param, at, inside, ALIGNED)
            moments = moments_after(memory, at, inside, adam, g, x, ALIGNED)
            value = clamp(target(adam, x, moments.m, moments.d), bounds.lower, bounds.upper)
        else:
            bounds = bounds_at(slot, at, inside, KIND, STORAGE, COMPUTE)
            raw = load(memory.raw, at, inside, ALIGNED)
            moments = moments_after(memory, at, inside, adam, g * transform(KIND, raw, bounds).x_raw, raw, ALIGNED)
            raw = target(adam, raw, moments.m, moments.d)
            value = clamp(transform(KIND, raw, bounds).x, bounds.smallest, bounds.largest)
            store(memory.raw, at, inside, raw, ALIGNED)
        store_moments(memory, at, inside, moments, ALIGNED)
        store(memory.param, at, inside, value, ALIGNED)


# --- Along rows: tiles [OUTERS, BLOCK, INNERS], rows along the second dimension, see simplex.py -----------------------


class Rows(NamedTuple):
    first: Any  # [OUTERS, 1, INNERS] offsets of the rows' first elements
    inside: Any  # [OUTERS, 1, INNERS] whether there is such a row
    length: Any
    inner: Any


@triton.jit
def rows_from(start, end, length, inner, OUTERS: tl.constexpr, INNERS: tl.constexpr):
    row = start + tl.arange(0, OUTERS)[:, None, None] * INNERS + tl.arange(0, INNERS)[None, None, :]
    outer = row // inner
    return Rows(outer * length * inner + (row - outer * inner), row < end, length, inner)


@triton.jit
def items_from(rows, first, BLOCK: tl.constexpr):
    k = first + tl.arange(0, BLOCK)[None, :, None]
    return rows.first + k * rows.inner, rows.inside & (k < rows.length)


@triton.jit
def largest_metric(memory, adam, rows, END, OUTERS: tl.constexpr, BLOCK: tl.constexpr, INNERS: tl.constexpr):
    largest = tl.zeros((OUTERS, 1, INNERS), adam.eps.dtype)
    for first in range(0, END, BLOCK):
        at, inside = items_from(rows, first, BLOCK)
        x, g = load(memory.param, at, inside, False), load(memory.grads, at, inside, False) * adam.grad_factor
        d = tl.where(inside, moments_after(memory, at, inside, adam, g, x, False).d, 0.0)
        candidate = tl.max(d, 1, keep_dims=True) + tl.sum(tl.where(d == d, 0.0, d), 1, keep_dims=True)
        largest = tl.where((candidate > largest) | (candidate != candidate), candidate, largest)
    return largest


class Projectable(NamedTuple):
    """What is projected, NaN where there is no such metric, and the metric as 1 / d."""

    y: Any
    u: Any
    d: Any
    moments: Any


@triton.jit
def projectable(memory, adam, at, inside, floor, euclidean):
    x, g = load(memory.param, at, inside, False), load(memory.grads, at, inside, False) * adam.grad_factor
    moments = moments_after(memory, at, inside, adam, g, x, False)
    floored = tl.where((floor > moments.d) | (floor != floor), floor, moments.d)
    y = tl.where(inside, target(adam, x, moments.m, floored), -INFINITY)
    d = tl.where(euclidean | (inside == 0), 1.0, floored).to(y.dtype)
    u = divide(tl.full(d.shape, 1.0, d.dtype), d)
    return Projectable(tl.where((u > 0.0) & (u < INFINITY), y, float("nan")), u, d, moments)


@triton.jit
def step_simplex(
    slot,
    memory,
    adam,
    euclidean,
    begin,
    end,
    COMPUTE: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Nothing is written before the last reading of the rows."""
    length, inner = tl.load(slot + LENGTH), tl.load(slot + INNER)
    total = number(slot, TOTAL).to(COMPUTE)
    end_of_row = BLOCK if ONE_BLOCK else length
    for start in range(begin, end, OUTERS * INNERS):
        rows = rows_from(start, end, length, inner, OUTERS, INNERS)
        largest = largest_metric(memory, adam, rows, end_of_row, OUTERS, BLOCK, INNERS)
        floor = tl.where(euclidean, 0.0, FLOOR * largest).to(COMPUTE)
        bound = tl.full((OUTERS, 1, INNERS), -INFINITY, COMPUTE)
        poison = tl.zeros((OUTERS, 1, INNERS), COMPUTE)  # NaN if one of the bounds is, which a maximum may drop
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            p = projectable(memory, adam, at, inside, floor, euclidean)
            each = (p.y - total) * p.d
            candidate = tl.max(each, 1, keep_dims=True)
            bound = tl.where(candidate > bound, candidate, bound)
            poison += tl.sum(tl.where(each == each, 0.0, each), 1, keep_dims=True)
        lam = ascent_from(bound + poison, total, True)
        left = READINGS
        while left > 0:
            sum = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
            sum_u = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
            for first in range(0, end_of_row, BLOCK):
                at, inside = items_from(rows, first, BLOCK)
                p = projectable(memory, adam, at, inside, floor, euclidean)
                rest = rest_of(minus_product(p.y, lam.anchor, p.u), p.u, lam, True)
                sum += tl.sum(tl.where(rest > 0.0, rest, 0.0), 1, keep_dims=True)
                sum_u += tl.sum(tl.where(rest > 0.0, p.u, 0.0), 1, keep_dims=True)
            lam = ascend(lam, sum, sum_u, total)
            left = tl.where(tl.max(lam.going) > 0.0, left - 1, 0)
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            p = projectable(memory, adam, at, inside, floor, euclidean)
            rest = rest_of(minus_product(p.y, lam.anchor, p.u), p.u, lam, True)
            store_moments(memory, at, inside, p.moments, False)
            store(memory.param, at, inside, tl.where(rest <= 0.0, 0.0, rest), False)


@triton.jit
def raw_of(memory, rows, first, BLOCK: tl.constexpr):
    at, inside = items_from(rows, first, BLOCK)
    return tl.load(memory.raw + at, inside, -INFINITY)


@triton.jit
def largest_and_inverse_sum(memory, rows, END, OUTERS: tl.constexpr, BLOCK: tl.constexpr, INNERS: tl.constexpr):
    COMPUTE: tl.constexpr = memory.raw.dtype.element_ty
    largest = tl.full((OUTERS, 1, INNERS), -INFINITY, COMPUTE)
    sum = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
    for first in range(0, END, BLOCK):
        raw = raw_of(memory, rows, first, BLOCK)
        candidate = tl.max(raw, 1, keep_dims=True)
        before = largest
        largest = tl.where(candidate > largest, candidate, largest)
        relative_to = tl.where(largest == -INFINITY, 0.0, largest)
        sum = sum * softmax_weight(before, relative_to) + tl.sum(softmax_weight(raw, relative_to), 1, keep_dims=True)
    return largest, divide(1.0, sum)


@triton.jit
def step_softmax(
    slot,
    memory,
    adam,
    begin,
    end,
    STORAGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNERS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    length, inner = tl.load(slot + LENGTH), tl.load(slot + INNER)
    end_of_row = BLOCK if ONE_BLOCK else length
    smallest = next_above(tl.zeros((1, 1, 1), COMPUTE), STORAGE)
    for start in range(begin, end, OUTERS * INNERS):
        rows = rows_from(start, end, length, inner, OUTERS, INNERS)
        largest, inverse_sum = largest_and_inverse_sum(memory, rows, end_of_row, OUTERS, BLOCK, INNERS)
        shift = tl.full((OUTERS, 1, INNERS), -INFINITY, COMPUTE)
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            g = load(memory.grads, at, inside, False) * adam.grad_factor
            is_largest = raw_of(memory, rows, first, BLOCK) == largest
            candidate = tl.max(tl.where(is_largest, g, -INFINITY), 1, keep_dims=True)
            shift = tl.where(candidate > shift, candidate, shift)
        mean = tl.zeros((OUTERS, 1, INNERS), COMPUTE)
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            g = load(memory.grads, at, inside, False) * adam.grad_factor
            x = softmax_weight(raw_of(memory, rows, first, BLOCK), largest) * inverse_sum
            mean += tl.sum(x * (g - shift), 1, keep_dims=True)
        tl.debug_barrier()  # all have read what is written now
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            g = load(memory.grads, at, inside, False) * adam.grad_factor
            raw = raw_of(memory, rows, first, BLOCK)
            x = softmax_weight(raw, largest) * inverse_sum
            moments = moments_after(memory, at, inside, adam, softmax_backward(x, g - shift, mean), raw, False)
            store_moments(memory, at, inside, moments, False)
            store(memory.raw, at, inside, target(adam, raw, moments.m, moments.d), False)
        tl.debug_barrier()  # other threads may read what these have written
        largest, inverse_sum = largest_and_inverse_sum(memory, rows, end_of_row, OUTERS, BLOCK, INNERS)
        for first in range(0, end_of_row, BLOCK):
            at, inside = items_from(rows, first, BLOCK)
            raw = raw_of(memory, rows, first, BLOCK)
            value = softmax_value(raw, softmax_weight(raw, largest), inverse_sum, smallest)
            store(memory.param, at, inside, value, False)


# --- The kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def take_step(
    slots,
    grads,
    groups,
    item,
    progress,
    grad_scale,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
    STORAGE: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    index, begin, end, tile = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    slot = slots + index * SLOT_WORDS
    kind_and_group = tl.load(slot + GROUP)
    kind, group = kind_and_group & 0xFFFFFFFF, groups + (kind_and_group >> 32) * GROUP_WORDS
    flags = tl.load(group + FLAGS)
    counter = pointer(slot, STEP, tl.float32)
    step = tl.load(counter) + 1.0
    adam = adam_at(group, flags, step, grad_scale, COMPUTE)
    # The last item of the slot to come here knows that all have read the counter.
    tl.debug_barrier()
    started = tl.atomic_add(progress + index * 2, 1) + 1
    if started == tl.load(progress + index * 2 + 1):
        tl.store(progress + index * 2, 0)
        tl.store(counter, step)
    memory = memory_of(slot, grads + index, STORAGE, STATE, COMPUTE)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            if KINDS[i] == SIMPLEX:
                euclidean = (flags & EUCLIDEAN) != 0
                for t in tl.static_range(len(TILES)):
                    if tile == t:
                        step_simplex(slot, memory, adam, euclidean, begin, end, COMPUTE, *TILES[t])
            elif KINDS[i] == SOFTMAX:
                for t in tl.static_range(len(TILES)):
                    if tile == t:
                        step_softmax(slot, memory, adam, begin, end, STORAGE, COMPUTE, *TILES[t])
            else:
                step_elements(KINDS[i], slot, memory, adam, item, STORAGE, COMPUTE, ALIGNED, BLOCK)


@triton.jit
def step_kernel(
    slots,
    grads,
    groups,
    work,
    progress,
    grad_scale,
    found_inf,
    SCALED: tl.constexpr,
    CHECKED: tl.constexpr,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
    STORAGE: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(grad_scale).to(tl.float64) if SCALED else 1.0
    found = tl.load(found_inf) if CHECKED else 0.0
    if found == 0.0:
        item = work + tl.program_id(0) * 4
        take_step(slots, grads, groups, item, progress, scale, KINDS, TILES, STORAGE, STATE, ALIGNED, BLOCK)


def launcher(plan: TablePlan) -> Callable[[Tables, Tensor | None, Tensor | None], None]:
    """What launches the kernel, compiled for the kinds and the shapes of rows that the plan has."""
    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    storage, state = (
        dtypes.get(dtype, tl.float64) for dtype in (plan.slots[0].param.dtype, plan.slots[0].exp_avg.dtype)
    )
    kinds = tuple(KINDS.index(name) for name in sorted(plan.kinds, key=KINDS.index))

    def launch(tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        with device_of(tables.slots):
            step_kernel[(tables.work.shape[0],)](
                *tables,
                tables.progress if grad_scale is None else grad_scale,
                tables.progress if found_inf is None else found_inf,
                SCALED=grad_scale is not None,
                CHECKED=found_inf is not None,
                KINDS=kinds,
                TILES=tuple(plan.tiles),
                STORAGE=storage,
                STATE=state,
                ALIGNED=plan.aligned,
                BLOCK=BLOCK,
                num_warps=8,
            )

    return launch
