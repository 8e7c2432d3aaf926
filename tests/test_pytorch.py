"""At home in PyTorch: gradcheck, torch.func, torch.compile, opcheck, autocast, checkpointing, graphs and memory."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import constrained_ops as co
from constrained_ops import _library

INF = math.inf
F64 = torch.float64

# name -> function of raw; each has bounds that are floats, or no bounds
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "bounded": lambda raw: co.bounded(raw, -1.0, 2.5),
    "bounded_log_det": lambda raw: co.bounded(raw, -1.0, 2.5, return_log_det=True),
    "lower": lambda raw: co.bounded(raw, -1.0, INF, return_log_det=True),
    "upper": lambda raw: co.bounded(raw, -INF, 2.5, return_log_det=True),
    "unbounded": lambda raw: co.bounded(raw, -INF, INF),
    "positive": lambda raw: co.positive(raw, 0.5),
    "positive_exp": lambda raw: co.positive(raw, kind="exp", return_log_det=True),
    "simplex": lambda raw: co.simplex(raw),
    "simplex_0": lambda raw: co.simplex(raw, 0),
    "ilr": lambda raw: co.simplex(raw, kind="ilr"),
    "ilr_log_det": lambda raw: co.simplex(raw, 0, kind="ilr", return_log_det=True),
    "stick_breaking": lambda raw: co.simplex(raw, kind="stick_breaking"),
    "stick_breaking_log_det": lambda raw: co.simplex(raw, 0, kind="stick_breaking", return_log_det=True),
    "projection": lambda x: co.project_simplex(x, total=2.0),
}
INVERSES: dict[str, Callable[[Tensor], Any]] = {
    "bounded_inverse": lambda x: co.bounded_inverse(x, -1.0, 2.5),
    "lower_inverse": lambda x: co.bounded_inverse(x, -1.0, INF),
    "upper_inverse": lambda x: co.bounded_inverse(x, -INF, 2.5),
    "positive_inverse": lambda x: co.positive_inverse(x, -1.0),
    "positive_exp_inverse": lambda x: co.positive_inverse(x, -1.0, kind="exp"),
    "simplex_inverse": lambda x: co.simplex_inverse(x),
    "ilr_inverse": lambda x: co.simplex_inverse(x, 0, kind="ilr"),
    "stick_breaking_inverse": lambda x: co.simplex_inverse(x, kind="stick_breaking"),
}
everywhere = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def weighted(t: Tensor) -> Tensor:
    return (t * torch.arange(1, t.numel() + 1, dtype=t.dtype, device=t.device).view(t.shape).sin()).sum()


def total(value: Any) -> Tensor:
    """A sum that depends on every entry: a plain one of simplex rows is the same whatever raw is."""
    return sum(map(weighted, value)) if isinstance(value, tuple) else weighted(value)  # type: ignore[return-value]


# --- Derivatives ---------------------------------------------------------------------------------------------------


@everywhere
def test_derivatives(function: Any) -> None:
    raw = leaf(3, 4)
    assert gradcheck(function, raw, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, raw, check_fwd_over_rev=True, check_rev_over_rev=True)


@everywhere
def test_kernels_are_what_gradgradcheck_sees(function: Any) -> None:
    """Second derivatives by the kernels (no graph of the second pass) and by the reference formulas (with one)."""
    raw = leaf(3, 4)
    (grad,) = torch.autograd.grad(total(function(raw)), raw, create_graph=True)
    loss = (grad * grad.detach().cos()).sum()
    if not loss.requires_grad:  # the identity has no second derivative
        return
    by_kernel = torch.autograd.grad(loss, raw, retain_graph=True)[0]
    by_formula = torch.autograd.grad(loss, raw, create_graph=True)[0]
    torch.testing.assert_close(by_kernel, by_formula, rtol=1e-12, atol=1e-13)


@everywhere
def test_forward_mode_where_gradients_are_off(function: Any) -> None:
    raw, tangent = torch.randn(2, 3, 4, dtype=F64, device=DEVICE)
    _, expected = torch.func.jvp(function, (raw,), (tangent,))
    with torch.no_grad(), forward_ad.dual_level():
        along = forward_ad.unpack_dual(first(function(forward_ad.make_dual(raw, tangent)))).tangent
    torch.testing.assert_close(along, first(expected))
    with torch.no_grad():
        torch.testing.assert_close(first(function(raw)), first(function(raw.clone().requires_grad_())))


@pytest.mark.parametrize("function", INVERSES.values(), ids=INVERSES)
def test_derivatives_of_inverses(function: Any) -> None:
    x = torch.rand(3, 4, dtype=F64, device=DEVICE).mul(0.8).add(0.1).requires_grad_()
    assert gradcheck(function, x, check_forward_ad=True)
    assert gradgradcheck(function, x)


TENSOR_BOUNDS = {
    "same_shape": ((3, 4), (3, 4)),
    "row_and_column": ((4,), (3, 1)),
    "scalars": ((), (1, 1)),
    "float_lower": (None, (3, 4)),
    "float_upper": ((4,), None),
}


def make_bounds(lower_shape: Any, upper_shape: Any, infinite: bool) -> tuple[Any, Any]:
    def bound(shape: Any, side: float) -> Any:
        if shape is None:
            return side
        t = side * (1 + torch.rand(shape, dtype=F64, device=DEVICE))
        if infinite and t.numel() > 2:
            t.view(-1)[::3] = side * INF
        return t.requires_grad_()

    return bound(lower_shape, -1.0), bound(upper_shape, 1.0)


@pytest.mark.parametrize("with_log_det", [False, True], ids=["x", "log_det"])
@pytest.mark.parametrize("shapes", TENSOR_BOUNDS.values(), ids=TENSOR_BOUNDS)
def test_derivatives_to_tensor_bounds(shapes: Any, with_log_det: bool) -> None:
    raw, (lower, upper) = leaf(3, 4), make_bounds(*shapes, infinite=False)

    def function(raw: Tensor, lower: Any, upper: Any) -> Any:
        return co.bounded(raw, lower, upper, return_log_det=with_log_det)

    assert gradcheck(function, (raw, lower, upper), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (raw, lower, upper), check_fwd_over_rev=True)


def test_derivatives_where_bounds_are_infinite() -> None:
    raw, (lower, upper) = leaf(5, 4), make_bounds((5, 4), (4,), infinite=True)

    def function(raw: Tensor, low: Tensor, up: Tensor) -> Any:  # finite differences need finite bounds: shift them
        return co.bounded(raw, lower.detach() + low, upper.detach() + up, return_log_det=True)

    shifts = [torch.zeros_like(bound, requires_grad=True) for bound in (lower, upper)]
    assert gradcheck(function, (raw, *shifts), check_forward_ad=True)
    assert gradgradcheck(function, (raw, *shifts))
    x = co.bounded(raw, lower, upper)
    grads = torch.autograd.grad(x.sum(), (raw, lower, upper))
    assert all(grad.isfinite().all() for grad in grads)


def test_derivatives_of_positive_to_its_bound() -> None:
    raw, lower = leaf(3, 4), torch.randn(4, dtype=F64, device=DEVICE, requires_grad=True)
    for kind in ("softplus", "exp"):
        function = lambda raw, lower, kind=kind: co.positive(raw, lower, kind=kind, return_log_det=True)  # noqa: E731
        assert gradcheck(function, (raw, lower), check_forward_ad=True)
        assert gradgradcheck(function, (raw, lower))


def test_only_what_is_asked_for_is_computed() -> None:
    raw, lower, upper = leaf(4), torch.zeros(4, dtype=F64, requires_grad=True), torch.ones(4, dtype=F64)
    for inputs in ((raw,), (lower,), (lower, raw)):
        x = co.bounded(raw, lower.to(DEVICE), upper.to(DEVICE))
        assert all(grad.shape == (4,) for grad in torch.autograd.grad(x.sum(), inputs))
    seen: list[int] = []
    kernels = co.bounded.__globals__["_kernels"]
    original = kernels.backward_tensor
    try:
        kernels.backward_tensor = lambda *args: seen.append(args[-1]) or original(*args)
        torch.autograd.grad(co.bounded(raw.detach(), lower.to(DEVICE), upper.to(DEVICE)).sum(), lower)
        torch.autograd.grad(co.bounded(raw, lower.detach().to(DEVICE), upper.to(DEVICE)).sum(), raw)
    finally:
        kernels.backward_tensor = original
    assert seen == [0b010, 0b001]


# --- torch.func ----------------------------------------------------------------------------------------------------


@everywhere
def test_func_transforms(function: Any) -> None:
    raw = torch.randn(3, 4, dtype=F64, device=DEVICE)
    one = lambda r: first(function(r))  # noqa: E731
    grad = torch.func.grad(lambda r: total(function(r)))(raw)
    leaf_raw = raw.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(function(leaf_raw)), leaf_raw)
    torch.testing.assert_close(grad, expected)
    jacobians = [jac(one)(raw) for jac in (torch.func.jacrev, torch.func.jacfwd)]
    torch.testing.assert_close(*jacobians)
    tangent = torch.randn_like(raw)
    _, by_jvp = torch.func.jvp(one, (raw,), (tangent,))
    torch.testing.assert_close(by_jvp, torch.einsum("abcd,cd->ab", jacobians[0], tangent))
    scalar = lambda r: total(function(r))  # noqa: E731
    hessians = [torch.func.hessian(scalar)(raw), torch.func.jacrev(torch.func.jacrev(scalar))(raw)]
    torch.testing.assert_close(*hessians)


@everywhere
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(function: Any, in_dim: int) -> None:
    raws = torch.randn(2, 3, 4, dtype=F64, device=DEVICE)
    batched = torch.func.vmap(lambda r: first(function(r)), in_dims=in_dim)(raws.movedim(0, in_dim))
    torch.testing.assert_close(batched, torch.stack([first(function(raw)) for raw in raws]))
    grads = torch.func.vmap(torch.func.grad(lambda r: total(function(r))), in_dims=in_dim)(raws.movedim(0, in_dim))
    torch.testing.assert_close(grads, torch.stack([torch.func.grad(lambda r: total(function(r)))(raw) for raw in raws]))


def test_vmap_over_bounds_and_nested() -> None:
    raw, upper = torch.randn(3, dtype=F64, device=DEVICE), torch.rand(5, dtype=F64, device=DEVICE) + 1
    got = torch.func.vmap(lambda u: co.bounded(raw, 0.0, u))(upper)
    torch.testing.assert_close(got, torch.stack([co.bounded(raw, 0.0, float(u)) for u in upper]))
    nested = torch.func.vmap(torch.func.vmap(lambda r: co.simplex(r, 0)))(torch.randn(2, 3, 4, device=DEVICE))
    torch.testing.assert_close(nested.sum(-1), torch.ones(2, 3, device=DEVICE))


@pytest.mark.parametrize("function", [co.bounded, torch.ops.constrained_ops.bounded_forward.tensor])
@pytest.mark.parametrize("in_dims", [dims for dims in itertools.product((0, None), repeat=3) if 0 in dims], ids=str)
def test_vmap_where_bounds_broadcast(in_dims: Any, function: Any) -> None:
    raws, lowers, uppers = (torch.rand(shape, dtype=F64, device=DEVICE) for shape in ((5, 2, 3), (5, 3), (5,)))
    args = [of if dim == 0 else of[0] for of, dim in zip((raws, lowers - 1, uppers + 1), in_dims, strict=True)]
    want = [function(*(a[i] if dim == 0 else a for a, dim in zip(args, in_dims, strict=True))) for i in range(5)]
    torch.testing.assert_close(torch.func.vmap(function, in_dims=in_dims)(*args), torch.stack(want))


def test_wrapper_that_outlived_its_transform() -> None:
    kept = []

    def function(raw: Tensor) -> Tensor:
        kept.append(raw)
        return co.bounded(raw, 0.0, 1.0).sum()

    raw = torch.randn(3, dtype=F64, device=DEVICE)
    torch.func.grad(function)(raw)
    torch.testing.assert_close(co.bounded(kept[0], 0.0, 1.0), co.bounded(raw, 0.0, 1.0))


# --- torch.compile -------------------------------------------------------------------------------------------------


@everywhere
def test_compile_agrees_with_eager(function: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    raw = leaf(3, 4)
    torch.testing.assert_close(first(compiled(raw)), first(function(raw)))
    grads = [torch.autograd.grad(total(f(raw)), raw)[0] for f in (compiled, function)]
    torch.testing.assert_close(*grads)


def test_compile_once_for_all_bounds() -> None:
    """The first bounds are constants to the compiler, the second make them variables, and that is all."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda raw, lower, upper: co.bounded(raw, lower, upper), fullgraph=True, backend=counter)
    raw = torch.randn(8, device=DEVICE, requires_grad=True)
    for i in range(8):
        bounds = (-0.3 - 0.1 * i, 1.7 + 0.3 * i)
        x, expected = compiled(raw, *bounds), co.bounded(raw, *bounds)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), raw)[0] for y in (x, expected)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_inductor_stays_strictly_inside(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda raw: (co.bounded(raw, 0.1, 0.3), co.positive(raw), co.simplex(raw)), fullgraph=True)
    raw = torch.tensor([-INF, -1e4, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 1e4, INF], device=DEVICE).to(dtype)
    x, y, _ = compiled(raw)
    assert ((x.double() > 0.1) & (x.double() < 0.3)).all()
    assert ((y > 0) & y.isfinite()).all()
    torch.testing.assert_close(x, co.bounded(raw, 0.1, 0.3))


def test_compile_with_tensor_bounds() -> None:
    torch._dynamo.reset()
    raw, (lower, upper) = leaf(5, 4), make_bounds((5, 4), (4,), infinite=True)

    def function(raw: Tensor, lower: Tensor, upper: Tensor) -> Any:
        return co.bounded(raw, lower, upper, return_log_det=True)

    outcomes = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        results = f(raw, lower, upper)
        outcomes.append([*results, *torch.autograd.grad(total(results), (raw, lower, upper))])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want)


# --- Operators -----------------------------------------------------------------------------------------------------


def operator_arguments(transform: str, kernel: str) -> tuple[Any, ...]:
    def value(name: str) -> Any:
        if name in ("lower", "upper"):
            side = -1.0 if name == "lower" else 2.0
            return torch.full((), side, device=DEVICE).expand(3, 4) if kernel.endswith(".tensor") else side
        if name in ("weight", "y"):
            return torch.rand(3, 4, device=DEVICE) + 0.5
        bijective = _library.TRANSFORMS[transform] is _library.BIJECTION
        shape = {"grad_x": (3, 5), "grad_log_det": (3,)}.get(name, (3, 4)) if bijective else (3, 4)
        return {"dim": 1, "needed": -1, "total": 1.0}.get(name, torch.randn(shape, device=DEVICE))

    return tuple(value(argument.name) for argument in _library.overload(transform, kernel)._schema.arguments)


@pytest.mark.parametrize(
    ("transform", "kernel"), [(t, k) for t, kernels in _library.TRANSFORMS.items() for k in kernels]
)
def test_opcheck(transform: str, kernel: str) -> None:
    operator, arguments = _library.overload(transform, kernel), operator_arguments(transform, kernel)
    torch.library.opcheck(operator, arguments)
    strided = tuple(a.t().contiguous().t() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(operator, strided)
    if (position := _library._argument_positions(operator).get("needed")) is not None:
        torch.library.opcheck(operator, (*arguments[:position], 2))


# --- Everyday use --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bounded", "positive", "positive_exp", "simplex", "ilr", "stick_breaking_log_det"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_nothing_but_the_leaf_and_the_result(name: str, dtype: torch.dtype) -> None:
    function, raw = FUNCTIONS[name], leaf(4, 8, dtype=dtype)
    kept: list[Tensor] = []

    def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = function(raw)
    x = first(x)
    result = {x.data_ptr()} if name == "simplex" and dtype == torch.float32 else set()
    assert {t.data_ptr() for t in kept} == {raw.data_ptr()} | result
    assert x.data_ptr() != raw.data_ptr()


def test_a_changed_input_is_noticed() -> None:
    raw = leaf(3)
    x = co.bounded(raw, 0.0, 1.0)
    with torch.no_grad():
        raw.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@everywhere
def test_autocast_changes_nothing(function: Any) -> None:
    raw = leaf(3, 4, dtype=torch.float32)
    outside = first(function(raw))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = first(function(raw))
        (grad,) = torch.autograd.grad(inside.sum(), raw)
    assert inside.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    half = function(raw.detach().bfloat16())
    assert first(half).dtype == torch.bfloat16


@everywhere
def test_activation_checkpointing(function: Any) -> None:
    raw = leaf(3, 4)
    plain = torch.autograd.grad(total(function(raw)), raw)[0]
    for use_reentrant in (False, True):
        raw.grad = None
        total(torch.utils.checkpoint.checkpoint(function, raw, use_reentrant=use_reentrant)).backward()
        torch.testing.assert_close(raw.grad, plain)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = torch.nn.Parameter(torch.randn(3, 4))

    def forward(self) -> Tensor:
        return co.simplex(self.raw) * co.bounded(self.raw, -1.0, 1.0) + co.positive(self.raw)


def test_modules_copy_pickle_and_save() -> None:
    model = Model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(), model())
        twin().sum().backward()
        assert twin.raw.grad is not None and model.raw.grad is None
    for function in (co.bounded, co.positive, co.simplex, co.bounded_inverse):
        assert pickle.loads(pickle.dumps(function)) is function


def test_strict_export() -> None:
    exported = torch.export.export(Model(), ())
    torch.testing.assert_close(exported.module()(), exported.module()())


def test_backend_override() -> None:
    raw = torch.randn(4)
    before = co.build_info()["backends"]
    with co.backend("reference"):
        assert set(co.build_info()["backends"].values()) == {"reference"}
        x = co.bounded(raw, 0.0, 1.0)
    assert co.build_info()["backends"] == before
    torch.testing.assert_close(x, co.bounded(raw, 0.0, 1.0))
    with co.backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but raw is on 'meta'"):
        co.bounded(raw.to("meta"), 0.0, 1.0)


def test_meta_and_fake_tensors() -> None:
    """Bounds that no call has seen before are checked with values, where there are none."""
    for i, make in enumerate((lambda: torch.device("meta"), torch._subclasses.FakeTensorMode)):
        with make():
            raw = torch.empty(3, 4)
            x, log_det = co.bounded(raw, 0.125, 1.0625 + i, return_log_det=True)
            assert x.shape == log_det.shape == co.simplex(raw).shape == (3, 4)
            assert co.bounded_inverse(x, 0.125, 3.0625 + i).shape == (3, 4)
            assert co.Bounded(0.125, 5.0625 + i)(raw).shape == co.Positive(0.125)(raw).shape == (3, 4)
            co.optim.ProjectedAdam([raw.requires_grad_()])
            with pytest.raises(ValueError, match="no number strictly between"):
                co.bounded(raw, 1.0, 1.0 + 1e-10)
            with pytest.raises(ValueError, match="lower must be less than upper"):
                co.Bounded(1.0, 0.0)
