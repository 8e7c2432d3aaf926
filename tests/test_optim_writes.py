"""Someone else writes to a parameter, or a graph still needs what the step writes to."""

from __future__ import annotations

import pytest
import torch
from optimizers import OPTIMIZERS, set_grads
from torch.distributions import constraints
from torch.nn import Parameter

from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

pytestmark = pytest.mark.usefixtures("backend")


def test_raw_follows_what_others_write() -> None:
    x = Parameter(torch.full((4,), 0.5))
    optimizer = ReparametrizedAdam([x], lr=1e-2, constraint=constraints.unit_interval)
    for _ in range(3):
        x.grad = torch.ones(4)
        optimizer.step()
    raw = optimizer.state[x]["raw"].clone()
    with torch.no_grad():
        x[1] = 0.875
    x.grad = torch.zeros(4)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    after = optimizer.state[x]["raw"]
    assert torch.equal(after[[0, 2, 3]], raw[[0, 2, 3]])  # where nobody wrote, not a digit is lost
    torch.testing.assert_close(after[1], torch.logit(torch.tensor(0.875)))
    torch.testing.assert_close(x.detach()[1], torch.tensor(0.875))


def test_a_new_tensor_behind_a_parameter_is_noticed() -> None:
    x, p = Parameter(torch.full((4,), 0.5)), Parameter(torch.full((4,), 0.5))
    for leaf, kind in ((x, ReparametrizedAdam), (p, ProjectedAdam)):
        optimizer = kind([leaf], lr=1e-2, constraint=constraints.unit_interval)
        for _ in range(2):
            leaf.grad = torch.ones(4)
            optimizer.step()
        old = leaf.data
        before = old.clone()
        leaf.data = torch.full((4,), 0.75)
        optimizer.step()
        assert torch.equal(old, before)
        assert ((leaf > 0.73) & (leaf < 0.75)).all()


def test_another_view_of_the_same_memory_is_noticed() -> None:
    value, grad = torch.rand(3, 3) / 2 + 0.25, torch.tensor([[-1.0, 2.0, 3.0], [4.0, -5.0, 6.0], [7.0, 8.0, -9.0]])
    for kind in OPTIMIZERS:
        x, y = Parameter(value.clone()), Parameter(value.clone())
        x.grad, y.grad = grad.clone(), grad.clone()
        optimizers = [kind([leaf], lr=1e-2, constraint=constraints.unit_interval) for leaf in (x, y)]
        for optimizer in optimizers:
            optimizer.step()
        x.data, y.data = x.data.t(), y.data.t().contiguous()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(x.detach(), y.detach(), atol=1e-6, rtol=0)
        assert not torch.allclose(x.detach(), value.t(), atol=1e-3)


def test_a_value_written_outside_is_an_error_and_nothing_changes() -> None:
    x, y = Parameter(torch.full((4,), 0.5)), Parameter(torch.full((2,), 0.5))
    optimizer = ReparametrizedAdam([("y", y), ("x", x)], lr=1e-2, constraint=constraints.unit_interval)
    set_grads([x, y])
    optimizer.step()
    with torch.no_grad():
        x[2] = 1.5
    before = [t.clone() for t in (x, y, *optimizer.state[x].values(), *optimizer.state[y].values())]
    with pytest.raises(ValueError, match=r"^ReparametrizedAdam: parameter 1 \('x'\) of group 0 must lie in \[0.0, 1.0\]"
                       r", got 1.5$"):  # fmt: skip
        optimizer.step()
    after = [x, y, *optimizer.state[x].values(), *optimizer.state[y].values()]
    assert all(map(torch.equal, before, after))


def test_the_step_counts_as_a_write_for_autograd() -> None:
    """A graph that saved the parameter must not be differentiated with its new value."""
    for kind in OPTIMIZERS:
        x = Parameter(torch.full((4,), 0.5))
        optimizer = kind([x], constraint=constraints.unit_interval)
        for _ in range(2):
            loss = (x * x).sum()
            loss.backward(retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
