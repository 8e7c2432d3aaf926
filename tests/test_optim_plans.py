"""What an optimizer compares before each step: in C++ as in Python."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from constrained_ops import _library
from constrained_ops.optim import _plans

pytestmark = pytest.mark.skipif(not _library.has_cpu_library, reason="needs the CPU library")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Subclass(Tensor):
    """Not a plain tensor."""


def test_values_of_dicts() -> None:
    one, two, three = object(), object(), object()
    dicts: list[dict[str, Any]] = [{"a": one, "b": two}, {}, {"a": three}]
    for same_values in (_plans.same_values, _plans._same_values):
        assert same_values(dicts, [one, two, three]) and same_values([], []) and same_values([{}], [])
        for others in ([one, two], [one, two, three, one], [two, one, three], [one, two, object()], []):
            assert not same_values(dicts, others)
        assert not same_values([], [one])
    assert _plans.same_values is not _plans._same_values


def test_layouts_of_many_tensors() -> None:
    """By DLPack of what is plain, by Python of what is not."""
    plain = torch.randn(4, 6)
    tensors = [
        *(plain.to(dtype) for dtype in DTYPES),
        *(plain.T, plain[:, ::2], plain[:2], plain[0], plain[0, 0], plain[:0], plain[:1].expand(4, 6)),
        plain.requires_grad_(),
        *(plain.int(), plain.bool(), torch.view_as_complex(plain.view(12, 2)), torch.nn.Parameter(plain.half().T)),
        *(plain.to("meta").T, plain.detach().as_subclass(Subclass)),
    ]
    layouts = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr()) for tensor in tensors]
    anywhere = [(*layout[:3], None) for layout in layouts]
    for same_layouts in (_plans.same_layouts, _plans._same_layouts):
        for tensor, own, own_anywhere in zip(tensors, layouts, anywhere, strict=True):
            for layout in layouts:
                assert same_layouts([tensor], [layout]) == (layout == own)
            for layout in anywhere:
                assert same_layouts([tensor], [layout]) == (layout == own_anywhere)
        assert same_layouts(tensors, layouts) and same_layouts(tensors, anywhere) and same_layouts([], [])
        assert not same_layouts(tensors[1:], layouts)
        assert not same_layouts(tensors[::-1], layouts)
    assert _plans.same_layouts is not _plans._same_layouts


def test_gradients_of_what_is_as_it_was() -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (1, 2, 3)]
    first, second, third = params
    for p in (first, third):
        p.grad = torch.randn_like(p)
    grads, plain, none = [first.grad, third.grad], torch.Tensor, type(None)
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second, third], "lr": 0.1}]
    states: list[dict[str, Any]] = [{"step": torch.zeros(())}, {"step": torch.zeros(()), "exp_avg": torch.zeros(3)}]
    state: dict[Any, Any] = defaultdict(dict, {first: states[0], third: states[1]})
    values = [value for known in states for value in known.values()]
    expected = (params, [plain, none, plain], [True, False, True], list(states), states, values)

    def same(some: list[Any] | None, others: list[Any]) -> bool:
        return some is not None and len(some) == len(others) and all(map(operator.is_, some, others))

    for gradients in (_plans.gradients, _plans._gradients):
        assert same(gradients(groups, state, *expected), grads)
        assert same(gradients(groups, state, *expected[:2], None, *expected[3:]), [grads[0], None, grads[1]])
        assert same(gradients([], {}, [], [], None, [], [], []), [])
        more: dict[str, Any] = {"params": [torch.nn.Parameter(first.detach())]}
        for others in (groups[:1], groups[::-1], [*groups, more], [more, *groups[1:]], []):
            assert gradients(others, state, *expected) is None
        for other in ({}, {first: states[0]}, {**state, second: {}}, {third: states[1], first: states[0]}):
            assert gradients(groups, other, *expected) is None
        state[first] = dict(states[0])
        assert gradients(groups, state, *expected) is None
        state[first] = states[0]
        moment = states[1].pop("exp_avg")
        assert gradients(groups, state, *expected) is None
        states[1]["exp_avg"] = moment.clone()
        assert gradients(groups, state, *expected) is None
        states[1].update(exp_avg=moment, raw=moment)
        assert gradients(groups, state, *expected) is None
        del states[1]["raw"]
        assert same(gradients(groups, state, *expected), grads)
        for p, grad in ((second, torch.randn(2)), (first, None), (first, torch.randn(1).as_subclass(Subclass))):
            was, p.grad = p.grad, grad
            assert gradients(groups, state, *expected) is None
            p.grad = was
    assert _plans.gradients is not _plans._gradients
