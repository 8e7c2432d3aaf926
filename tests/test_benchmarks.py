"""The benchmarks run, agree and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

import pytest
import torch

import constrained_ops as co


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)  # not part of the installed package
    return import_module("benchmarks.__main__")


def test_quick_run_writes_every_peer(benchmarks, tmp_path, capsys):
    path = tmp_path / "results.csv"
    assert benchmarks.main(["--only", "bounded", "--quick", "--no-compile", "--device", "cpu", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    peers = ["eager", "constrained_ops", "copy_"]
    assert [(row["shape"], row["peer"]) for row in rows] == [(n, peer) for n in ("8", "1048576") for peer in peers]
    for row in rows:
        assert row["machine"] and row["job"] == "bounded"
        assert (row["torch"], row["threads"]) == (torch.__version__, str(torch.get_num_threads()))
        assert row["constrained_ops"] == co.build_info()["version"]
        assert 0 < float(row["quartile1_us"]) <= float(row["median_us"]) <= float(row["quartile3_us"])
        exactly_one = {"constrained_ops": "peer_to_ours", "copy_": "share_of_copy"}.get(row["peer"])
        assert exactly_one is None or float(row[exactly_one]) == 1
    printed = capsys.readouterr().out
    assert all(peer in printed for peer in peers)


def test_peers_that_differ_are_not_timed(benchmarks):
    harness = import_module("benchmarks.harness")
    wrong = {"eager": torch.sigmoid, "constrained_ops": torch.tanh}
    job = harness.Job("wrong", "", shapes=[(8,)], peers=wrong, moved=(2, 3))
    with pytest.raises(AssertionError, match=r"wrong \(8,\): constrained_ops and eager differ"):
        harness.steps_of(job, (8,), "cpu", with_compile=False)


def test_transforms_agree_with_pytorchs(benchmarks):
    harness = import_module("benchmarks.harness")
    for job in import_module("benchmarks.bench_distributions").JOBS:
        assert list(harness.steps_of(job, (3, 4), "cpu", with_compile=False)) == [*job.peers, "copy_"]


def test_steps_of_all_peers_agree_and_a_wrong_one_is_found(benchmarks):
    bench_steps, harness = import_module("benchmarks.bench_steps"), import_module("benchmarks.harness")
    for job in [*bench_steps.JOBS, *import_module("benchmarks.bench_parametrize").JOBS]:
        steps = job.steps((6, 8), "cpu", with_compile=False)
        assert list(steps)[-2:] == ["constrained_ops", "copy_"] and len(steps) >= 3
    peers = {"Adam": bench_steps.adam_and(lambda *_: None), **bench_steps.box_peers(None, -1.0, 0.25)}
    wrong = bench_steps.StepJob("wrong", "", [(8,)], peers, moved=(7,))
    with pytest.raises(AssertionError, match=r"wrong \(8,\): fused, clamp_ and Adam differ"):
        wrong.steps((8,), "cpu", with_compile=False)
    assert harness.OURS in peers
