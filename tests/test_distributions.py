"""The transforms of ``constrained_ops.distributions``: PyTorch's own checks of a transform, in our words, PyTorch's
transforms as the measure, and the registries that hand them out.
"""

from __future__ import annotations

import copy
import functools
import operator
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Dirichlet,
    Normal,
    TransformedDistribution,
    Uniform,
    biject_to,
    constraints,
    transform_to,
    transforms,
)

import constrained_ops as co
from constrained_ops import distributions

LOWER, UPPER = torch.tensor([-1.0, 0.0, 3.0]).double(), torch.tensor([[3.5], [8.0]]).double()

CONSTRAINTS: dict[str, Any] = {
    "unit interval": constraints.unit_interval,
    "interval": constraints.interval(-1.0, 2.5),
    "interval of integers": constraints.interval(-1, 3),
    "interval of tensors": constraints.interval(LOWER, UPPER),
    "half-open interval": constraints.half_open_interval(0.5, UPPER[0, 0]),
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "greater than": constraints.greater_than(0.5),
    "greater than or equal": constraints.greater_than_eq(LOWER),
    "less than": constraints.less_than(-1.5),
    "less than tensors": constraints.less_than(UPPER),
    "simplex": constraints.simplex,
    "independent": constraints.independent(constraints.interval(LOWER, 4.0), 1),
    "independent twice": constraints.independent(constraints.independent(constraints.positive, 1), 1),
    "stack": constraints.stack([constraints.positive, constraints.unit_interval, constraints.less_than(1.0)], -1),
    "cat": constraints.cat([constraints.interval(0.0, 2.0), constraints.positive], -1, [2, 1]),
    "real": constraints.real,
}
REGISTRIES = {"biject_to": biject_to, "transform_to": transform_to}


@pytest.fixture(params=CONSTRAINTS)
def constraint(request: pytest.FixtureRequest) -> Any:
    return CONSTRAINTS[request.param]


@pytest.fixture(params=REGISTRIES)
def registry(request: pytest.FixtureRequest) -> Any:
    return REGISTRIES[request.param]


def ours(registry: Any, constraint: Any) -> Any:
    with distributions.installed():
        return registry(constraint)


def raws(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(shape or (2, 3), dtype=dtype)


# --- A transform as such -------------------------------------------------------------------------------------------


def test_it_is_pytorchs_map(registry: Any, constraint: Any) -> None:
    fused, theirs, x = ours(registry, constraint), registry(constraint), raws()
    y = theirs(x)
    torch.testing.assert_close(fused(x), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fused.inv(y), theirs.inv(y), rtol=1e-10, atol=1e-10)
    assert fused.bijective == theirs.bijective
    if fused.bijective:
        wanted = theirs.log_abs_det_jacobian(x, y)
        torch.testing.assert_close(fused.log_abs_det_jacobian(x, y), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fused.inv.log_abs_det_jacobian(y, x), -wanted, rtol=1e-12, atol=1e-12)
    else:
        with pytest.raises(NotImplementedError):
            fused.log_abs_det_jacobian(x, y)


def test_inverse(registry: Any, constraint: Any) -> None:
    t, x = ours(registry, constraint), raws()
    y = t(x)
    assert t.inv.inv is t
    torch.testing.assert_close(t(t.inv(y)), y)
    if t.bijective:
        torch.testing.assert_close(t.inv(y), x)
    assert constraint.check(t(t.inv(y))).all()


def test_log_det_is_that_of_the_jacobian(constraint: Any) -> None:
    """That of a simplex is taken without the last element, which the others determine."""
    t, x = ours(biject_to, constraint), raws()
    jacobian = torch.autograd.functional.jacobian(lambda x: t(x)[:, :3].reshape(6), x).reshape(6, 6)
    torch.testing.assert_close(t.log_abs_det_jacobian(x, t(x)).sum(), torch.linalg.slogdet(jacobian).logabsdet)


def test_gradients_are_pytorchs(registry: Any, constraint: Any) -> None:
    """Of y and of the log-determinant together, and second ones."""
    results = []
    x = raws().requires_grad_()
    for t in (ours(registry, constraint), registry(constraint)):
        y = t(x)
        loss = (y * y).sum()
        if t.bijective:
            loss = loss + t.log_abs_det_jacobian(x, y).sin().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_shapes_are_those_it_says(registry: Any, constraint: Any) -> None:
    t, x = ours(registry, constraint), raws(4, 2, 3)
    y = t(x)
    assert t.forward_shape(x.shape) == y.shape and t.inverse_shape(y.shape) == t.inv(y).shape == x.shape
    assert t.domain.event_dim == registry(constraint).domain.event_dim
    assert t.codomain.event_dim == constraint.event_dim
    if t.bijective:
        assert t.log_abs_det_jacobian(x, y).shape == registry(constraint).log_abs_det_jacobian(x, y).shape


def test_a_vector_transform_needs_a_vector() -> None:
    for t in (distributions.StickBreakingTransform(), distributions.SoftmaxTransform()):
        with pytest.raises(ValueError, match="Too few dimensions"):
            t.forward_shape(torch.Size())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_y_is_inside_however_far_x_is_out(registry: Any, constraint: Any, dtype: torch.dtype) -> None:
    t = ours(registry, constraint)
    x = raws(50, 2, 3, dtype=dtype) * torch.tensor([1, 10, 100, 3, 30], dtype=dtype).repeat(10)[:, None, None]
    y = t(x)
    assert y.dtype == dtype
    if constraint is constraints.simplex:  # whose own check of the sum knows one tolerance for all dtypes
        assert (y > 0).all() and (y.double().sum(-1) - 1).abs().max() < 4 * torch.finfo(dtype).eps
        return
    if not isinstance(constraint, type(constraints.real)):
        assert t.codomain.check(y).all() and constraint.check(y).all()
    if dtype == torch.float64 and t.bijective:
        assert t.inv(y).isfinite().all()


def test_codomain_is_open_and_sign_says_the_direction() -> None:
    t = distributions.IntervalTransform(0.0, 1.0)
    assert t.domain is constraints.real and t.sign == 1
    assert (t.codomain.lower_bound, t.codomain.upper_bound) == (0.0, 1.0)
    t = distributions.GreaterThanTransform(2.0)
    assert t.codomain.lower_bound == 2.0 and t.sign == 1 and not t.codomain.check(torch.tensor(2.0))
    t = distributions.LessThanTransform(2.0)
    assert t.codomain.upper_bound == 2.0 and t.sign == -1 and t(torch.tensor(1.0)) < t(torch.tensor(0.0))
    for t in (distributions.SoftmaxTransform(), distributions.StickBreakingTransform()):
        assert t.domain is constraints.real_vector and t.codomain is constraints.simplex
    for name in ("unit interval", "interval of tensors", "positive", "less than", "less than tensors"):
        theirs, fused = biject_to(CONSTRAINTS[name]), ours(biject_to, CONSTRAINTS[name])
        assert (torch.as_tensor(theirs.sign) == fused.sign).all()


def test_values_on_the_boundary_have_a_finite_inverse_and_those_outside_none() -> None:
    t = ours(biject_to, constraints.interval(-1.0, 1.0))
    inverse = t.inv(torch.tensor([-1.0, 1.0, -1.5, 1.5]))
    assert inverse[:2].isfinite().all() and inverse[2:].isnan().all()
    assert ours(biject_to, constraints.positive).inv(torch.zeros(2)).isfinite().all()
    assert ours(biject_to, constraints.less_than(0.0)).inv(torch.tensor([0.0, 1.0])).isfinite().tolist() == [
        True,
        False,
    ]
    for registry in REGISTRIES.values():
        assert ours(registry, constraints.simplex).inv(torch.tensor([1.0, 0.0, 0.0])).isfinite().all()


# --- Bounds --------------------------------------------------------------------------------------------------------


def test_bounds_get_their_gradients_one_element_or_more() -> None:
    """As from PyTorch's transforms, which add and multiply: a prior's bounds may be learned."""
    for shape in ((), (3,)):
        lower, upper = torch.full(shape, -1.0, dtype=torch.float64), torch.full(shape, 2.0, dtype=torch.float64)
        lower.requires_grad_(), upper.requires_grad_()
        x, bounds = raws(), (lower, upper)
        for constraint in (
            Uniform(lower, upper, validate_args=False).support,
            constraints.greater_than(lower),
            constraints.less_than(upper),
        ):
            got, wanted = (
                torch.autograd.grad(
                    (t(x) ** 2).sum() + t.log_abs_det_jacobian(x, t(x)).sum(), bounds, allow_unused=True
                )
                for t in (ours(biject_to, constraint), biject_to(constraint))
            )
            torch.testing.assert_close(got, wanted)


def test_bounds_larger_than_x_make_y_larger(registry: Any) -> None:
    for constraint in (
        constraints.interval(torch.zeros(4, 3), torch.ones(3)),
        constraints.greater_than(torch.zeros(4, 3)),
        constraints.less_than(torch.zeros(4, 3)),
    ):
        fused, theirs = ours(registry, constraint), registry(constraint)
        for shape in ((), (3,), (4, 1), (2, 1, 3)):
            x = torch.randn(shape)
            y = fused(x)
            assert y.shape == fused.forward_shape(x.shape) == theirs.forward_shape(x.shape)
            torch.testing.assert_close(y, theirs(x))
            expanded = x.expand(y.shape)
            wanted = theirs.log_abs_det_jacobian(expanded, theirs(x))  # PyTorch's own wants x as large as the bounds
            torch.testing.assert_close(fused.log_abs_det_jacobian(x, y), wanted)


def test_bounds_of_one_element_may_be_on_the_cpu_wherever_x_is() -> None:
    """As PyTorch's arithmetic takes them."""
    x = torch.empty(3, device="meta")
    for t in (
        distributions.IntervalTransform(torch.tensor(0.0), torch.tensor(1.0)),
        distributions.GreaterThanTransform(torch.tensor(0.0)),
        distributions.LessThanTransform(torch.tensor(0.0)),
    ):
        assert t(x).is_meta and t.inv(x).is_meta and t.log_abs_det_jacobian(x, t(x)).is_meta


def test_infinite_bounds_are_half_lines_and_the_line() -> None:
    """PyTorch gives NaN; GreaterThanTransform's map is another, exp."""
    t = distributions.IntervalTransform(torch.tensor([0.0, -torch.inf]), torch.inf)
    x = torch.tensor([1.0, 1.0])
    torch.testing.assert_close(t(x), torch.stack([torch.nn.functional.softplus(x[0]), x[1]]))


def test_bounds_out_of_order_are_an_error_when_used() -> None:
    with pytest.raises(ValueError, match=r"lower must be less than upper, got lower=2.0 and upper=1.0"):
        ours(biject_to, constraints.interval(2.0, 1.0))(torch.zeros(2))


# --- Equality, copies, cache ---------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Any] = {
    "interval": lambda **cache: distributions.IntervalTransform(-1.0, 2.0, **cache),
    "interval of tensors": lambda **cache: distributions.IntervalTransform(torch.zeros(3), torch.ones(2, 1), **cache),
    "greater than": lambda **cache: distributions.GreaterThanTransform(0.5, **cache),
    "less than": lambda **cache: distributions.LessThanTransform(torch.tensor(0.5), **cache),
    "softmax": lambda **cache: distributions.SoftmaxTransform(**cache),
    "stick-breaking": lambda **cache: distributions.StickBreakingTransform(**cache),
}


@pytest.fixture(params=TRANSFORMS)
def make(request: pytest.FixtureRequest) -> Any:
    return TRANSFORMS[request.param]


def test_equal_if_of_one_class_with_equal_bounds(make: Any) -> None:
    assert make() == make() and make() == make(cache_size=1) and make().inv == make().inv
    others = [other() for other in TRANSFORMS.values()]
    assert sum(make() == other for other in others) == sum(other == make() for other in others) == 1
    assert make() != transforms.StickBreakingTransform() and transforms.SoftmaxTransform() != make()


def test_other_bounds_are_not_equal() -> None:
    t = distributions.IntervalTransform(0.0, 1.0)
    assert t != distributions.IntervalTransform(0.0, 2.0) and t != distributions.IntervalTransform(-1.0, 1.0)
    assert t != distributions.IntervalTransform(0.0, torch.tensor(1.0))
    lower = torch.zeros(2)
    assert distributions.GreaterThanTransform(lower) == distributions.GreaterThanTransform(lower.clone())
    assert distributions.GreaterThanTransform(lower) != distributions.GreaterThanTransform(lower[:1])
    assert distributions.GreaterThanTransform(lower) != distributions.GreaterThanTransform(lower + 1)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_and_pickles_also_after_use(make: Any, clone: Any) -> None:
    """The cache holds tensors with a graph, which neither can be pickled nor deep-copied."""
    x = raws().requires_grad_()
    for t in (make(), make(cache_size=1)):
        y = t(x)
        other = clone(t)
        assert other == t and other._cache_size == t._cache_size
        assert torch.equal(other(x), y)
        torch.testing.assert_close(other.inv(y), t._inverse(y))


def test_with_cache_gives_one_that_remembers_x_and_y(make: Any) -> None:
    t = make()
    cached = t.with_cache()
    assert cached == t and cached.with_cache() is cached and t.with_cache(0) is t
    x = raws()
    assert t(x) is not t(x)
    y = cached(x)
    assert cached(x) is y and cached.inv(y) is x and cached(x.clone()) is not y
    x = cached.inv(y := make()(raws()))
    assert cached(x) is y and cached.inv(y) is x


def test_value_and_log_det_are_one_pass_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def counted(original: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            calls.append(options)
            return original(*args, **options)

        return function

    for name in ("bounded", "simplex"):
        monkeypatch.setattr(distributions, name, counted(getattr(distributions, name)))
    for make in (TRANSFORMS["interval"], TRANSFORMS["stick-breaking"]):
        t, x = make(cache_size=1), raws().requires_grad_()
        calls.clear()
        for _ in range(3):
            y = t(x)
            log_det = t.log_abs_det_jacobian(x, y)
            assert t.inv.log_abs_det_jacobian(y, x).equal(-log_det)
        assert len(calls) == 1 and calls[0]["return_log_det"]
        torch.testing.assert_close(log_det, make().log_abs_det_jacobian(x, y))
        t.log_abs_det_jacobian(x.clone(), y)
        assert len(calls) == 3
        make()(x)
        assert "return_log_det" not in calls[-1]


def test_log_det_from_a_cache_has_a_gradient_though_y_was_made_without() -> None:
    t, x = distributions.IntervalTransform(0.0, 1.0, cache_size=1), raws().requires_grad_()
    with torch.no_grad():
        y = t(x)
        assert t.log_abs_det_jacobian(x, y) is t.log_abs_det_jacobian(x, y)
    (grad,) = torch.autograd.grad(t.log_abs_det_jacobian(x, y).sum(), x)
    torch.testing.assert_close(grad, -torch.tanh(x / 2))


def test_repr_says_the_bounds() -> None:
    assert repr(distributions.IntervalTransform(0.0, 1.0)) == "IntervalTransform(lower=0.0, upper=1.0)"
    assert repr(distributions.LessThanTransform(torch.ones(2))) == "LessThanTransform(upper=tensor of shape (2,))"
    assert repr(distributions.SoftmaxTransform()) == "SoftmaxTransform()"


# --- In use --------------------------------------------------------------------------------------------------------


def test_transformed_distributions(make: Any) -> None:
    t = make()
    if not t.bijective:
        return
    theirs = {
        distributions.GreaterThanTransform: constraints.greater_than(0.5),
        distributions.LessThanTransform: constraints.less_than(torch.tensor(0.5)),
        distributions.StickBreakingTransform: constraints.simplex,
    }.get(type(t)) or constraints.interval(*t._bounds())
    base = Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0)
    fused, reference = TransformedDistribution(base, t), TransformedDistribution(base, biject_to(theirs))
    assert fused.batch_shape == reference.batch_shape and fused.event_shape == reference.event_shape
    y = fused.rsample((5,))
    assert theirs.check(y).all() and fused.support.check(y).all()
    torch.testing.assert_close(fused.log_prob(y), reference.log_prob(y))


def test_torch_compile_takes_them_whole() -> None:
    t = ours(biject_to, constraints.interval(torch.zeros(3), 2.0)).with_cache()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def density(x: Tensor) -> Tensor:
        y = t(x)
        return y.sum() + t.log_abs_det_jacobian(x, y).sum()

    x = raws().requires_grad_()
    (got,) = torch.autograd.grad(density(x), x)
    t = biject_to(constraints.interval(torch.zeros(3), 2.0))
    torch.testing.assert_close(got, torch.autograd.grad(t(x).sum() + t.log_abs_det_jacobian(x, t(x)).sum(), x)[0])


def test_vmap_and_func() -> None:
    t, x = ours(biject_to, constraints.simplex), raws(4, 3)
    torch.testing.assert_close(torch.vmap(t)(x), t(x))
    got = torch.func.vmap(torch.func.grad(lambda x: t.log_abs_det_jacobian(x, t(x))))(x)
    x.requires_grad_()
    torch.testing.assert_close(
        got, torch.autograd.grad(biject_to(constraints.simplex).log_abs_det_jacobian(x, t(x)).sum(), x)[0]
    )


# --- Where PyTorch's clip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 10, 1000])
def test_stick_breaking_neither_clips_nor_loses_digits_at_plus_and_minus_20(dtype: torch.dtype, size: int) -> None:
    """Most of a raw's digits are in y, as long as y is a normal number: a raw of 20 leaves exp(-20) of the stick."""
    t = distributions.StickBreakingTransform()
    x = torch.where(torch.rand(8, size - 1) < 0.5, -20.0, 20.0).to(dtype)
    x[:2] = -20.0
    x[2:4, :-1], x[2:4, -1] = -20.0, 20.0
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    exact = t.log_abs_det_jacobian(x.double(), t(x.double()))
    assert (y > 0).all() and log_det.isfinite().all() and t.inv(y).isfinite().all()
    torch.testing.assert_close(log_det.double(), exact, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    kept = x[:4] if size > 2 else x
    torch.testing.assert_close(t.inv(t(kept)), kept, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0)


def test_stick_breaking_is_right_where_pytorchs_is_not() -> None:
    """From raw = 16.7 on float32 has no 1 - sigmoid(raw), and PyTorch clips."""
    x = torch.full((1, 9), -20.0)
    x[0, 3] = 20.0
    fused, theirs = distributions.StickBreakingTransform(), transforms.StickBreakingTransform()
    exact = theirs(x.double())
    assert ((fused(x) - exact) / exact).abs().max() < 1e-5
    assert ((theirs(x) - exact) / exact).abs().max() > 0.1
    assert (fused.inv(fused(x)) - x).abs()[0, :4].max() < 1e-3
    assert (theirs.inv(theirs(x)) - x).abs()[0, :4].max() > 1


def test_interval_keeps_off_bounds_where_pytorchs_touches_them() -> None:
    constraint = constraints.interval(100.0, 200.0)
    x = torch.tensor([-30.0, 30.0])
    theirs, fused = biject_to(constraint)(x), ours(biject_to, constraint)(x)
    assert theirs[0] == 100
    assert 100 < fused[0] < 100.001 and 199.999 < fused[1] < 200


# --- The registries ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registries_stay_as_they_are() -> Iterator[None]:
    before = snapshot()
    yield
    assert snapshot() == before


def snapshot() -> list[dict[Any, Any]]:
    return [dict(registry._registry) for registry in REGISTRIES.values()]


def test_what_is_handed_out(constraint: Any) -> None:
    """Ours at every leaf, also of what PyTorch composes; without ``installed``, PyTorch's."""

    def leaves(t: Any) -> list[Any]:
        if isinstance(t, transforms.IndependentTransform):
            return leaves(t.base_transform)
        parts = getattr(t, "transforms", getattr(t, "parts", None))
        return [t] if parts is None else functools.reduce(operator.add, map(leaves, parts), [])

    for registry in REGISTRIES.values():
        assert all(
            type(leaf).__module__ == "constrained_ops.distributions" for leaf in leaves(ours(registry, constraint))
        )
        assert all(type(leaf).__module__ == "torch.distributions.transforms" for leaf in leaves(registry(constraint)))
    assert isinstance(ours(biject_to, Dirichlet(torch.ones(3)).support), distributions.StickBreakingTransform)
    assert isinstance(ours(transform_to, constraints.simplex), distributions.SoftmaxTransform)


def test_installed_restores_what_was_there() -> None:
    """The autouse fixture compares; here, inside."""
    before = snapshot()
    with distributions.installed():
        inside = snapshot()
        assert inside != before
        with distributions.installed():
            assert snapshot() == inside
        assert snapshot() == inside
    assert snapshot() == before


def test_installed_restores_after_an_exception() -> None:
    before = snapshot()
    with pytest.raises(KeyError), distributions.installed():
        raise KeyError
    assert snapshot() == before


def test_installed_restores_registrations_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there was none, and whatever is registered, installed or taken back inside."""
    monkeypatch.setattr(biject_to, "_registry", dict(biject_to._registry))
    biject_to.register(constraints.positive, lambda constraint: transforms.SoftplusTransform())
    del biject_to._registry[type(constraints.simplex)]
    before = snapshot()
    with distributions.installed():
        assert isinstance(biject_to(constraints.positive), distributions.GreaterThanTransform)
        biject_to.register(constraints.positive, lambda constraint: transforms.ExpTransform())
        distributions.install()
        distributions.install()
    assert snapshot() == before
    with distributions.installed():
        distributions.uninstall()
    assert snapshot() == before
    with pytest.raises(RuntimeError, match="not installed"):
        distributions.uninstall()
    with pytest.raises(NotImplementedError):
        biject_to(constraints.simplex)


def test_install_and_uninstall() -> None:
    before = snapshot()
    with pytest.raises(RuntimeError, match="not installed"):
        distributions.uninstall()
    distributions.install()
    distributions.install()
    distributions.uninstall()
    assert isinstance(transform_to(constraints.positive), distributions.GreaterThanTransform)
    distributions.uninstall()
    assert snapshot() == before


def test_installed_decorates_functions() -> None:
    @distributions.installed()
    def inside() -> Any:
        return biject_to(constraints.positive)

    assert isinstance(inside(), distributions.GreaterThanTransform)
    assert isinstance(inside(), distributions.GreaterThanTransform)


def test_constrained_ops_has_it_at_hand() -> None:
    assert co.distributions is distributions
    assert set(distributions.__all__) >= {"install", "installed", "uninstall"}
