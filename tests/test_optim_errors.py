"""Wrong input to the optimizers: a clear error in the constructor or the step, and nothing has changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from optimizers import UNIT, everything, parameters, run, same
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam, _base, _plans

pytestmark = pytest.mark.usefixtures("backend")


def rejects(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


NAN = float("nan")
# Those of ProjectedAdam's metric apart.
BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr of group 0 must not be negative, got -1.0"),
    ({"lr": torch.tensor(-0.5)}, ValueError, "lr of group 0 must not be negative, got -0.5"),
    ({"lr": torch.tensor(NAN), "capturable": True}, ValueError, "lr of group 0 must not be negative, got nan"),
    ({"lr": torch.ones(2)}, ValueError, "lr of group 0 must be a float or one element, got a tensor of shape (2,)"),
    ({"lr": "0.1"}, TypeError, "lr of group 0 must be a float, got '0.1'"),
    ({"lr": None}, TypeError, "lr of group 0 must be a float, got None"),
    ({"eps": -1e-8}, ValueError, "eps of group 0 must not be negative, got -1e-08"),
    ({"eps": torch.tensor(0.5)}, TypeError, "eps of group 0 must be a float, got tensor(0.5000)"),
    ({"weight_decay": NAN}, ValueError, "weight_decay of group 0 must not be negative, got nan"),
    ({"weight_decay": [0.1]}, TypeError, "weight_decay of group 0 must be a float, got [0.1]"),
    ({"betas": (0.9, 1.0)}, ValueError, "betas of group 0 must be two floats in [0, 1), got (0.9, 1.0)"),
    ({"betas": [NAN, 0.9]}, ValueError, "betas of group 0 must be two floats in [0, 1), got [nan, 0.9]"),
    ({"betas": (0.9,)}, ValueError, "betas of group 0 must be two floats in [0, 1), got (0.9,)"),
    ({"betas": ("0.9", "0.9")}, ValueError, "betas of group 0 must be two floats in [0, 1), got ('0.9', '0.9')"),
    ({"betas": 0.9}, ValueError, "betas of group 0 must be two floats in [0, 1), got 0.9"),
]
bad_options = pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=range(len(BAD_OPTIONS)))


@bad_options
def test_options_out_of_range(kind: type[Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    rejects(error, f"{kind.__name__}: {message}", lambda: kind(parameters(), **options))


@bad_options
def test_options_out_of_range_in_an_added_group_change_nothing(
    kind: type[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = kind(parameters())
    run(optimizer, 1)
    before = everything(optimizer)
    message = f"{kind.__name__}: {message.replace('group 0', 'group 1')}"
    rejects(error, message, lambda: optimizer.add_param_group({"params": parameters(), **options}))
    assert same(before, everything(optimizer))
    run(optimizer, 1)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@bad_options
def test_options_set_out_of_range_change_nothing(
    kind: type[Any], options: dict[str, Any], error: type[Exception], message: str, first: bool
) -> None:
    """Neither parameters nor state nor step counters, however often the step is tried."""
    optimizer = kind([{"params": [p]} for p in parameters()], lr=0.5, constraint=UNIT)
    if not first:
        run(optimizer, 2)
    before, group = everything(optimizer), optimizer.param_groups[1]
    good = {name: group[name] for name in options}
    group.update(options)
    message = f"{kind.__name__}: {message.replace('group 0', 'group 1')}"
    for _ in range(2):
        rejects(error, message, lambda: run(optimizer, 1))
        assert same(before, everything(optimizer))
    group.update(good)
    run(optimizer, 1)
    assert not same(before, everything(optimizer))


def test_values_that_change_within_an_option_are_looked_at(kind: type[Any]) -> None:
    """A learning rate that is a tensor on the CPU, and betas in a list."""
    lr, betas = torch.tensor(0.5, device="cpu"), [0.5, 0.75]
    optimizer = kind(parameters(), lr=lr, betas=betas, constraint=UNIT)
    run(optimizer, 2)
    before = everything(optimizer)
    lr.fill_(-1.0)
    rejects(ValueError, f"{kind.__name__}: lr of group 0 must not be negative, got -1.0", lambda: run(optimizer, 1))
    lr.fill_(0.5)
    betas[1] = 1.5
    message = "betas of group 0 must be two floats in [0, 1), got [0.5, 1.5]"
    rejects(ValueError, f"{kind.__name__}: {message}", lambda: run(optimizer, 1))
    assert same(before, everything(optimizer))
    betas[1] = 0.75
    run(optimizer, 1)


def test_an_option_that_came_with_an_error_is_not_forgotten(kind: type[Any]) -> None:
    optimizer = kind(parameters(), lr=0.1, constraint=UNIT)
    run(optimizer, 2)
    (group,) = optimizer.param_groups
    p = group["params"][0]
    group["amsgrad"] = True
    p.grad = p.grad.to_sparse()
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step()
    assert "max_exp_avg_sq" not in optimizer.state[p]
    run(optimizer, 1)
    assert "max_exp_avg_sq" in optimizer.state[p]


def test_a_learning_rate_that_stays_on_the_device_is_not_waited_for(kind: type[Any]) -> None:
    """A meta tensor has no value that could be read."""
    group = {**kind(parameters()).param_groups[0], "capturable": True, "lr": torch.tensor(0.1, device="meta")}
    assert _base._hyper("", 0, group).lr is group["lr"]
    rejects(ValueError, ": lr of group 0 must be a float or one element, got a tensor of shape (3,)",
            lambda: _base._hyper("", 0, {**group, "lr": torch.zeros(3, device="meta")}))  # fmt: skip


def test_a_metric_that_does_not_exist() -> None:
    message = "ProjectedAdam: metric of group 0 must be 'adam' or 'euclidean', got 'manhattan'"
    rejects(ValueError, message, lambda: ProjectedAdam(parameters(), metric="manhattan"))
    optimizer = ProjectedAdam(parameters())
    run(optimizer, 1)
    before = everything(optimizer)
    optimizer.param_groups[0]["metric"] = "manhattan"
    rejects(ValueError, message, lambda: run(optimizer, 1))
    assert same(before, everything(optimizer))


def test_a_state_dtype_that_does_not_fit(kind: type[Any]) -> None:
    message = f"{kind.__name__}: parameter 0 of group 0 is torch.float32: state_dtype must be torch.float32, got {{}}"
    for dtype in (torch.float16, torch.float64):
        rejects(ValueError, message.format(dtype), lambda: kind(parameters(), state_dtype=dtype))  # noqa: B023


def test_loading_with_a_state_dtype_that_does_not_fit_loads_nothing(kind: type[Any]) -> None:
    optimizer, trained = kind([{"params": [p]} for p in parameters()]), kind([{"params": [p]} for p in parameters()])
    run(optimizer, 1)
    run(trained, 3)
    before = everything(optimizer)
    optimizer.param_groups[1]["state_dtype"] = torch.float16
    message = "parameter 0 of group 1 is torch.float32: state_dtype must be torch.float32, got torch.float16"
    rejects(ValueError, f"{kind.__name__}: {message}", lambda: optimizer.load_state_dict(trained.state_dict()))
    assert same(before, everything(optimizer))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_parameters_that_are_not_floating_point(kind: type[Any], dtype: torch.dtype) -> None:
    p = Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_complex)
    message = f"parameter 0 of group 0 must be float16, bfloat16, float32 or float64, got {dtype}"
    rejects(TypeError, f"{kind.__name__}: {message}", lambda: kind([p], constraint=UNIT))


@pytest.mark.parametrize(
    ("constraint", "value", "message"),
    [
        (UNIT, [0.5, 1.5, -0.25], "must lie in [0.0, 1.0], got 1.5"),
        (UNIT, [0.5, float("nan"), -0.25], "must lie in [0.0, 1.0], got nan"),
        (constraints.positive, [0.5, -2.0, -3.0], "must lie in [0.0, inf], got -3.0"),
        (
            lambda: constraints.less_than(torch.tensor([1.0, 2.0, 3.0])),
            [5.0, 1.0, 8.0],
            "must lie in [-inf, 3.0], got 8.0",
        ),
        (constraints.simplex, [0.75, 0.5, -0.25], "must be non-negative and sum to 1.0 along dim 0, got -0.25"),
        (
            constraints.simplex,
            [0.5, 0.25, 0.125],
            "must be non-negative and sum to 1.0 along dim 0, got a sum of 0.875",
        ),
        (constraints.simplex, [float("nan"), 0.5, 0.5], "must be non-negative and sum to 1.0 along dim 0, got nan"),
    ],
)
def test_a_start_outside_the_constraint(kind: type[Any], constraint: Any, value: list[float], message: str) -> None:
    good, bad = Parameter(torch.rand(2)), Parameter(torch.tensor(value))
    constraint = constraint() if isinstance(constraint, FunctionType) else constraint
    groups = [{"params": [("good", good)]}, {"params": [("bad", bad)], "constraint": constraint}]
    rejects(ValueError, f"{kind.__name__}: parameter 0 ('bad') of group 1 {message}", lambda: kind(groups))
    optimizer = kind([("good", good)])
    before = everything(optimizer)
    rejects(ValueError, f"{kind.__name__}: parameter 0 ('bad') of group 1 {message}",
            lambda: optimizer.add_param_group(groups[1]))  # fmt: skip
    assert same(before, everything(optimizer))
    run(optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_start_on_the_bound_or_off_by_rounding_is_accepted(kind: type[Any], dtype: torch.dtype) -> None:
    kind(
        [Parameter(torch.tensor([0.0, 0.1], dtype=torch.float64).to(dtype))], constraint=constraints.interval(0.0, 0.1)
    )
    kind([Parameter(torch.softmax(torch.randn(100, 50), -1).to(dtype))], constraint=constraints.simplex)
    kind([Parameter(torch.eye(5, dtype=dtype))], constraint=constraints.simplex)


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        (constraints.interval(1.0, 0.0), ValueError, "lower must be less than upper, got lower=1.0 and upper=0.0"),
        (
            constraints.interval(float("nan"), 0.0),
            ValueError,
            "lower must be less than upper, got lower=nan and upper=0.0",
        ),
        (
            lambda: constraints.interval(torch.tensor([0.0, 3.0, 0.0]), torch.ones(3)),
            ValueError,
            "lower must be less than upper, got lower=3.0 and upper=1.0",
        ),
        (
            lambda: constraints.interval(torch.zeros(2), torch.ones(2)),
            ValueError,
            "lower must broadcast to the shape of parameter 0 of group 0; "
            "lower has shape (2,), parameter 0 of group 0 (3,)",
        ),
        (
            lambda: constraints.interval(torch.zeros(2), torch.ones(3)),
            ValueError,
            "lower and upper must broadcast to one shape, got (2,) and (3,)",
        ),
        (
            lambda: constraints.interval(torch.zeros(3, dtype=torch.complex64), 1.0),
            TypeError,
            "lower must be a float or a real Tensor, got dtype torch.complex64",
        ),
        (constraints.interval("0", 1.0), TypeError, "lower must be a float or a Tensor, got str"),
        (co.Simplex(1), IndexError, "dim must be from -1 to 0 for parameter 0 of group 0 of shape (3,), got 1"),
        ("positive", TypeError, "constraint must be an object of torch.distributions.constraints, got str"),
        (
            constraints.interval,
            TypeError,
            "constraint must be an object of torch.distributions.constraints, got _Interval",
        ),
    ],
)
def test_constraints_that_make_no_sense(kind: type[Any], constraint: Any, error: type[Exception], message: str) -> None:
    p = Parameter(torch.full((3,), 0.5))
    constraint = constraint() if isinstance(constraint, FunctionType) else constraint
    rejects(error, f"{kind.__name__}: {message}", lambda: kind([p], constraint=constraint))


@pytest.mark.parametrize(
    "constraint",
    [constraints.lower_cholesky, constraints.boolean, constraints.integer_interval(0, 3), constraints.cat([])],
)
def test_constraints_that_are_not_supported(kind: type[Any], constraint: Any) -> None:
    message = re.escape(f"{kind.__name__}: constraint {constraint} is not supported; supported are interval, ")
    with pytest.raises(
        NotImplementedError, match=f"^{message}.*simplex.*constrained_ops.Bounded, Positive and Simplex$"
    ):
        kind(parameters(), constraint=constraint)


def test_a_simplex_of_no_elements(kind: type[Any]) -> None:
    message = f"{kind.__name__}: parameter 0 of group 0 needs at least one element along dim 1, got shape (3, 0)"
    rejects(ValueError, message, lambda: kind([Parameter(torch.zeros(3, 0))], constraint=constraints.simplex))
    kind([Parameter(torch.zeros(0, 3))], constraint=constraints.simplex)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_gradients_that_cannot_be_used_change_nothing(kind: type[Any], first: bool) -> None:
    p, q = Parameter(torch.rand(4)), Parameter(torch.rand(5, 2))
    optimizer = kind([{"params": [p]}, {"params": [q]}], constraint=UNIT)
    if not first:
        run(optimizer, 2)
    before = everything(optimizer)
    p.grad = torch.ones(4)
    q.grad = torch.ones(5, 2).to_sparse()
    message = f"{kind.__name__}: parameter 0 of group 1"
    rejects(RuntimeError, f"{message} has a gradient of layout torch.sparse_coo; it must be dense", optimizer.step)
    assert same(before, everything(optimizer))
    q.grad = None
    q.grad_dtype = torch.float64
    q.grad = torch.ones(5, 2, dtype=torch.float64)
    rejects(TypeError, f"{message} is torch.float32, its gradient torch.float64", optimizer.step)
    assert same(before, everything(optimizer))
    q.grad = None
    q.grad_dtype = torch.float32
    q.grad = torch.ones(5, 2)
    q.grad.data = torch.ones(2, 2)
    rejects(ValueError, f"{message} has shape (5, 2), its gradient (2, 2)", optimizer.step)
    assert same(before, everything(optimizer))
    q.grad = None
    optimizer.step()
    assert not same(before, everything(optimizer))


@pytest.mark.parametrize("fresh_grad", [True, False])
@pytest.mark.parametrize("shape", [(2, 4), (4, 6), (12,)], ids=str)
def test_a_parameter_that_takes_another_shape_changes_nothing(
    kind: type[Any], shape: tuple[int, ...], fresh_grad: bool
) -> None:
    """As those that prune have it: other memory behind the parameter, or another view of the same."""
    memory = torch.full((24,), 0.5)
    p, q = Parameter(torch.rand(3)), Parameter(memory[:16].view(4, 4))
    optimizer = kind([p, q], constraint=UNIT)
    run(optimizer, 1)
    q.data = memory[: math.prod(shape)].view(shape)
    if fresh_grad:
        q.grad = torch.ones(shape)
    before = [memory.clone(), *everything(optimizer)]
    what = f"its state exp_avg has shape (4, 4), the parameter {shape}"
    if not fresh_grad:
        what = f"has shape {shape}, its gradient (4, 4)"
    with pytest.raises(ValueError, match=re.escape(what)):
        optimizer.step()
    assert same(before, [memory, *everything(optimizer)])
    del optimizer.state[q]
    q.grad = torch.ones(shape)
    optimizer.step()
    assert (q < before[0][: q.numel()].view(shape)).all()
    assert torch.equal(memory[q.numel() :], before[0][q.numel() :])


def test_a_fake_parameter_is_refused(kind: type[Any]) -> None:
    with FakeTensorMode():
        p = Parameter(torch.empty(4))
        p.grad = torch.empty(4)
    optimizer = kind([p])
    message = f"{kind.__name__}: parameter 0 of group 0, a FakeTensor, has no memory for a step to write to"
    rejects(RuntimeError, message, optimizer.step)


def test_a_state_of_another_shape_changes_nothing(kind: type[Any]) -> None:
    optimizer = kind([Parameter(torch.rand(4)), Parameter(torch.rand(3))], constraint=UNIT)
    run(optimizer, 1)
    state = optimizer.state_dict()
    state["state"][1]["exp_avg_sq"] = torch.zeros(7)
    optimizer.load_state_dict(state)
    before = everything(optimizer)
    message = f"{kind.__name__}: parameter 1 of group 0: its state exp_avg_sq has shape (7,), the parameter (3,)"
    rejects(ValueError, message, lambda: run(optimizer, 1))
    assert same(before, everything(optimizer))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", None, "exp_avg must be a Tensor, got None"),
        ("exp_avg_sq", 1.0, "exp_avg_sq must be a Tensor, got 1.0"),
        ("step", "1", "step must be one number, got '1'"),
        ("step", torch.ones(2), "step must be one number, got tensor([1., 1.])"),
    ],
)
def test_a_state_of_another_type_changes_nothing(kind: type[Any], name: str, value: Any, message: str) -> None:
    p, q = Parameter(torch.rand(4)), Parameter(torch.rand(3))
    optimizer = kind([p, q], constraint=UNIT)
    run(optimizer, 1)
    good, optimizer.state[q][name] = optimizer.state[q][name], value
    before = [t.detach().clone() for t in (p, q, *optimizer.state[p].values())]
    rejects(TypeError, f"{kind.__name__}: parameter 1 of group 0: its state {message}", lambda: run(optimizer, 1))
    assert same(before, [p, q, *optimizer.state[p].values()])
    optimizer.state[q][name] = good
    run(optimizer, 1)


def test_a_new_constraint_that_does_not_fit_changes_nothing() -> None:
    p = Parameter(torch.full((4,), 0.9))
    optimizer = ReparametrizedAdam([p], constraint=UNIT)
    run(optimizer, 1)
    before = everything(optimizer)
    optimizer.param_groups[0]["constraint"] = constraints.interval(0.0, 0.5)
    with pytest.raises(
        ValueError, match=r"^ReparametrizedAdam: parameter 0 of group 0 must lie in \[0.0, 0.5\], got 0.9"
    ):
        run(optimizer, 1)
    assert same(before, everything(optimizer))


def test_a_backend_without_optimizers_is_no_silent_fallback(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_plans._plans, ("triton", "cpu"), raising=False)  # other tests may have put one there
    p = Parameter(torch.rand(3, device="cpu"))
    optimizer = kind([p], constraint=UNIT)
    p.grad = torch.ones_like(p)
    with co.backend("triton"):
        message = "backend 'triton' was asked for, and has no optimizers for tensors on 'cpu'"
        rejects(RuntimeError, message, optimizer.step)
    assert not optimizer.state


# --- Input that turns bad between two steps ---------------------------------------------------------------------------

BAD: list[tuple[Any, type[Exception], str]] = [
    (constraints.interval(1.0, 0.0), ValueError, "lower must be less than upper, got lower=1.0 and upper=0.0"),
    (constraints.interval(float("nan"), 1.0), ValueError, "lower must be less than upper, got lower=nan and upper=1.0"),
    (lambda: constraints.interval(torch.zeros(3), 1.0), ValueError,
     "lower must broadcast to the shape of parameter 0 of group 1; "
     "lower has shape (3,), parameter 0 of group 1 (2, 4)"),
    (lambda: constraints.interval(torch.zeros(4, device="meta"), 1.0), ValueError, "lower is on meta, "),
    (co.Simplex(2), IndexError, "dim must be from -2 to 1 for parameter 0 of group 1 of shape (2, 4), got 2"),
    (constraints.lower_cholesky, NotImplementedError, "constraint LowerCholesky() is not supported; "),
    ("positive", TypeError, "constraint must be an object of torch.distributions.constraints, got str"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda case: BAD[case][1].__name__ + str(case))
def test_a_constraint_that_turns_bad_changes_nothing(kind: type[Any], case: int) -> None:
    given, error, message = BAD[case]
    given = given() if isinstance(given, type(lambda: None)) else given
    p, q = Parameter(torch.full((3,), 0.5)), Parameter(torch.full((2, 4), 0.25))
    optimizer = kind([{"params": [p]}, {"params": [q]}], constraint=UNIT)

    def step() -> None:
        for leaf in (p, q):
            leaf.grad = torch.ones_like(leaf)
        optimizer.step()

    step()
    before = everything(optimizer)
    optimizer.param_groups[1]["constraint"] = given

    def expected(group: int) -> str:
        return f"^{kind.__name__}: {re.escape(message.replace('group 1', f'group {group}'))}"

    for _ in range(2):
        with pytest.raises(error, match=expected(1)):
            step()
        assert same(before, everything(optimizer))
    with pytest.raises(error, match=expected(2)):
        optimizer.add_param_group({"params": [Parameter(torch.full((2, 4), 0.25))], "constraint": given})
    assert len(optimizer.param_groups) == 2 and same(before, everything(optimizer))
    optimizer.param_groups[1]["constraint"] = UNIT
    step()
    assert optimizer.state[q]["step"] == 2


def test_a_parameter_that_turns_complex_or_sparse_changes_nothing(kind: type[Any]) -> None:
    p, q = Parameter(torch.full((3,), 0.5)), Parameter(torch.full((4,), 0.5))
    optimizer = kind([p], constraint=UNIT)
    p.grad = torch.ones(3)
    optimizer.step()
    before = everything(optimizer)
    for bad, error, message in (
        (torch.ones(3, dtype=torch.complex64), TypeError, "must be float16, bfloat16, float32 or float64, got torch.c"),
        (torch.tensor([0.5, 1.5]), ValueError, r"must lie in \[0.0, 1.0\], got 1.5$"),
    ):
        with pytest.raises(error, match=rf"^{kind.__name__}: parameter 1 of group 1 {message}"):
            optimizer.add_param_group({"params": [q, Parameter(bad)]})
        assert len(optimizer.param_groups) == 1 and same(before, everything(optimizer))
    optimizer.add_param_group({"params": [q], "constraint": constraints.positive})
    p.grad, q.grad = torch.ones(3), torch.ones(4)
    optimizer.step()
    assert optimizer.state[q]["step"] == 1
