"""`septet doctor` where things are missing: no native library, no torch, no model, one core; and what a token reads."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from septet.cli import doctor
from septet.cli.main import main
from septet.kernels.native import library
from tests.unit.test_hub_model_config import make_gguf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store, and no torch."""
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    there = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else there(name))


def facts(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def text(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["doctor", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_without_library_torch_or_model_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.FILE.with_name("no-such-library.so")
    whole = library.load
    monkeypatch.setattr(library, "load", lambda: whole(missing))
    found = facts()
    assert found["cpu_kernels"]["native"] is False
    assert "was not built" in found["cpu_kernels"]["why"]
    assert found["bandwidth"]["by"] == "numpy"
    assert found["bandwidth"]["gb_s"] > 0.1
    assert found["gpus"] == {"found": [], "why": "torch is not installed"}
    assert found["store"]["models"] == []
    told = text("--no-probe")
    assert "reference (torch): the native CPU library was not built" in told
    assert "bandwidth" not in told
    assert "expected_tokens_s" not in facts("smollm2")["model"]
    assert "no figure without native kernels" in text("smollm2", "--no-probe")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_one_core_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    found = facts()
    assert found["machine"]["threads"] == found["machine"]["allowed_cores"] == 1
    assert found["bandwidth"]["gb_s"] > 0.1
    assert "1 allowed" in text("--no-probe")


def test_a_token_reads_a_tied_table_and_one_row_of_one_that_is_not(tmp_path: Path) -> None:
    one = 12 * 64 * 4  # make_gguf writes a table of 12 tokens, float32
    tied = make_gguf(tmp_path, "llama", tensors={"blk.0.ffn_up.weight": (24, 64)})
    assert facts(str(tied), "--no-probe")["model"]["n_bytes_read"] == 3 * one
    untied = make_gguf(tmp_path, "llama", tensors={"blk.0.ffn_up.weight": (24, 64), "output.weight": (12, 64)})
    found = facts(str(untied))
    assert found["model"]["n_bytes_read"] == 3 * one
    assert found["model"]["types"] == ["F32"]
    limit = found["bandwidth"]["gb_s"] * 1e9 / (3 * one)
    assert found["model"]["expected_tokens_s"] == pytest.approx(doctor.SHARE * limit, rel=1e-3)


def test_a_model_that_is_not_here_or_not_sound_is_a_line(tmp_path: Path) -> None:
    told = text("smollm2", "--no-probe")
    assert "not pulled yet: septet pull smollm2" in told
    assert "98.4 MB of weights a token or less" in told
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 20)
    assert "broken can't be run: " in text(str(broken), "--no-probe")
    unknown = CliRunner().invoke(main, ["doctor", "no-such-model-at-all"])
    assert unknown.exit_code == 1
    assert "Error: no model is called" in unknown.output
