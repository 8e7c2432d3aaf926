"""What wrong arguments are told, and what harmless oddities (empty, 0-dim, strided, expanded) give."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

import constrained_ops as co
from constrained_ops import _checks, _library

INF = math.inf
NAN = math.nan

Op = Callable[[Any], Any]
CALLS: dict[str, Op] = {
    "bounded": lambda raw: co.bounded(raw, 0.0, 1.0),
    "bounded_inverse": lambda x: co.bounded_inverse(x, 0.0, 1.0),
    "bounded with tensors": lambda raw: co.bounded(raw, torch.zeros(()), 1.0),
    "bounded_inverse with tensors": lambda x: co.bounded_inverse(x, torch.zeros(()), 1.0),
    "positive": lambda raw: co.positive(raw),
    "positive exp": lambda raw: co.positive(raw, kind="exp"),
    "positive exp with tensors": lambda raw: co.positive(raw, torch.zeros(()), kind="exp"),
    "positive_inverse": lambda x: co.positive_inverse(x),
    "positive_inverse exp": lambda x: co.positive_inverse(x, kind="exp"),
    "simplex": lambda raw: co.simplex(raw),
    "simplex_inverse": lambda x: co.simplex_inverse(x),
    "simplex ilr": lambda raw: co.simplex(raw, kind="ilr"),
    "simplex_inverse ilr": lambda x: co.simplex_inverse(x, kind="ilr"),
    "simplex stick-breaking": lambda raw: co.simplex(raw, kind="stick_breaking"),
    "simplex_inverse stick-breaking": lambda x: co.simplex_inverse(x, kind="stick_breaking"),
}
WRONG_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128]


def op_name(call: str) -> str:
    """The function that was called, with which a message begins."""
    return f"{call.split()[0]}: "


# --- raw --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_raw_that_is_not_floating_point_is_a_type_error(call: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"^{op_name(call)}.*{re.escape(str(dtype))}$"):
        CALLS[call](torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("raw", [0.5, [0.5], None], ids=["float", "list", "None"])
@pytest.mark.parametrize("call", CALLS)
def test_a_raw_that_is_no_tensor_is_a_type_error(call: str, raw: Any) -> None:
    with pytest.raises(TypeError, match=f"^{op_name(call)}.*must be a Tensor, got {type(raw).__name__}$"):
        CALLS[call](raw)


def test_an_array_with_an_accepted_dtype_is_still_no_tensor() -> None:
    numpy = pytest.importorskip("numpy")
    co.bounded(torch.zeros(1), 0.0, 1.0)
    with pytest.raises(TypeError, match=r"^bounded: raw must be a Tensor, got ndarray$"):
        co.bounded(numpy.zeros(3, dtype="float32"), 0.0, 1.0)


# --- Bounds that are floats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(1.0, 0.0), (0.5, 0.5), (0.0, -0.0), (NAN, 1.0), (0.0, NAN), (NAN, NAN), (INF, INF), (-INF, -INF), (INF, -INF)],
)
@pytest.mark.parametrize("op", [co.bounded, co.bounded_inverse])
def test_lower_not_below_upper_is_a_value_error_with_both(op: Op, lower: float, upper: float) -> None:
    with pytest.raises(ValueError, match=f"^{op.__name__}: .*lower={lower} and upper={upper}$"):
        op(torch.full((2,), 0.5), lower, upper)


@pytest.mark.parametrize("lower", [NAN, INF])
@pytest.mark.parametrize("kind", ["softplus", "exp"])
@pytest.mark.parametrize("op", [co.positive, co.positive_inverse])
def test_a_lower_bound_with_nothing_above_is_a_value_error(op: Op, kind: str, lower: float) -> None:
    with pytest.raises(ValueError, match=f"^{op.__name__}: .*lower={lower} and upper=inf$"):
        op(torch.ones(2), lower, kind=kind)


@pytest.mark.parametrize(
    ("dtype", "lower", "upper"),
    [
        (torch.bfloat16, 1.0, 1.001),
        (torch.bfloat16, 1.0, 1.0078125),
        (torch.float16, -1.0, -0.9999),
        (torch.float16, 0.0, 2.0**-24),
        (torch.float32, 1.0, 1.0 + 1e-8),
        (torch.float32, 0.0, 1e-46),
        (torch.float64, 1.0, math.nextafter(1.0, 2.0)),
        (torch.float16, 65504.0, INF),
        (torch.float32, torch.finfo(torch.float32).max, INF),
        (torch.float64, -INF, -torch.finfo(torch.float64).max),
    ],
    ids=str,
)
def test_bounds_with_no_number_in_between_are_a_value_error(dtype: torch.dtype, lower: float, upper: float) -> None:
    raw = torch.zeros(2, dtype=dtype)
    for op in (co.bounded, co.bounded_inverse):
        with pytest.raises(ValueError, match=f"^{op.__name__}: {dtype} has no number") as error:
            op(raw, lower, upper)
        assert f"lower={lower} and upper={upper}" in str(error.value)


@pytest.mark.parametrize("kind", ["softplus", "exp"])
def test_a_lower_bound_that_is_the_largest_number_is_a_value_error(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^positive: torch\.float16 has no number"):
        co.positive(torch.zeros(2, dtype=torch.float16), 65504.0, kind=kind)


@pytest.mark.parametrize(
    ("dtype", "lower", "upper"),
    [
        (torch.float32, -3e38, 3e38),
        (torch.float16, -3e38, 3e38),
        (torch.bfloat16, -3e38, 3e38),
        (torch.float32, -1e39, 0.0),
        (torch.float64, -1.7e308, 1.7e308),
    ],
    ids=str,
)
def test_a_width_that_overflows_is_a_value_error(dtype: torch.dtype, lower: float, upper: float) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    with pytest.raises(ValueError, match=f"^bounded: .*overflows {compute}") as error:
        co.bounded(torch.zeros(2, dtype=dtype), lower, upper)
    assert f"lower={lower} and upper={upper}" in str(error.value)


@pytest.mark.parametrize(("lower", "upper"), [(-1e39, INF), (-INF, 1e39)])
def test_a_finite_bound_beyond_the_compute_dtype_is_a_value_error(lower: float, upper: float) -> None:
    """Taken as infinite it would be another map, and taken as it is, a constant."""
    with pytest.raises(ValueError, match=re.escape(f"lower={lower} and upper={upper}")):
        co.bounded(torch.zeros(2), lower, upper)


def test_a_finite_bound_beyond_the_compute_dtype_is_a_value_error_beside_a_tensor_too() -> None:
    for op in (co.bounded, co.bounded_inverse):
        with pytest.raises(ValueError, match=re.escape("upper overflows torch.float32, got upper=1e+300")):
            op(torch.zeros(2), torch.tensor(-1.0), 1e300)


@pytest.mark.parametrize("bad", ["0", None, [0.0], 1j], ids=repr)
@pytest.mark.parametrize("argument", ["lower", "upper"])
@pytest.mark.parametrize("other", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_a_bound_that_is_no_number_is_a_type_error(argument: str, other: float | Tensor, bad: Any) -> None:
    bounds = {"lower": other, "upper": other} | {argument: bad}
    for op in (co.bounded, co.bounded_inverse):
        with pytest.raises(TypeError, match=f"^{op.__name__}: {argument} must be .*got {type(bad).__name__}$"):
            op(torch.ones(2), **bounds)


def test_integers_serve_as_bounds() -> None:
    raw = torch.linspace(-3, 3, 7)
    assert torch.equal(co.bounded(raw, 0, 2), co.bounded(raw, 0.0, 2.0))
    assert torch.equal(co.positive(raw, 1, kind="exp"), co.positive(raw, 1.0, kind="exp"))


# --- Bounds that are tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("argument", ["lower", "upper"])
def test_a_tensor_bound_that_is_not_real_is_a_type_error(argument: str, dtype: torch.dtype) -> None:
    bounds = {"lower": 0.0, "upper": 2.0} | {argument: torch.ones(3, dtype=dtype)}
    for op in (co.bounded, co.bounded_inverse):
        with pytest.raises(TypeError, match=f"^{op.__name__}: {argument} .*{dtype}$"):
            op(torch.ones(3), **bounds)


def test_a_nan_beside_a_tensor_bound_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^bounded: lower must not be NaN"):
        co.bounded(torch.ones(3), NAN, torch.ones(3))
    with pytest.raises(ValueError, match=r"^bounded: upper must not be NaN"):
        co.bounded(torch.ones(3), torch.ones(3), NAN)


def test_a_nan_in_a_tensor_bound_gives_nan_there_alone() -> None:
    x = co.bounded(torch.zeros(3), torch.tensor([0.0, NAN, -INF]), torch.tensor([1.0, 1.0, NAN]))
    assert x.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("raw_shape", "bound_shape"),
    [((3,), (2,)), ((2, 3), (2,)), ((3,), (2, 3)), ((), (1,)), ((1, 3), (2, 3)), ((0,), (2,))],
)
@pytest.mark.parametrize("argument", ["lower", "upper"])
def test_a_bound_that_does_not_broadcast_is_a_value_error_with_both_shapes(
    argument: str, raw_shape: tuple[int, ...], bound_shape: tuple[int, ...]
) -> None:
    bounds = {"lower": 0.0, "upper": 1.0} | {argument: torch.full(bound_shape, 0.5)}
    for op in (co.bounded, co.bounded_inverse):
        with pytest.raises(ValueError, match=f"^{op.__name__}: {argument} ") as error:
            op(torch.zeros(raw_shape), **bounds)
        assert str(raw_shape) in str(error.value)
        assert str(bound_shape) in str(error.value)


@pytest.mark.parametrize("argument", ["lower", "upper"])
def test_a_bound_on_another_device_is_a_value_error_with_both_devices(argument: str) -> None:
    bounds = {"lower": 0.0, "upper": 1.0} | {argument: torch.full((3,), 0.5, device="meta")}
    with pytest.raises(ValueError, match=f"^bounded: {argument} is on meta, raw on cpu$"):
        co.bounded(torch.zeros(3), **bounds)
    with pytest.raises(ValueError, match=r"^positive: lower is on cpu, raw on meta$"):
        co.positive(torch.zeros(3, device="meta"), torch.zeros(3), kind="exp")


# --- Kinds, dimensions, log-determinants ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [co.positive, co.positive_inverse, co.simplex, co.simplex_inverse])
def test_an_unknown_kind_is_a_value_error_with_the_known_ones(op: Op) -> None:
    known = "'softmax' or 'ilr' or 'stick_breaking'" if op.__name__.startswith("simplex") else "'softplus' or 'exp'"
    with pytest.raises(ValueError, match=f"^{op.__name__}: kind must be {known}, got 'cube'$"):
        op(torch.ones(3), kind="cube")


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 2), ((2, 3), -3), ((), 1), ((), -2), ((4,), 1)])
@pytest.mark.parametrize("op", [co.simplex, co.simplex_inverse])
def test_a_dim_out_of_range_is_an_index_error_with_shape_and_dim(op: Op, shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(IndexError, match=f"^{op.__name__}: dim .*{re.escape(str(shape))}, got {dim}$"):
        op(torch.ones(shape), dim)


@pytest.mark.parametrize(("shape", "dim"), [((0,), 0), ((3, 0), -1), ((0, 3), 0), ((0, 0), 1)])
@pytest.mark.parametrize("op", [co.simplex, co.simplex_inverse])
def test_a_row_of_no_elements_is_a_value_error_with_the_shape(op: Op, shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(ValueError, match=f"^{op.__name__}: .*along dim {dim % len(shape)}.*{re.escape(str(shape))}$"):
        op(torch.ones(shape), dim)


def test_a_log_det_of_the_softmax_is_a_value_error_that_names_the_alternative() -> None:
    with pytest.raises(ValueError, match=r'^simplex: .*no Jacobian determinant.*"ilr" and "stick_breaking"'):
        co.simplex(torch.ones(3), return_log_det=True)


@pytest.mark.parametrize("kind", ["ilr", "stick_breaking"])
def test_a_bijection_of_a_0_dim_tensor_is_a_value_error_and_of_no_elements_it_is_1(kind: str) -> None:
    for op, name in ((co.simplex, "raw"), (co.simplex_inverse, "x")):
        with pytest.raises(ValueError, match=f'^{op.__name__}: {name} .*one dimension for kind "{kind}", got shape'):
            op(torch.ones(()), kind=kind)
    for shape, dim in (((0,), 0), ((3, 0), -1), ((0, 3), 0), ((2, 0, 4), 1)):
        raw = torch.ones(shape, requires_grad=True)
        x, log_det = co.simplex(raw, dim, kind=kind, return_log_det=True)
        assert x.shape[dim] == 1
        assert torch.equal(x, torch.ones_like(x))
        assert torch.equal(log_det, torch.zeros(x.squeeze(dim).shape))
        (x.sum() + log_det.sum()).backward()
        assert raw.grad is not None and raw.grad.shape == shape
        assert co.simplex_inverse(x, dim, kind=kind).shape == shape
    with pytest.raises(ValueError, match=r"^simplex_inverse: .*along dim 0.*\(0,\)$"):
        co.simplex_inverse(torch.ones(0), kind=kind)


# --- Backends ---------------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_a_value_error_with_the_known_ones() -> None:
    with (
        pytest.raises(ValueError, match=r"^backend must be one of cuda, triton, cpu, reference, got 'nonsense'$"),
        co.backend("nonsense"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "flag", "missing"),
    [
        ("cuda", "has_cuda_library", "_C_cuda"),
        ("cpu", "has_cpu_library", "_C"),
        ("triton", "has_triton", "triton"),
    ],
)
def test_a_backend_that_is_not_there_is_a_runtime_error(
    monkeypatch: pytest.MonkeyPatch, name: str, flag: str, missing: str
) -> None:
    monkeypatch.setattr(_library, flag, False)
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available here: .*{missing} "), co.backend(name):
        pass


@pytest.mark.parametrize(("name", "device"), [("cuda", "cpu"), ("cpu", "meta")])
def test_a_backend_meeting_a_tensor_elsewhere_is_a_runtime_error(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    monkeypatch.setattr(_library, f"has_{name}_library", True)
    message = f"constrained_ops.*: backend '{name}' was asked for, but raw is on '{device}'"
    for call in ("bounded", "bounded with tensors", "positive exp", "simplex"):
        with co.backend(name), pytest.raises(RuntimeError, match=message):
            CALLS[call](torch.zeros(3)) if device == "cpu" else co.simplex(torch.zeros(3, device=device))


def test_the_backend_is_what_it_was_after_an_error() -> None:
    before = _library.backend_of("cpu")
    with co.backend("reference"):
        with pytest.raises(ZeroDivisionError), co.backend("cpu"):
            _ = 1 / 0
        assert _library.backend_of("cpu") == "reference"
    assert _library.backend_of("cpu") == before


# --- What autograd says -----------------------------------------------------------------------------------------------

BIJECTIONS = ["simplex ilr", "simplex stick-breaking"]
DIFFERENTIABLE = ["bounded", "bounded with tensors", "positive", "positive exp", "simplex", *BIJECTIONS]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_a_second_backward_without_retain_graph_gets_the_message_of_pytorch(call: str) -> None:
    raw = torch.randn(3, requires_grad=True)
    loss = CALLS[call](raw).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"Trying to backward through the graph a second time"):
        loss.backward()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_a_raw_changed_in_place_before_backward_gets_the_message_of_pytorch(call: str) -> None:
    leaf = torch.randn(3, requires_grad=True)
    raw = leaf + 0
    loss = CALLS[call](raw).sum()
    raw.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


# --- Shapes and layouts that are right --------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.tensor(0.7),
    "0-dim from a stride": lambda: torch.arange(4.0)[2],
    "size 1": lambda: torch.full((1, 1, 1), -0.3),
    "one row": lambda: torch.randn(1, 5),
    "one column": lambda: torch.randn(5, 1),
    "transposed": lambda: torch.randn(4, 6).T,
    "permuted": lambda: torch.randn(3, 4, 5).permute(1, 2, 0),
    "sliced": lambda: torch.randn(7, 9)[1::2, ::3],
    "offset": lambda: torch.randn(65)[1:],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "expanded whole": lambda: torch.tensor(0.2).expand(2, 3),
    "overlapping": lambda: torch.randn(8).as_strided((4, 4), (1, 1)),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}
EMPTY = [(0,), (0, 3), (2, 0, 3)]


def all_orders(call: str, raw: Tensor) -> tuple[Tensor, ...]:
    """The value, its gradient, and the gradient of that one's square."""
    raw = raw.detach().requires_grad_()
    x = CALLS[call](raw)
    weight = torch.arange(1.0, 1.0 + x.numel()).reshape(x.shape)
    (first,) = grad(x, raw, weight, create_graph=True)
    (second,) = grad(first.square().sum(), raw)
    return x.detach(), first.detach(), second


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_layouts_give_what_a_contiguous_copy_gives(call: str, layout: str) -> None:
    raw = LAYOUTS[layout]()
    if raw.dim() == 0 and call in BIJECTIONS:
        return  # a ValueError, see above
    copy = raw.contiguous() if raw.dim() else raw.clone().reshape(1)
    results = all_orders(call, raw)
    for result in results[call in BIJECTIONS :]:
        assert result.shape == raw.shape
    for got, want in zip(results, all_orders(call, copy), strict=True):
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_empty_tensors_give_empty_results(call: str, shape: tuple[int, ...]) -> None:
    if call == "simplex" and shape[-1] == 0:
        shape = (0, 2)
    _, *grads = all_orders(call, torch.empty(shape))
    assert all(result.shape == shape for result in grads)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_log_det_has_the_layout_of_the_value(layout: str) -> None:
    raw = LAYOUTS[layout]()
    for call in (
        lambda r: co.bounded(r, -1.0, 3.0, return_log_det=True),
        lambda r: co.positive(r, kind="exp", return_log_det=True),
    ):
        x, log_det = call(raw)
        assert x.stride() == log_det.stride() == torch.empty_like(raw).stride()
        torch.testing.assert_close(log_det, call(raw.contiguous())[1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("lower_shape", "upper_shape"), [((), (4,)), ((3, 1), (1, 4)), ((1,), (2, 3, 4)), ((2, 1, 1), ())], ids=str
)
def test_bounds_broadcast_and_get_gradients_of_their_own_shape(
    lower_shape: tuple[int, ...], upper_shape: tuple[int, ...]
) -> None:
    raw = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lower = (-1 - torch.rand(lower_shape, dtype=torch.float64)).requires_grad_()
    upper = (1 + torch.rand(upper_shape, dtype=torch.float64)).requires_grad_()
    inputs, weight = (raw, lower, upper), torch.randn(2, 3, 4, dtype=torch.float64)
    x = co.bounded(*inputs)
    plain = lower + (upper - lower) * torch.sigmoid(raw)
    torch.testing.assert_close(x, plain)
    for got, want, of in zip(grad(x, inputs, weight), grad(plain, inputs, weight), inputs, strict=True):
        assert got.shape == of.shape
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("call", DIFFERENTIABLE)
def test_the_default_device_does_not_matter(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.randn(5)
    want = all_orders("bounded", raw) if "tensors" in call else all_orders(call, raw)
    monkeypatch.setattr(_checks, "_accepted", set())  # as at the first call with these bounds
    with torch.device("meta"):
        x = co.bounded(raw, torch.zeros((), device="cpu"), 1.0) if "tensors" in call else CALLS[call](raw)
    assert x.device == raw.device
    torch.testing.assert_close(x, want[0])


@pytest.mark.parametrize("call", ["bounded", "positive", "positive exp", "simplex", *BIJECTIONS])
def test_a_raw_on_the_meta_device_gives_its_shape(call: str) -> None:
    x = CALLS[call](torch.empty(2, 3, device="meta"))
    assert (x.shape, x.device.type, x.dtype) == ((2, 3 + (call in BIJECTIONS)), "meta", torch.float32)
