"""The README and the pages in docs: every block of Python runs, and prints what the comment behind print says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "benchmarks.md")]
OPTIONAL = re.compile(r"^(?:import|from) (gpytorch|pyro)\b", re.MULTILINE)
PRINT = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_and_prints_what_it_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks share their names, as they do for someone who types them in. A comment may end in ``...``."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for package in OPTIONAL.findall(text):
        pytest.importorskip(package)
    for block in blocks:
        lines_before = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block[1], str(page), "exec"), names)
        printed, said = capsys.readouterr().out.splitlines(), PRINT.findall(block[1])
        assert len(printed) == len(said) == block[1].count("print(")
        for got, wanted in zip(printed, said, strict=True):
            assert got.startswith(wanted[:-3]) if wanted.endswith("...") else got == wanted
