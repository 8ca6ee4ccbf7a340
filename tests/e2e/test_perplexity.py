"""Quality of quantised weights: perplexity of a book's chapter within 1 % of llama.cpp's on the same file.

The values are recorded (tests/data/record_perplexity.py). `make test` takes the catalogue's file as it comes on
the first pages; the whole chapter, and every block type in a file made for it, are `make test-slow`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from septet.bench.perplexity import of_engine
from tests.native import native_library
from tests.requantize import KINDS, requantize

DATA = Path(__file__).parents[1] / "data"
RECORD = json.loads((DATA / "perplexity_llama_cpp.json").read_text())
TEXT = (DATA / "alice_chapter_1.txt").read_text()


def check(path: Path, kind: str, n_windows: int | None = None) -> None:
    native_library()
    found, windows = of_engine(str(path), TEXT, RECORD["window"], n_windows, kernels="native")
    tokens = RECORD["tokens"] if n_windows is None else n_windows * RECORD["window"]
    assert sum(map(len, windows)) == tokens, "not the tokens that llama.cpp was given"
    assert found == pytest.approx(RECORD["perplexity"][kind], rel=0.01)


def test_perplexity_of_the_default_model(smollm2_path: Path) -> None:
    check(smollm2_path, "begin", RECORD["begin_windows"])


@pytest.mark.slow
def test_perplexity_of_the_default_model_on_the_whole_chapter(smollm2_path: Path) -> None:
    check(smollm2_path, "file")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_of_each_block_type(kind: str, smollm2_path: Path, tmp_path: Path) -> None:
    check(requantize(smollm2_path, tmp_path / f"{kind}.gguf", kind), kind)
