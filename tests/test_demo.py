"""The demo's promises: a table whose numbers agree, a picture, and an exit status that tells a wrong road."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import constrained_ops as co
from constrained_ops import demo
from constrained_ops.__main__ import main


def run(path: Path, *options: str) -> int:
    return main(["demo", "--steps", "30", "--archetypes", "4", "--device", "cpu", "--output", str(path), *options])


def with_road(monkeypatch: pytest.MonkeyPatch, simplex, bounded, **promises: bool) -> None:
    road = demo.Road("wrong", demo._transform_road(simplex, bounded), **promises)
    monkeypatch.setattr(demo, "ROADS", [demo.ROADS[0], road])


def bounded(raw: torch.Tensor) -> torch.Tensor:
    return co.bounded(raw, 0.0, demo.BRIGHTEST)


def test_roads_agree(tmp_path, capsys):
    path = tmp_path / "digits.png"
    assert run(path) == 0
    out = capsys.readouterr().out
    cell = r"\s+([\d.]+)"
    first, ours = (
        [float(cell_) for cell_ in re.search(rf"^{name}{cell}{cell} us{cell}x{cell} us{cell}x$", out, re.M).groups()]
        for name in ("PyTorch", "ReparametrizedAdam")
    )
    assert first[0] == pytest.approx(ours[0], rel=demo.TOLERANCE)
    assert first[2] == first[4] == 1
    for time, speed in (1, 2), (3, 4):  # printed with one and two decimals
        expected = first[time] / ours[time]
        rounding = 0.005 + expected * (0.05 / first[time] + 0.05 / ours[time])
        assert ours[speed] == pytest.approx(expected, rel=0, abs=1.01 * rounding)
    difference = float(re.search(r"largest relative difference (\S+)", out).group(1))
    assert abs(first[0] / ours[0] - 1) <= difference + 1e-6
    assert difference <= demo.TOLERANCE
    assert out.rstrip().endswith(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_roads_loss_against_steps_and_time(monkeypatch, tmp_path, capsys):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures, save = [], figure_module.Figure.savefig
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    assert run(tmp_path / "digits.png") == 0
    (figure,) = figures
    steps, times = (axes for axes in figure.axes if axes.get_xlabel())
    assert (steps.get_xlabel(), times.get_xlabel()) == ("step", "seconds")
    roads = [road.name for road in demo.ROADS]
    assert {"PyTorch", "ReparametrizedAdam", "ProjectedAdam"} <= set(roads)
    for axes in (steps, times):
        assert [line.get_label() for line in axes.lines] == roads
    for against_steps, against_time in zip(steps.lines, times.lines, strict=True):
        assert list(against_steps.get_xdata()) == list(range(1, 31))
        assert list(against_steps.get_ydata()) == list(against_time.get_ydata())
        seconds = against_time.get_xdata() / against_steps.get_xdata()
        assert seconds.min() > 0 and seconds.max() == pytest.approx(seconds.min(), rel=1e-4)
    (printed,) = re.findall(r"^PyTorch\s+([\d.]+)", capsys.readouterr().out, re.M)
    assert steps.lines[0].get_ydata()[-1] == pytest.approx(float(printed), rel=1e-3)


def test_learns(tmp_path, capsys):
    def final_loss(steps: str) -> float:
        assert run(tmp_path / "digits.png", "--steps", steps) == 0
        return float(re.search(r"^ProjectedAdam\s+([\d.]+)", capsys.readouterr().out, re.M).group(1))

    assert final_loss("200") < 0.5 * final_loss("1")


def test_same_seed_same_losses():
    images = 16 * torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    one, again, other = (demo.train(images, 3, 5, seed)[1].losses for seed in (0, 0, 1))
    torch.testing.assert_close(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("simplex", "bounded_", "message"),
    [
        (co.simplex, lambda raw: bounded(raw).detach() + 0 * raw, "differ by more than rounding"),
        (co.simplex, lambda raw: bounded(raw) * torch.nan, "differ by more than rounding"),
        (lambda raw: 1.001 * co.simplex(raw), bounded, "rows of W sum to 1"),
        (lambda raw: raw + (1 - raw.sum(-1, keepdim=True)) / raw.shape[-1], bounded, "W >= 0"),
        (co.simplex, lambda raw: 1.1 * bounded(raw), "0 <= H <= 16"),
        (co.simplex, lambda raw: bounded(10 * raw).round(), "0 < H < 16"),
    ],
    ids=["derivative", "nan", "sum", "sign", "outside", "on a bound"],
)
def test_wrong_road_is_told(simplex, bounded_, message, monkeypatch, tmp_path, capsys):
    with_road(monkeypatch, simplex, bounded_)
    assert run(tmp_path / "digits.png") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any("wrong" in line and message in line for line in errors)


def test_road_of_its_own(monkeypatch, tmp_path, capsys):
    """One that claims neither the first road's trajectory nor strictness is held to neither."""
    with_road(monkeypatch, co.simplex, lambda raw: raw.clamp(0, demo.BRIGHTEST), follows_first=False, strict=False)
    assert run(tmp_path / "digits.png") == 0
    out = capsys.readouterr().out
    assert "largest relative difference" not in out
    assert re.search(r"wrong rounded \d+ values of H onto 0 or 16", out)


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib.figure", "tqdm"])
def test_missing_package(package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(tmp_path / "digits.png") == 2
    error = capsys.readouterr().err.strip()
    assert 'pip install "constrained_ops[demo]"' in error
    assert 'pip install ".[demo]"' in error
    assert "\n" not in error


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "0"),
        ("--archetypes", "-1"),
        ("--device", "nowhere"),
        ("--output", "no_such_folder/digits.png"),
        ("--output", "digits.txt"),
    ],
    ids=" ".join,
)
def test_refuses(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        run(tmp_path / "digits.png", *options)
    assert status.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err


def test_info(monkeypatch, capsys):
    facts = {"version": "1.0", "library": True, "archs": ["sm_80", "sm_90"], "backend": {"cpu": "cpu", "xpu": None}}
    monkeypatch.setattr(co, "build_info", lambda: facts)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "version  1.0",
        "library  yes",
        "archs    sm_80, sm_90",
        "backend:",
        "  cpu  cpu",
        "  xpu  none",
    ]


def test_alone_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "info" in out
    assert "demo" in out


def test_importing_the_package_is_light():
    """torch itself imports tqdm, where there is one; we add nothing."""
    code = """
import sys, torch
before = set(sys.modules)
import constrained_ops, constrained_ops.__main__
print(*{"matplotlib", "sklearn", "tqdm"} & (set(sys.modules) - before))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
