"""Operators past the dispatcher: which calls go there, and that nobody can tell from the results."""

from __future__ import annotations

import gc
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_ops as co
from constrained_ops import _direct, _library

pytestmark = pytest.mark.skipif(not _library.has_cpu_library, reason="needs the CPU library")

KERNELS = [(transform, kernel) for transform, kernels in _library.TRANSFORMS.items() for kernel in kernels]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spy:
    """An operator called directly where it can be; what goes to the dispatcher is counted."""

    def __init__(self, transform: str, kernel: str) -> None:
        from constrained_ops import _C

        self.operator, self.dispatched = _library.overload(transform, kernel), 0
        name, _, variant = kernel.partition(".")
        self._call = _C.direct(f"{transform}_{name}" + (f".{variant}" if variant else ""), self._dispatch)

    def _dispatch(self, *args: Any) -> Any:
        self.dispatched += 1
        return self.operator(*args)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


@pytest.fixture
def forward() -> Spy:
    return Spy("bounded", "forward")


def arguments(spy: Spy, transform: str, raw: Tensor, dim: int = 1) -> list[Any]:
    """Of tensors that are like raw: its dtype, its order of dimensions in memory."""
    bijective = _library.TRANSFORMS[transform] is _library.BIJECTION
    x, log_det = _library.empty_bijection(raw, dim, ("x", "log_det")) if bijective else (raw, raw)
    compute = _library.compute_dtype(raw.dtype)

    def value(name: str) -> Any:
        if name in ("dim", "needed", "total"):
            return {"dim": dim, "needed": -1, "total": 1.0}[name]
        if name in ("lower", "upper"):
            side = -1.0 if name == "lower" else 2.0
            return torch.full_like(raw, side, dtype=compute) if spy.operator._overloadname == "tensor" else side
        if name == "raw":
            return raw
        like = {"grad_x": x, "grad_log_det": log_det}.get(name, raw)
        return torch.empty_like(like).copy_(torch.rand(like.shape) + 0.1)

    return [value(argument.name) for argument in spy.operator._schema.arguments]


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_same(got: Any, want: Any) -> None:
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        if a is None:  # not asked for
            assert b.numel() == 0
            continue
        assert type(a) is Tensor and a.dtype == b.dtype and a.stride() == b.stride() and not a.requires_grad
        assert torch.equal(a, b) and a.untyped_storage().resizable()


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "rows": lambda dtype: torch.randn(5, 7).to(dtype),
    "columns": lambda dtype: torch.randn(7, 5).to(dtype).t(),
    "channels_last": lambda dtype: torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last),
    "offset": lambda dtype: torch.randn(36).to(dtype)[1:].view(5, 7),
    "strided": lambda dtype: torch.randn(5, 14).to(dtype)[:, ::2],
    "expanded": lambda dtype: torch.randn(5, 1).to(dtype).expand(5, 7),
    "empty": lambda dtype: torch.empty(0, 7, dtype=dtype),
    "one": lambda dtype: torch.randn(1, 1).to(dtype),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("transform", "kernel"), KERNELS)
def test_direct_calls_are_the_dispatchers(transform: str, kernel: str, layout: str) -> None:
    spy = Spy(transform, kernel)
    for dtype in DTYPES:
        args = arguments(spy, transform, LAYOUTS[layout](dtype))
        assert_same(spy(*args), spy.operator(*args))
        assert spy.dispatched == 0


@pytest.mark.parametrize(("transform", "kernel"), KERNELS)
def test_operands_of_several_layouts(transform: str, kernel: str) -> None:
    spy = Spy(transform, kernel)
    args = arguments(spy, transform, torch.randn(5, 7))
    tensors = [at for at, arg in enumerate(args) if isinstance(arg, Tensor)]
    for other in tensors:
        given = [a.t().contiguous().t() if at == other and a.dim() == 2 else a for at, a in enumerate(args)]
        assert_same(spy(*given), spy.operator(*given))
    assert spy.dispatched == 0


@pytest.mark.parametrize("kernel", [kernel for kernel in _library.ELEMENTWISE if "tensor" in kernel])
@pytest.mark.parametrize("shapes", [((), ()), ((7,), (1,)), ((5, 1), (1, 1, 1)), ((3, 1, 1), (3, 5, 7))], ids=str)
def test_bounds_broadcast(kernel: str, shapes: Any) -> None:
    spy = Spy("bounded", kernel)
    args = arguments(spy, "bounded", torch.randn(3, 5, 7))
    names = [argument.name for argument in spy.operator._schema.arguments]
    at = slice(names.index("lower"), names.index("upper") + 1)
    bounds = [side * (1 + torch.rand(*shape, 2)[..., 0]) for side, shape in zip((-1.0, 1.0), shapes, strict=True)]
    for needed in (1, 7):
        args[-1] = needed if names[-1] == "needed" else args[-1]
        given, expanded = list(args), list(args)
        given[at], expanded[at] = bounds, [bound.expand(3, 5, 7).clone() for bound in bounds]
        assert_same(spy(*given), spy.operator(*given))
        torch.testing.assert_close(spy.operator(*given), spy.operator(*expanded))
    for wrong in ((2,), (7, 1), (1, 3, 5, 7)):
        given[at] = [torch.zeros(wrong), bounds[1]]
        for call in (spy, spy.operator):
            with pytest.raises(RuntimeError, match="lower must broadcast to the shape of raw"):
                call(*given)
    assert spy.dispatched == 0


def test_bounds_that_need_no_conversion() -> None:
    raw, row, number = torch.randn(5, 7), torch.randn(7), torch.tensor(1.0)
    fit = _library.bounds_fit
    assert fit(raw, row, number) and fit(raw.requires_grad_(), raw, row[:1]) and fit(raw.half(), row, row)
    assert fit(torch.nn.Parameter(raw.double()), row.double(), number.double()) and fit(number, number, number)
    assert fit(raw, row, 1) and fit(raw, -math.inf, row) and not fit(1.0, row, row)
    for wrong in (torch.randn(2), torch.randn(7, 1), torch.randn(1, 5, 7), row.double(), row.half(), row.int()):
        assert not fit(raw, wrong, row) and not fit(raw, row, wrong)
    for unusual in (row.to("meta"), row.as_subclass(Subclass), row.to_sparse(), "row", None):
        assert not fit(raw, row, unusual) and not fit(unusual, row, row)
    assert not fit(raw, row) and not fit(raw, row, row, row)
    assert not torch.vmap(lambda each: torch.tensor(fit(each, each, row.double())))(raw).any()


@pytest.mark.parametrize(("transform", "kernel"), [(t, k) for t, k in KERNELS if "backward" in k])
def test_what_is_not_given_and_what_is_not_wanted(transform: str, kernel: str) -> None:
    spy = Spy(transform, kernel)
    args = arguments(spy, transform, torch.randn(5, 7))
    names = {argument.name: at for at, argument in enumerate(spy.operator._schema.arguments)}
    variants = [args]
    for name in ("grad_log_det", "x"):
        if name in names and "Optional" in str(spy.operator._schema.arguments[names[name]].type):
            variants.append([None if at == names[name] else arg for at, arg in enumerate(args)])
    for variant in variants:
        for needed in range(4) if "needed" in names else (-1,):
            given = list(variant)
            if "needed" in names:
                given[names["needed"]] = needed
            if given[names.get("x", 0)] is None and needed & 2 and transform == "projection":
                continue  # refused: see test_errors_are_the_operators
            assert_same(spy(*given), spy.operator(*given))
    assert spy.dispatched == 0


def test_plain_tensors_of_all_kinds(forward: Spy) -> None:
    raw = torch.randn(6)
    want = forward.operator(raw, 0.0, 1.0)
    with torch.inference_mode():
        inference = raw.clone()
        assert forward(inference, 0.0, 1.0).is_inference()
    with torch.no_grad():
        for same in (raw, torch.nn.Parameter(raw), raw.clone().requires_grad_(), inference, raw[None][0]):
            assert_same(forward(same, 0, 1), want)
    assert_same(forward(raw[0], 0.0, 1.0), want[0])
    assert forward.dispatched == 0


class Subclass(Tensor):
    pass


class Wrapper(Tensor):
    """A tensor whose data are in another."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*(a.inner if isinstance(a, cls) else a for a in args))


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "negated_later": lambda: torch._neg_view(torch.tensor([2.0, -1.0])),
    "zero_without_memory": lambda: torch._efficientzerotensor(3),
    "part_of_a_zero_without_memory": lambda: torch._efficientzerotensor(4)[1:],
    "subclass": lambda: torch.randn(3).as_subclass(Subclass),
    "wrapper": lambda: Wrapper(torch.randn(3)),
    "large": lambda: torch.randn(16385),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors_go_to_the_dispatcher(forward: Spy, kind: str) -> None:
    raw = UNUSUAL[kind]()
    got, want = forward(raw, -5.0, 5.0), forward.operator(raw, -5.0, 5.0)
    assert forward.dispatched == 1
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    plain = torch.empty(raw.shape).copy_(raw.inner if isinstance(raw, Wrapper) else raw)
    torch.testing.assert_close(got.as_subclass(Tensor), forward.operator(plain, -5.0, 5.0), rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["bounded", "simplex", "projection"])
def test_meta_tensors_go_to_the_dispatcher(transform: str) -> None:
    spy = Spy(transform, "forward")
    raw = torch.empty(3, 4, device="meta")
    assert spy(*arguments(spy, transform, raw)).is_meta and spy.dispatched == 1


@pytest.mark.parametrize(
    "raw",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(3, dtype=torch.complex64),
        "raw",
    ],
    ids=["sparse", "int32", "complex64", "str"],
)
def test_errors_are_the_dispatchers(forward: Spy, raw: Any) -> None:
    raised = []
    for function in (forward, forward.operator):
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)) as error:
            function(raw, 0.0, 1.0)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1] and forward.dispatched == 1


def test_errors_are_the_operators() -> None:
    raw, longer = torch.zeros(3), torch.zeros(4)
    spy = Spy("bounded", "backward")
    with pytest.raises(RuntimeError, match="bounded: grad_x must have the shape of raw"):
        spy(longer, None, raw, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="bounded: grad_x has the wrong dtype"):
        spy(raw.double(), None, raw, 0.0, 1.0)
    weighted = Spy("projection", "backward.weighted")
    with pytest.raises(RuntimeError, match="project_simplex: the gradient to the weight needs x"):
        weighted(raw, None, raw, raw, 0, 2)
    simplex = Spy("simplex", "forward")
    for dim in (1, -1):
        with pytest.raises(RuntimeError, match="simplex: dim is out of range"):
            simplex(raw, dim)
    assert spy.dispatched == weighted.dispatched == simplex.dispatched == 0
    with pytest.raises(OverflowError):
        simplex(raw, 2**70)


def test_other_numbers_of_arguments_go_to_the_dispatcher() -> None:
    spy = Spy("simplex", "backward")
    raw, grad_x = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(spy(grad_x, raw, 1), spy(grad_x, raw, 1, None), rtol=0, atol=0)
    assert spy.dispatched == 1
    with pytest.raises(RuntimeError, match="missing value for argument 'raw'"):
        spy(grad_x)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watching, Overriding])
def test_modes_see_the_call(forward: Spy, mode: Any) -> None:
    raw = torch.randn(3)
    with mode() as watching:
        forward(raw, 0.0, 1.0)
    assert forward.dispatched == 1 and any("bounded_forward" in name for name in watching.seen)
    forward(raw, 0.0, 1.0)
    assert forward.dispatched == 1


def test_transforms_of_functions_see_the_call(forward: Spy) -> None:
    raws = torch.randn(4, 3)
    got = torch.vmap(lambda raw: forward(raw, 0.0, 1.0))(raws)
    assert forward.dispatched == 1
    assert torch.equal(got, forward(raws, 0.0, 1.0)) and forward.dispatched == 1


def test_profilers_see_the_call(forward: Spy) -> None:
    with torch.profiler.profile() as profile:
        forward(torch.randn(3), 0.0, 1.0)
    assert forward.dispatched == 1
    assert "constrained_ops::bounded_forward" in [event.key for event in profile.key_averages()]


def test_profilers_of_another_thread_see_the_call(forward: Spy) -> None:
    def work() -> None:
        forward(torch.randn(3), 0.0, 1.0)

    with torch.profiler.profile():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert forward.dispatched == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NVTX comes with CUDA")
def test_ranges_of_nvtx_hold_the_call(forward: Spy) -> None:
    with torch.autograd.profiler.emit_nvtx():
        forward(torch.randn(3), 0.0, 1.0)
    assert forward.dispatched == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traces_hold_the_call(forward: Spy) -> None:
    traced = torch.jit.trace(lambda raw: forward(raw, 0.0, 1.0), torch.zeros(3), check_trace=False)
    assert torch.equal(traced(torch.ones(3)), forward(torch.ones(3), 0.0, 1.0))


def test_nothing_is_kept(forward: Spy) -> None:
    raw, strided = torch.randn(8), torch.randn(8, 2)[:, 0]
    spy, args = Spy("bounded", "backward.tensor"), [raw, None, raw.clone(), torch.zeros(8), torch.ones(8), 5]

    def calls() -> None:
        forward(raw, 0.0, 1.0)
        forward(strided, 0.0, 1.0)
        spy(*args)
        for wrong in ((strided, None, None), (raw, 0.0, "1")):
            with pytest.raises((RuntimeError, TypeError)):
                forward(*wrong)

    def counts() -> list[int]:
        gc.collect()
        tensors = sum(type(o) is Tensor for o in gc.get_objects())
        return [tensors, *(sys.getrefcount(o) for o in (raw, strided, *args) if isinstance(o, Tensor))]

    calls()
    before = counts()
    for _ in range(50):
        calls()
    assert counts() == before


def test_bindings_go_with_the_backend() -> None:
    dispatched = _direct.dispatched(_library.overload("bounded", "forward"))

    def references() -> int:
        with co.backend("reference"):
            pass
        return sys.getrefcount(dispatched)

    before = references()
    assert references() == before


def test_threads(forward: Spy) -> None:
    raw = torch.randn(1000)
    want, wrong = forward.operator(raw, 0.0, 1.0), []

    def work() -> None:
        wrong.extend(1 for _ in range(300) if not torch.equal(forward(raw, 0.0, 1.0), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and forward.dispatched == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy("bounded", "forward")
    monkeypatch.setattr(_library._kernels["bounded"], "forward", spy)
    yield spy


def test_public_functions_take_the_direct_road(calls: Spy) -> None:
    raw = torch.randn(20, 64, requires_grad=True)
    co.bounded(raw, 0.0, 1.0).sum().backward()
    with torch.no_grad():
        co.bounded(raw, 0, 1)
    module = torch.nn.Linear(3, 3)
    co.register_constraint(module, "weight", co.Bounded(-1.0, 1.0))
    module(torch.randn(2, 3)).sum().backward()
    assert calls.dispatched == 0


def test_where_the_backend_is_chosen_the_operators_are() -> None:
    kernels = _library._kernels["bounded"]
    direct = type(kernels.forward)
    with co.backend("cpu"):
        assert type(kernels.forward) is not direct
        assert torch.equal(co.bounded(torch.zeros(3), 0.0, 2.0), torch.ones(3))
    assert type(kernels.forward) is direct and direct.__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("missing", ["_len_torch_dispatch_stack", "_are_functorch_transforms_active"])
def test_without_a_private_name_the_dispatcher_has_all(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from constrained_ops import _C

    monkeypatch.delattr(torch._C, missing)
    assert _direct.caller(_C) is _direct.dispatched
