"""docs/adding-a-model.md, followed to the letter: its code is run and held to transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from septet.models.registry import MODELS
from tests import families
from tests.families import Family

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def test_the_example_computes_what_transformers_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, family = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "model_of_the_page.py").write_text(model)
    monkeypatch.syspath_prepend(tmp_path)
    listed: dict[str, Family] = {}
    exec(family, {"FAMILIES": listed, "Family": Family})
    assert set(listed) == {"gemma2"}
    monkeypatch.setattr(families, "FAMILIES", listed)
    pair = families.make("gemma2", models={**MODELS, "gemma2": "model_of_the_page:Gemma2"})
    ids = torch.arange(100).mul(37).remainder(families.VOCAB).tolist()
    want = pair.logits(ids)
    assert want.std() > 0.3
    torch.testing.assert_close(pair.harness().step({0: ids})[0], want, atol=1e-4, rtol=0.0)
    assert pair.harness().greedy(0, ids, 64) == pair.greedy(ids, 64)


def test_the_page_names_files_that_exist() -> None:
    root = PAGE.parents[1]
    text = PAGE.read_text()
    names = set(re.findall(r"`((?:septet|tests)/[\w/]+\.py)`", text)) - {"septet/models/gemma2.py"}
    assert len(names) > 6
    assert [name for name in sorted(names) if not (root / name).exists()] == []
