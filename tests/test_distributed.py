"""Two processes over gloo on the CPU go where one process goes, sharded or replicated, and so do their checkpoints."""

from __future__ import annotations

import datetime
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import Parameter

import constrained_ops as co
from constrained_ops.optim import ProjectedAdam, ReparametrizedAdam

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

OPTIMIZERS = {"projected": ProjectedAdam, "reparametrized": ReparametrizedAdam}
BOUNDS = (torch.linspace(-1, 0, 7), torch.linspace(0.5, 2, 7))


class Mixture(nn.Module):
    """Rows on a simplex, a box with bounds of its own for each element, something positive, something free."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = Parameter(torch.softmax(torch.randn(5, 7, generator=generator), -1))
        self.scale = Parameter(torch.linspace(0.125, 0.25, 7))
        self.gain = Parameter(torch.full((3, 1), 1.0))
        self.free = Parameter(torch.randn(5, 3, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.free.T @ self.mix * self.scale).sum(-1, keepdim=True) * self.gain.sum()


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def optimizer_of(kind: str, module: nn.Module) -> Any:
    p = dict(module.named_parameters())
    p = {name.removeprefix("module."): value for name, value in p.items()}
    groups = [
        {"params": [p["mix"]], "constraint": constraints.simplex},
        {"params": [p["scale"]], "constraint": constraints.interval(*BOUNDS)},
        {"params": [p["gain"]], "constraint": constraints.positive},
        {"params": [p["free"]]},
    ]
    return OPTIMIZERS[kind](groups, lr=0.05, amsgrad=True)


def train(module: nn.Module, optimizer: Any, steps: range, half: slice = slice(None)) -> None:
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        (module(x[half]) - y[half]).square().mean().backward()
        optimizer.step()


def alone(kind: str, steps: int) -> tuple[Mixture, Any]:
    module = Mixture()
    optimizer = optimizer_of(kind, module)
    train(module, optimizer, range(steps))
    return module, optimizer


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_same(module: nn.Module, other: nn.Module) -> None:
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), whole(q.detach()), atol=1e-5, rtol=1e-5)


# --- In two processes -------------------------------------------------------------------------------------------------


def replicated(rank: int, folder: str) -> None:
    for kind in OPTIMIZERS:
        module = nn.parallel.DistributedDataParallel(Mixture())
        train(module, optimizer_of(kind, module), range(10), slice(4 * rank, 4 * rank + 4))
        assert_same(module.module, alone(kind, 10)[0])


def sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (2,)))


def fully_sharded(rank: int, folder: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.tensor import DTensor

    for kind in OPTIMIZERS:
        module = sharded(Mixture())
        optimizer = optimizer_of(kind, module)
        train(module, optimizer, range(6))
        reference, reference_optimizer = alone(kind, 6)
        assert_same(module, reference)
        for p, q in zip(module.parameters(), reference.parameters(), strict=True):
            assert isinstance(p, DTensor) and p.to_local().numel() < q.numel()
            for name, value in reference_optimizer.state[q].items():
                mine = optimizer.state[p][name]
                assert isinstance(mine, DTensor) == (name != "step")
                torch.testing.assert_close(whole(mine), value, atol=2e-4, rtol=2e-4)
        model_state, optimizer_state = get_state_dict(module, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/{kind}")


def resumed_sharded(rank: int, folder: str) -> None:
    """A checkpoint of two processes goes on in two processes too, in an optimizer that has not taken a step."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for kind in OPTIMIZERS:
        module = sharded(Mixture())
        optimizer = optimizer_of(kind, module)
        model_state, optimizer_state = get_state_dict(module, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(state, checkpoint_id=f"{folder}/{kind}")
        set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(module, optimizer, range(6, 10))
        assert_same(module, alone(kind, 10)[0])


def rejected(rank: int, folder: str) -> None:
    for kind in OPTIMIZERS.values():
        module = sharded(Mixture())
        before = [whole(p.detach()).clone() for p in module.parameters()]
        name = kind.__name__
        message = f"^{name}: parameter 0 of group 0 is sharded along dim 0, along which its constraint sums to 1.0; "
        with pytest.raises(ValueError, match=message):
            kind([module.mix], constraint=co.Simplex(0))
        optimizer = kind([module.free])
        with pytest.raises(ValueError, match=message.replace("group 0", "group 1")):
            optimizer.add_param_group({"params": [module.scale], "constraint": constraints.simplex})
        assert len(optimizer.param_groups) == 1
        # A start outside is seen by the process that holds it.
        bounds = constraints.interval(torch.full((7,), -1.0), torch.tensor([1.0] * 6 + [0.125]))
        if rank == 0:
            kind([module.scale], constraint=bounds)
        else:
            with pytest.raises(ValueError, match=re.escape("must lie in [-1.0, 0.125], got 0.25")):
                kind([module.scale], constraint=bounds)
        assert all(torch.equal(whole(p.detach()), value) for p, value in zip(module.parameters(), before, strict=True))


# --- And from outside -------------------------------------------------------------------------------------------------

WORKERS = [replicated, fully_sharded, resumed_sharded, rejected]


def enter(rank: int, folder: str) -> None:
    """All workers in one pair of processes, which cost more to start than to run."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)  # where one process failed, the other must not wait for it for ever
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, world_size=2, rank=rank)
    try:
        for worker in WORKERS:
            try:
                worker(rank, folder)
                outcome = ""
            except BaseException:
                outcome = traceback.format_exc()
            Path(folder, f"{worker.__name__}.{rank}").write_text(outcome)
    finally:
        dist.destroy_process_group()
    # All outcomes are written. Threads of gloo may still hold tensors, and an interpreter that goes down then aborts:
    # PyTorch's issue 65231 and pull request 179291.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left their checkpoints, and per worker and process a traceback or nothing."""
    path = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(enter, (str(path),), nprocs=2)
    return path


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("worker", WORKERS, ids=lambda worker: worker.__name__)
def test_two_processes(folder: Path, worker: Callable[[int, str], None], rank: int) -> None:
    if outcome := (folder / f"{worker.__name__}.{rank}").read_text():
        pytest.fail(outcome, pytrace=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_saved_sharded_is_loaded_whole(folder: Path, kind: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    module = Mixture()
    optimizer = optimizer_of(kind, module)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=folder / kind, no_dist=True)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(module, optimizer, range(6, 10))
    assert_same(module, alone(kind, 10)[0])
