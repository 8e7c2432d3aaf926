"""The transforms as modules: alone, in torch.nn.utils.parametrize, saved, copied, and what they reject."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import constrained_ops as co

pytestmark = pytest.mark.usefixtures("device")


def lower() -> torch.Tensor:
    return torch.tensor([-1.0, 0.0, -math.inf])


def upper() -> torch.Tensor:
    return torch.tensor([1.0, math.inf, 2.0])


MODULES: dict[str, Any] = {
    "bounded": lambda: co.Bounded(-1.0, 2.0),
    "bounded with tensors": lambda: co.Bounded(lower(), upper()),
    "bounded with a tensor": lambda: co.Bounded(lower(), 5.0),
    "positive": lambda: co.Positive(),
    "positive exp": lambda: co.Positive(0.5, kind="exp"),
    "positive with a tensor": lambda: co.Positive(torch.tensor([0.0, 1.0, 2.0])),
    "simplex": lambda: co.Simplex(),
    "simplex along 0": lambda: co.Simplex(0),
    "ilr": lambda: co.Simplex(kind="ilr"),
    "stick-breaking along 0": lambda: co.Simplex(0, "stick_breaking"),
}


@pytest.fixture(params=MODULES)
def module(device: str, request: pytest.FixtureRequest) -> nn.Module:
    return MODULES[request.param]()


def test_right_inverse_is_the_inverse(module: Any) -> None:
    x = module(torch.randn(4, 3, dtype=torch.float64))
    torch.testing.assert_close(module(module.right_inverse(x)), x)
    module.record().on("here", x).check("x", x)


def test_it_is_the_function(module: Any) -> None:
    raw = torch.randn(4, 3)
    if isinstance(module, co.Bounded):
        want = co.bounded(raw, module.lower, module.upper)
    elif isinstance(module, co.Positive):
        want = co.positive(raw, module.lower, kind=module.kind)
    else:
        want = co.simplex(raw, module.dim, kind=module.kind)
    assert torch.equal(module(raw), want)


def test_register_parametrization_keeps_the_weight_inside_and_the_value(module: Any) -> None:
    value = module(torch.randn(4, 3)).detach()
    layer = nn.Linear(value.shape[1], value.shape[0])
    with torch.no_grad():
        layer.weight.copy_(value)
    parametrize.register_parametrization(layer, "weight", module)
    torch.testing.assert_close(layer.weight, value)
    layer(torch.randn(2, value.shape[1])).sum().backward()
    assert layer.parametrizations.weight.original.grad.shape == (4, 3)
    other = module(torch.randn(4, 3)).detach()
    layer.weight = other
    torch.testing.assert_close(layer.weight, other)


def test_copies_and_pickles(module: Any) -> None:
    raw = torch.randn(4, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(raw), module(raw))
        assert repr(other) == repr(module)


def test_tensor_bounds_are_buffers_and_parameters_stay_parameters() -> None:
    module = co.Bounded(lower(), nn.Parameter(torch.full((3,), 4.0)))
    assert set(module.state_dict()) == {"lower", "upper"}
    assert dict(module.named_buffers()).keys() == {"lower"}
    assert dict(module.named_parameters()).keys() == {"upper"}
    module(torch.zeros(3)).sum().backward()
    assert module.upper.grad is not None
    assert module.double().lower.dtype == torch.float64
    assert module.to("meta").lower.is_meta
    assert not co.Bounded(0.0, 1.0).state_dict()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: co.Bounded(0.0, 1.0), "Bounded(lower=0.0, upper=1.0)"),
        (lambda: co.Bounded(lower(), 5), "Bounded(lower=tensor of shape (3,), upper=5)"),
        (lambda: co.Positive(2.0, "exp"), "Positive(lower=2.0, kind='exp')"),
        (lambda: co.Simplex(1), "Simplex(dim=1, kind='softmax')"),
    ],
)
def test_repr(make: Any, text: str) -> None:
    assert repr(make()) == text


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (lambda: co.Bounded(0.0, 1.0), [0.5, 2.0, -3.0], "Bounded: value must lie in [0.0, 1.0], got -3.0"),
        (lambda: co.Bounded(lower(), upper()), [0.0, -0.5, 0.0], "Bounded: value must lie in [0.0, inf], got -0.5"),
        (lambda: co.Positive(1.0), [2.0, 0.5, math.nan], "Positive: value must lie in [1.0, inf], got nan"),
        (lambda: co.Positive(1.0, "exp"), [2.0, 0.5, 3.0], "Positive: value must lie in [1.0, inf], got 0.5"),
        (
            lambda: co.Simplex(),
            [0.5, 0.25, 0.5],
            "Simplex: value must be non-negative and sum to 1.0 along dim 0, got a sum of 1.25",
        ),
        (
            lambda: co.Simplex(),
            [0.5, -0.25, 0.75],
            "Simplex: value must be non-negative and sum to 1.0 along dim 0, got -0.25",
        ),
    ],
)
def test_values_outside_are_rejected_with_bounds_and_the_worst(make: Any, value: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().right_inverse(torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_on_the_bound_are_accepted(dtype: torch.dtype) -> None:
    for module, value in (
        (co.Bounded(-1.0, 0.1), [-1.0, 0.1]),
        (co.Positive(), [0.0, 1.0]),
        (co.Positive(1.0, "exp"), [1.0, 2.0]),
        (co.Simplex(), [0.0, 1.0]),
        (co.Simplex(kind="ilr"), [0.0, 1.0]),
        (co.Simplex(kind="stick_breaking"), [0.0, 1.0]),
    ):
        x = torch.tensor(value, dtype=torch.float64).to(dtype)
        raw = module.right_inverse(x)
        assert raw.isfinite().all()
        torch.testing.assert_close(module(raw), x, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: co.Bounded(1.0, 0.0),
            ValueError,
            "Bounded: lower must be less than upper, got lower=1.0 and upper=0.0",
        ),
        (
            lambda: co.Bounded(lower(), torch.tensor([0.0, -1.0, 0.0])),
            ValueError,
            "Bounded: lower must be less than upper, got lower=0.0 and upper=-1.0",
        ),
        (
            lambda: co.Bounded(torch.tensor([0.0, math.nan]), 1.0),
            ValueError,
            "Bounded: lower must be less than upper, got lower=nan and upper=1.0",
        ),
        (lambda: co.Bounded("0", 1.0), TypeError, "Bounded: lower must be a float or a Tensor, got str"),
        (
            lambda: co.Positive(math.nan),
            ValueError,
            "Positive: lower must be less than upper, got lower=nan and upper=inf",
        ),
        (lambda: co.Positive(-math.inf), ValueError, "Positive: lower must be finite, got lower=-inf"),
        (lambda: co.Positive(kind="square"), ValueError, "Positive: kind must be 'softplus' or 'exp', got 'square'"),
        (
            lambda: co.Simplex(kind="square"),
            ValueError,
            "Simplex: kind must be 'softmax' or 'ilr' or 'stick_breaking', got 'square'",
        ),
    ],
)
def test_what_makes_no_sense_is_rejected(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


# --- Tensor bounds are fitted to raw once: whatever changes them afterwards has to show ------------------------------


def _write(module: Any) -> None:
    module.lower.sub_(1.0)


def _other_memory(module: Any) -> None:
    module.lower.data = module.lower - 1.0


def _other_tensor(module: Any) -> None:
    module.lower = module.lower - 1.0


def _other_number(module: Any) -> None:
    module.upper = 7.0


def _number_for_a_tensor(module: Any) -> None:
    del module.lower
    module.lower = -3.0


def _other_dtype(module: Any) -> None:
    module.double()
    module.lower.sub_(1.0)


def _half(module: Any) -> None:
    module.half()
    module.lower.sub_(1.0)


def _assigned(module: Any) -> None:
    module.load_state_dict({name: bound.clone() for name, bound in module.state_dict().items()}, assign=True)
    module.lower.sub_(1.0)


CHANGES = [_write, _other_memory, _other_tensor, _other_number, _number_for_a_tensor, _other_dtype, _half, _assigned]


@pytest.mark.parametrize("raw_dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_bounds_show(change: Any, raw_dtype: torch.dtype) -> None:
    module = co.Bounded(torch.tensor([-1.0, 0.0, -math.inf]), 2.0)
    raw = torch.linspace(-2, 2, 6).view(2, 3).to(raw_dtype)
    before = [module(raw) for _ in range(2)]
    change(module)
    for _ in range(2):
        after = module(raw)
        torch.testing.assert_close(after, co.bounded(raw, module.lower, module.upper), rtol=0, atol=0)
        assert change is _half or change is _assigned or not torch.equal(after, before[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_bounds_of_their_own(copied: Any) -> None:
    module = co.Positive(torch.tensor([0.0, 1.0, 2.0]))
    raw = torch.randn(2, 3)
    before = module(raw), module(raw)
    other = copied(module)
    other.lower.add_(1.0)
    torch.testing.assert_close(other(raw), co.positive(raw, other.lower), rtol=0, atol=0)
    torch.testing.assert_close(module(raw), before[1], rtol=0, atol=0)


def test_raws_of_any_shape_and_dtype_in_turn() -> None:
    module = co.Bounded(lower(), upper())
    for shape, dtype in [
        ((3,), torch.float32),
        ((2, 3), torch.float32),
        ((2, 3), torch.float64),
        ((3,), torch.float32),
    ]:
        raw = torch.randn(shape, dtype=dtype)
        for _ in range(2):
            torch.testing.assert_close(module(raw), co.bounded(raw, module.lower, module.upper), rtol=0, atol=0)
    for wrong, error in [
        (torch.randn(2), ValueError),
        (torch.ones(3, dtype=torch.int32), TypeError),
        ([1.0], TypeError),
    ]:
        with pytest.raises(error, match="bounded: "):
            module(wrong)


def test_bounds_that_begin_to_want_a_gradient_get_one() -> None:
    module = co.Bounded(torch.zeros(3), torch.ones(3))
    raw = torch.randn(2, 3, requires_grad=True)
    module(raw), module(raw)
    module.lower.requires_grad_()
    (grad,) = torch.autograd.grad(module(raw).sum(), module.lower)
    torch.testing.assert_close(grad, torch.sigmoid(-raw).detach().sum(0))


def test_a_bound_written_to_before_backward_is_noticed() -> None:
    module = co.Bounded(torch.zeros(3), torch.ones(3))
    raw = torch.randn(2, 3, requires_grad=True)
    module(raw)
    x = module(raw)
    module.lower.sub_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_bounds_that_stand_for_others() -> None:
    module = co.Bounded(torch.zeros(3), torch.ones(3))
    raw, lowers, upper = torch.randn(2, 3), torch.tensor([[-1.0] * 3, [-2.0] * 3]), torch.ones(3)
    before = module(raw), module(raw)

    def called(lower: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"lower": lower}, (raw,))

    expected = torch.stack([co.bounded(raw, lower, upper) for lower in lowers])
    torch.testing.assert_close(torch.vmap(called)(lowers), expected)
    torch.testing.assert_close(torch.stack([called(lower) for lower in lowers]), expected)
    _, tangent = torch.func.jvp(called, (lowers[0],), (torch.ones(3),))
    torch.testing.assert_close(tangent, torch.sigmoid(-raw))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lowers[0], torch.ones(3))
        x = called(dual)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(x).tangent, torch.sigmoid(-raw))
    torch.testing.assert_close(module(raw), before[1], rtol=0, atol=0)


def test_a_mode_sees_what_happens_to_the_bounds() -> None:
    module = co.Bounded(torch.zeros(3), torch.ones(3))
    raw = torch.randn(2, 3)
    module(raw), module(raw)
    graph = make_fx(lambda lower: torch.func.functional_call(module, {"lower": lower}, (raw,)))(module.lower)
    other = torch.full((3,), -5.0)
    torch.testing.assert_close(graph(other), co.bounded(raw, other, module.upper))


def test_bounds_of_another_class() -> None:
    class Own(torch.Tensor):
        pass

    module = co.Bounded(torch.zeros(3), torch.ones(3).as_subclass(Own))
    raw = torch.randn(2, 3)
    torch.testing.assert_close(module(raw), co.bounded(raw, module.lower, module.upper), rtol=0, atol=0)


def test_bounds_of_no_dimension() -> None:
    raw = torch.randn(2, 3, requires_grad=True)
    for module in (
        co.Bounded(torch.tensor(-1.0), torch.tensor(2.0)),
        co.Positive(torch.tensor(0.5, dtype=torch.float64)),
    ):
        for change in (0.0, -1.0):
            module.lower.data.add_(change)  # not counted as a write
            for _ in range(2):
                x = module(raw)
                expected = co.bounded(raw, module.lower, getattr(module, "upper", math.inf))
                torch.testing.assert_close(x, expected)
                grads = [torch.autograd.grad(y.sum(), raw)[0] for y in (x, expected)]
                torch.testing.assert_close(*grads)
    module.lower.requires_grad_()
    (grad,) = torch.autograd.grad(module(raw).sum(), module.lower)
    torch.testing.assert_close(grad, torch.tensor(6.0, dtype=torch.float64))
