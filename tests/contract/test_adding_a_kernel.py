"""The example of docs/adding-a-kernel.md runs as it stands, and the files that the page names exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-kernel.md").read_text()


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    file = tmp_path / "example.py"
    file.write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location("adding_a_kernel_example", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # the page's own assertion is in it


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"(?:septet|tests|csrc)/[\w/]+(?:\.py|\.h|\.cpp|/)", PAGE)
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / name).exists()] == []
