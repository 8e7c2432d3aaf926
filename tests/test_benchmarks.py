"""The benchmarks run, agree and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import csv
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import constrained_ops as co


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)  # not part of the installed package
    return import_module("benchmarks.__main__")


@pytest.fixture
def eagerly() -> Iterator[None]:
    """What torch.compile would compile runs as it is written, which spares minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def written(path: Path) -> list[dict[str, str]]:
    return import_module("benchmarks.report").read(path)


def row(job: str, shape: str, peer: str, median: float, spread: float = 0.01, **others: object) -> dict[str, object]:
    """One of a results file, as far as what reads it needs it."""
    low, high = median * (1 - spread / 2), median * (1 + spread / 2)
    about = dict.fromkeys(("machine", "simd", "threads", "torch", "python", "constrained_ops", "commit"), "same")
    about |= {"device": "cpu", "backend": "cpu", "job": job, "shape": shape, "peer": peer}
    return {**about, "median_us": median, "quartile1_us": low, "quartile3_us": high, **others}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_quick_run_writes_every_peer(benchmarks, tmp_path, capsys):
    path = tmp_path / "results.csv"
    assert benchmarks.main(["--only", "bounded", "--quick", "--no-compile", "--device", "cpu", "--csv", str(path)]) == 0
    rows = written(path)

    peers = [peer for peer in [*benchmarks.JOBS["bounded"].peers, "copy_"] if peer != "torch.compile"]
    assert {"eager", "torch.distributions", "constrained_ops"} < set(peers)
    assert [(row["shape"], row["peer"]) for row in rows] == [(n, peer) for n in ("8", "1048576") for peer in peers]
    for row in rows:
        assert row["machine"] and row["job"] == "bounded"
        assert (row["torch"], row["threads"]) == (torch.__version__, str(torch.get_num_threads()))
        assert (row["python"], row["device"]) == (platform.python_version(), "cpu")
        assert row["constrained_ops"] == co.build_info()["version"]
        assert 0 < float(row["quartile1_us"]) <= float(row["median_us"]) <= float(row["quartile3_us"])
        exactly_one = {"constrained_ops": "peer_to_ours", "copy_": "share_of_copy"}.get(row["peer"])
        assert exactly_one is None or float(row[exactly_one]) == 1
    printed = capsys.readouterr().out
    assert all(peer in printed for peer in peers)


def test_commit_is_marked_where_files_differ_from_it(benchmarks, tmp_path, monkeypatch):
    report = import_module("benchmarks.report")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() == ""
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{12}", clean := report.commit())
    (tmp_path / "file").write_text("two")
    assert report.commit() == f"{clean}-dirty"


def test_a_package_that_is_not_installed_is_told(benchmarks, tmp_path, capsys, monkeypatch):
    harness, report = import_module("benchmarks.harness"), import_module("benchmarks.report")
    monkeypatch.setattr(harness, "MISSING", [])
    monkeypatch.setattr(report, "MISSING", harness.MISSING)
    assert harness.optional("no_such_package.module") is None
    assert harness.optional("math").pi > 3
    with (tmp_path / "results.csv").open("w") as file:
        assert report.run([], "cpu", harness.QUICK, file) == ([], 0)
    assert "no_such_package is not installed: its peers are left out" in capsys.readouterr().out


def test_all_peers_of_all_jobs_agree(benchmarks, eagerly):
    for name, job in benchmarks.JOBS.items():
        steps = job.steps((6, 8), "cpu")
        assert list(steps)[-2:] == ["constrained_ops", "copy_"] and len(steps) >= 3
        assert set(steps) == {*job.peers, "copy_"} - {"liger_kernel"}
        without = job.steps((6, 8), "cpu", with_compile=False)
        assert set(without) == {peer for peer in steps if not peer.startswith("torch.compile")}
        assert name.endswith("_second_order") == (len(job.moved) == 3)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_transform_that_differs_is_not_timed(benchmarks, order):
    """In its value, or only in a derivative."""
    harness = import_module("benchmarks.harness")

    def wrong(raw: torch.Tensor) -> torch.Tensor:
        if order == 0:
            return raw.tanh()
        slope = raw**order
        return raw.sigmoid() + slope - slope.detach()

    job = harness.transform(order, "wrong", "", [(8,)], {"eager": torch.sigmoid, "constrained_ops": wrong}, (2, 3, 4))
    with pytest.raises(AssertionError, match=r"wrong\w* \(8,\): constrained_ops and eager differ"):
        job.steps((8,), "cpu", with_compile=False)


def test_an_optimizer_that_differs_is_not_timed(benchmarks, eagerly):
    """It does not project, forgets the correction of its moments, or projects in another metric."""
    steps, harness = import_module("benchmarks.bench_steps"), import_module("benchmarks.harness")
    unprojected = {"Adam": steps.adam_and(lambda *_: None), **steps.box_peers(None, -1.0, 0.25)}
    job = harness.Job("wrong", "", [(8,)], steps.one(steps.sigmoid), unprojected, (7,))
    with pytest.raises(AssertionError, match=r"wrong \(8,\): fused, clamp_ and Adam differ"):
        job.steps((8,), "cpu")

    other = steps.ours(co.optim.ProjectedAdam, steps.constraints.simplex, metric="euclidean")
    sorting = {"fused, sort": steps.SIMPLEX["fused, sort"], "constrained_ops": other}
    job = dataclasses.replace(benchmarks.JOBS["step_simplex"], name="wrong", peers=sorting)
    for length in (4, 1024):
        with pytest.raises(AssertionError, match="constrained_ops and fused, sort differ"):
            job.steps((16, length), "cpu")


def test_gradients_of_a_step_change_their_sign(benchmarks):
    steps = import_module("benchmarks.bench_steps")
    inputs = steps.tensors(steps.sigmoid, [(8,)])
    before = inputs.grads[0].clone()
    step = steps.BOX["fused, clamp_"](inputs)
    (p,) = step.results()
    for _ in range(41):
        step.before()
        step.run()
    (after,) = step.results()
    assert (after - p).abs().max() < 0.1  # and not as far as 41 steps in one direction lead
    assert torch.equal(inputs.grads[0], before)  # other peers', too


def a_job(name: str, peer: Callable[[torch.Tensor], torch.Tensor]) -> object:
    peers = {"eager": torch.sigmoid, "constrained_ops": peer}
    return import_module("benchmarks.harness").transform(1, name, "", [(8,)], peers, moved=(2, 3))


def test_a_case_that_fails_is_told_and_the_others_run(benchmarks, tmp_path, capsys):
    harness, report = import_module("benchmarks.harness"), import_module("benchmarks.report")
    jobs = a_job("wrong", torch.tanh), a_job("right", torch.sigmoid)
    cases = [report.Case(job, (8,), with_compile=False) for job in jobs]
    with (tmp_path / "results.csv").open("w+", newline="") as file:
        rows, failed = report.run(cases, "cpu", harness.QUICK, file)
        assert failed == 1 and {row["job"] for row in rows} == {"right"}
        file.seek(0)
        assert {row["job"] for row in csv.DictReader(file)} == {"right"}
        assert report.run(cases, "cpu", harness.QUICK, file, seconds=-1.0) == ([], 0)
    out = capsys.readouterr().out
    assert "wrong (8,) failed" in out and "constrained_ops and eager differ" in out
    assert "2 of 2 cases were left out" in out


def test_what_the_compiler_fails_on_is_left_out_and_told(benchmarks):
    harness = import_module("benchmarks.harness")

    def failing(inputs: object) -> object:
        return harness.Step(None, lambda: 1 / 0)

    job = a_job("some", torch.sigmoid)
    compiled = dataclasses.replace(job, peers={**job.peers, "torch.compile": failing})
    with pytest.warns(UserWarning, match=r"some \(8,\): torch.compile is left out: division by zero"):
        assert list(compiled.steps((8,), "cpu")) == ["eager", "constrained_ops", "copy_"]
    other = dataclasses.replace(job, peers={"eager": job.peers["eager"], "constrained_ops": failing})
    with pytest.raises(ZeroDivisionError):
        other.steps((8,), "cpu", with_compile=False)


def test_chosen_shapes(benchmarks):
    harness = import_module("benchmarks.harness")
    assert harness.on_gpu((1024,), 0) == (1024,)
    assert harness.on_gpu((2**18, 4), 0) == (2**24, 4)
    assert harness.on_gpu((32, 2**15), 1) == (32, 2**21)
    assert harness.on_gpu((2**24,), 0) == (2**28,)
    many, one = benchmarks.JOBS["step_raw_many"], benchmarks.JOBS["step_raw"]
    assert many.chosen_shapes(True, "cuda") == many.chosen_shapes(True, "cpu") == [(200, 64)]
    assert one.chosen_shapes(False, "cpu")[-1] == (2**24,)
    assert one.chosen_shapes(False, "cpu", largest=2**27)[-1] == (2**27,)
    assert one.chosen_shapes(True, "cpu") == [(2**10,), (2**20,)]


# --- Two runs ------------------------------------------------------------------------------------------------------


def a_run(ours: float, others: float = 1.0, spread: float = 0.01) -> list[dict[str, object]]:
    medians = {"eager": 30 * others, "constrained_ops": 10 * ours * others, "copy_": 5 * others}
    return [row("bounded", "8", peer, median, spread) for peer, median in medians.items()]


@pytest.mark.parametrize(
    ("new", "slower"),
    [
        (a_run(1.0), False),
        (a_run(1.3), True),  # planted
        (a_run(1.0, others=1.8), False),  # a slower machine
        (a_run(1.3, others=1.8), True),
        (a_run(1.3, others=0.6), True),  # hidden by a faster one
        (a_run(1.3, spread=0.4), False),  # noise
        (a_run(0.7), False),
    ],
)
def test_compare(benchmarks, new, slower, tmp_path, capsys):
    compare = import_module("benchmarks.compare")
    old, new = write(tmp_path / "old.csv", a_run(1.0)), write(tmp_path / "new.csv", new)
    assert compare.main([str(old), str(new)]) == (3 if slower else 0)
    printed = capsys.readouterr().out
    assert f"{int(slower)} of 1 cases" in printed and ("1.30x as long" in printed) == slower


def test_others_that_do_not_agree_are_no_measure(benchmarks):
    compare = import_module("benchmarks.compare")
    old, new = ([*a_run(ours), row("bounded", "8", "gpytorch", 40.0)] for ours in (1.0, 1.3))
    assert compare.changes(old, new)[0].slower
    new[0] = row("bounded", "8", "eager", 60.0)
    assert not compare.changes(old, new)[0].slower


def test_a_run_compares_itself(benchmarks, tmp_path, capsys):
    """With what a hundredth of our time claims to have been; the file may be the one that is written."""
    path = tmp_path / "results.csv"
    command = ["--only", "step_box_many", "--quick", "--no-compile", "--device", "cpu", "--csv", str(path)]
    assert benchmarks.main(command) == 0
    old = written(path)
    for row in old:
        if row["peer"] == "constrained_ops":
            row |= {name: float(row[name]) / 100 for name in ("median_us", "quartile1_us", "quartile3_us")}
        row["threads"] = "77"
    write(path, old)
    assert benchmarks.main([*command, "--compare", str(path)]) == 3
    printed = capsys.readouterr().out
    assert "1 of 1 cases that both runs have became slower" in printed and "threads was 77 and is" in printed


# --- Floors --------------------------------------------------------------------------------------------------------


def test_a_run_has_what_every_floor_needs(benchmarks):
    floors = import_module("benchmarks.floors")
    missing = {"entmax.sparsemax", floors.SPARSEMAX} if find_spec("entmax") is None else set()
    for device, job, shape, peer, at_least in floors.FLOORS:
        assert shape in benchmarks.JOBS[job].chosen_shapes(False, device), (job, shape)
        assert peer in {*benchmarks.JOBS[job].peers, "copy_"} | missing, (job, peer)
        assert 0 < at_least <= 60
    for device in ("cpu", "cuda"):
        chosen = {
            (case.job.name, case.shape, peer)
            for case in floors.cases(benchmarks.JOBS, device, True)
            for peer in case.only
        }
        assert chosen == {floor[1:4] for floor in floors.FLOORS if floor.device == device}


def test_only_what_a_floor_needs_is_timed_and_all_of_it_agrees(benchmarks, eagerly):
    job = benchmarks.JOBS["step_raw"]
    assert list(job.steps((8,), "cpu", only=["torch.compile"])) == ["torch.compile", "constrained_ops", "copy_"]
    first = benchmarks.bench_steps.on_raw(lambda raw: 2 * raw, lambda x: x / 2)
    wrong = dataclasses.replace(job, peers={**job.peers, "eager, fused": first})
    with pytest.raises(AssertionError, match="differ"):
        wrong.steps((8,), "cpu", only=["torch.compile"])


def test_floors_are_told_met_or_not(benchmarks, tmp_path, capsys):
    floors, report = import_module("benchmarks.floors"), import_module("benchmarks.report")
    results = []
    for floor in floors.FLOORS:
        if floor.device == "cpu":
            case = floor.job, report.shape_name(floor.shape)
            results.append(row(*case, floor.peer, 1.0, peer_to_ours=floor.at_least, share_of_copy=1))
            results.append(row(*case, "constrained_ops", 1.0, peer_to_ours=1.0, share_of_copy=0.42))
    met = write(tmp_path / "first.csv", results)
    assert floors.main([str(met), "--strict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(floor.device == "cpu" for floor in floors.FLOORS)
    assert f"{count} of {count} floors are met." in lines and "Nowhere in these results." in lines
    assert "| bounded | 8 | `eager` | 1.15x | 1.15x | 42% | 42% | yes |" in lines

    results[0]["peer_to_ours"] = 0.5  # bounded, 8, eager
    del results[2]  # bounded, 64, eager
    second = write(tmp_path / "second.csv", results)
    assert floors.main([str(met), str(second)]) == 0
    assert floors.main([str(met), str(second), "--strict"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| bounded | 8 | `eager` | 1.15x | 1.15x | 0.50x | 42% / 42% | 42% / 97% | yes / **no** |" in lines
    assert "| bounded | 64 | `eager` | 1.15x | 1.15x | not measured | 42% / 42% | 42% / ? | yes / ? |" in lines
    assert f"{count - 2} of {count} floors are met." in lines
    assert "| bounded | 8 | `eager` | 1.15x | 0.50x |" in lines


# --- The bytes alone ----------------------------------------------------------------------------------------------


def test_the_bytes_alone(benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    alone = import_module("benchmarks.bytes_alone")
    loop = alone.compiled_loop()
    for with_result in (False, True):
        for ahead, past_caches in alone.LOOPS.values():
            step = alone.loop_step(loop, (40000,), with_result, ahead, past_caches)
            grad, *before = [t.clone() for t in step.results()]
            step.run()
            _, *after = step.results()
            want = [grad - t for t in before[:3]]
            assert all(map(torch.equal, after, [*want, *want[:with_result]]))
    assert alone.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| step_box", "65536"], ["| step_raw", "65536"]]
    assert all(line.count("|") == len(alone.HEADS) + 1 for line in lines)


# --- Pictures ------------------------------------------------------------------------------------------------------


def test_pictures(benchmarks, tmp_path):
    imread = pytest.importorskip("matplotlib.image").imread
    plots = import_module("benchmarks.plots")
    path, folder = tmp_path / "results.csv", tmp_path / "pictures"
    only = ["--only", "step_box_many", "--only", "projection_weighted"]
    assert benchmarks.main([*only, "--quick", "--no-compile", "--device", "cpu", "--csv", str(path)]) == 0
    assert plots.main([str(path), str(folder), "--detail"]) == 0
    names = {"time", "ratios", "ceiling", "jobs/step_box_many", "jobs/projection_weighted"}
    assert {str(picture.relative_to(folder))[:-4] for picture in folder.rglob("*.png")} == names
    for picture in folder.rglob("*.png"):
        pixels = imread(picture)[..., :3]
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05
    path.write_text("job,shape\n")
    assert plots.main([str(path), str(folder)]) == 1


def test_pictures_of_what_only_a_copy_is_beside(benchmarks):
    """As floors on a GPU have it."""
    plots = import_module("benchmarks.plots")
    others = {"peer_to_ours": 1.0, "share_of_copy": 1.0}
    rows = [row("step_box", "1024", peer, 10.0, **others) for peer in ("constrained_ops", "copy_")]
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    assert len(plots.draw_ceiling(rows).axes[0].patches) == 1  # ours
    assert len(plots.draw_ratios(rows, [plots.Family("step_box", "a step")]).axes[0].patches) == 0


# --- On a GPU ------------------------------------------------------------------------------------------------------

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
