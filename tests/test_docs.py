"""What the docs show runs, and what they list is there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from veneer.method import METHODS, load_methods

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = [
    pytest.param(page, block, id=f"{page.name}-{i}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_code_in_the_docs_runs(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"from_{re.sub(r'[^a-z]', '_', page.stem.lower())}"
    (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
    known = dict(load_methods())
    try:
        importlib.import_module(name)
    finally:
        sys.modules.pop(name, None)
        METHODS.clear()
        METHODS.update(known)


def test_a_method_of_ones_own_is_short() -> None:
    page = (ROOT / "docs" / "custom-methods.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
    lines = [line for line in block.splitlines() if line.strip()]
    assert "check_method(" in block and len(lines) < 40


def test_the_table_of_methods_is_that_of_the_code() -> None:
    """`make docs` writes it."""
    from veneer.catalogue import markdown

    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == markdown()


def test_the_table_tells_the_truth() -> None:
    from veneer.catalogue import catalogue, entry

    found = {e.name: e for e in catalogue(24, 16)}
    assert set(found) >= {n for n in load_methods() if n != "XLORA"}
    assert found["LORA"].numbers == 8 * (24 + 16) and found["IA3"].numbers == 24
    assert all(e.formula for e in found.values())
    assert entry("lora use_dora", 24, 16).numbers == 8 * (24 + 16) + 24  # LoRA's and one magnitude per output
    assert found["POLY"].merge != True  # noqa: E712  a reason, not a bool


def test_the_page_of_measurements_is_what_its_runs_say() -> None:
    """`python -m benchmarks.page` writes it."""
    from benchmarks.page import PAGE, text

    assert PAGE.read_text(encoding="utf-8") == text()
