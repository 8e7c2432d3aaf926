"""The benchmarks run, agree and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

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


def test_a_case_that_fails_is_told_and_the_others_run(benchmarks, tmp_path, capsys):
    harness = import_module("benchmarks.harness")
    jobs = [
        harness.Job(name, "", shapes=[(8,)], peers={"eager": torch.sigmoid, "constrained_ops": peer}, moved=(2, 3))
        for name, peer in (("wrong", torch.tanh), ("right", torch.sigmoid))
    ]
    with (tmp_path / "results.csv").open("w+", newline="") as file:
        assert harness.run(jobs, "cpu", True, False, file) == 1
        file.seek(0)
        assert {row["job"] for row in csv.DictReader(file)} == {"right"}
        assert harness.run(jobs, "cpu", True, False, file, seconds=-1.0) == 0
    out = capsys.readouterr().out
    assert "wrong (8,) failed" in out and "constrained_ops and eager differ" in out
    assert "2 of 2 cases were left out" in out


def test_shapes_on_a_gpu_are_beyond_its_cache(benchmarks):
    harness = import_module("benchmarks.harness")
    assert harness.on_gpu((1024,), 0) == (1024,)
    assert harness.on_gpu((2**18, 4), 0) == (2**24, 4)
    assert harness.on_gpu((32, 2**15), 1) == (32, 2**21)
    assert harness.on_gpu((2**24,), 0) == (2**28,)
    job = benchmarks.JOBS["step_raw_many"]
    assert job.chosen_shapes(True, "cuda") == job.chosen_shapes(True, "cpu") == [(200, 64)]


def test_pictures(benchmarks, tmp_path):
    plots = import_module("benchmarks.plots")
    path = tmp_path / "results.csv"
    benchmarks.main(["--only", "step_box_many", "--quick", "--device", "cpu", "--csv", str(path)])
    assert plots.main([str(path), str(tmp_path)]) == 0
    assert (tmp_path / "step_box_many.png").read_bytes().startswith(b"\x89PNG")
    path.write_text("job,shape\n")
    assert plots.main([str(path), str(tmp_path)]) == 1


KERNEL = (
    "void constrained_ops::<unnamed>::row_kernel<float, constrained_ops::Project<float, (bool)0>>(Operands<2>, int)"
)
AS_COLUMNS = f"""==PROF== Connected to process 7
"ID","Process ID","Kernel Name","CC","dram__bytes.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","byte","ns","register/thread"
"0","7","{KERNEL}","9.0","3,000,000.00","1,000.0","40"
"""
AS_ROWS = f"""==PROF== Connected to process 7
"ID","Process ID","Kernel Name","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","{KERNEL}","9.0","Command line","dram__bytes.sum","byte","3,000,000.00"
"0","7","{KERNEL}","9.0","Command line","gpu__time_duration.sum","ns","1,000.0"
"0","7","{KERNEL}","9.0","Command line","launch__registers_per_thread","register/thread","40"
"""


@pytest.mark.parametrize("written", [AS_COLUMNS, AS_ROWS], ids=["columns", "rows"])
def test_what_nsight_compute_saw(benchmarks, written, tmp_path, capsys):
    kernels = import_module("benchmarks.kernels")
    path = tmp_path / "ncu.csv"
    path.write_text(written)
    assert kernels.main(["--ncu", str(path)]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "ns"
    assert line.split()[:2] == ["1,000", "3,000,000"] and "3,000  row_kernel<float, Project<float, (bool)0>>" in line
    path.write_text("==ERROR== no kernels were profiled\n")
    assert kernels.main(["--ncu", str(path)]) == 1


LAUNCHED = "_ZN15constrained_ops11step_kernelIffEEvNS_10StepTablesE"
NOT_LAUNCHED = "_ZN15constrained_ops11step_kernelIddEEvNS_10StepTablesE"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_the_list_of_kernels(benchmarks, monkeypatch, tmp_path, capsys):
    """One line for all instances of a kernel. Nothing is made up; what no test has launched is named."""
    cuda_compiler, emulation = import_module("cuda_compiler"), import_module("emulation")
    kernels = import_module("benchmarks.kernels")
    compiled = cuda_compiler.Compiled(registers=40, local=8, wide=None)
    monkeypatch.setattr(cuda_compiler, "NVCC", None)
    monkeypatch.setattr(emulation, "instances", lambda: {LAUNCHED: 0, NOT_LAUNCHED: 1})
    monkeypatch.setattr(emulation, "launches", dict)
    assert kernels.main(["--list"]) == 0
    heading, _, line = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["step_kernel", "2", "", "step_kernel", "", "", ""]

    monkeypatch.setattr(cuda_compiler, "NVCC", "nvcc")
    monkeypatch.setattr(cuda_compiler, "CUOBJDUMP", "cuobjdump")
    more = compiled._replace(registers=64)
    monkeypatch.setattr(cuda_compiler, "reports", lambda: {80: {LAUNCHED: compiled, NOT_LAUNCHED: more}})
    monkeypatch.setattr(emulation, "launches", lambda: {LAUNCHED: {"test_layouts", "test_a"}})
    ncu = tmp_path / "ncu.csv"
    metric = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
    ncu.write_text(f'"ID","Kernel Name","{metric}"\n"0","void constrained_ops::step_kernel<float, float>(X)","81.25"\n')
    assert kernels.main(["--list", "--ncu", str(ncu)]) == 1
    heading, _, line, *rest = capsys.readouterr().out.splitlines()
    cells = ["step_kernel", "2", "40-64", "16", "step_kernel", "1", "a, layouts", "81.2"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == cells and "registers sm_80" in heading
    assert rest[-2:] == ["1 of 2 instances were launched by no test:", "  step_kernel<double, double>"]


@pytest.mark.skipif(DEVICE != "cpu", reason="there it is the script that runs the tests")
@pytest.mark.parametrize("fails", [False, True], ids=["sound", "with a failure"])
def test_the_script_for_gpus_runs_without_one(fails, tmp_path):
    """It skips what needs a GPU; a stage that fails keeps no other from running, and is not forgotten."""
    python = tmp_path / "python"
    planted = 'case "$*" in *constrained_ops\\ demo*) exit 3;; esac' if fails else ""
    python.write_text(f'#!/bin/sh\n{planted}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
    names = "gpu,demo,kernels" if fails else "gpu,demo"
    command = [script, "--quick", "--stages", names, "--output", tmp_path / "results"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == fails, done.stdout + done.stderr
    first, *stages, last = (tmp_path / "results" / "summary.txt").read_text().splitlines()
    assert first.endswith("no GPU")
    told = [line.split()[:2] for line in stages]
    if not fails:
        assert told == [["skipped", "gpu:"], ["ok", "demo"]] and last.startswith("all is well")
        return
    assert told == [["skipped", "gpu:"], ["ok", "kernels"], ["FAILED", "demo"]] and last.startswith("something failed")
    assert (tmp_path / "results" / "kernels.csv").read_text().count("\n") > 40
