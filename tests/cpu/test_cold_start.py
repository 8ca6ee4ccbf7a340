"""The cold start's checkpoint is one that Septet loads, whole and the same each time; the clock's parts add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from septet.bench import cold_start
from septet.bench.cold_start import start, write_checkpoint
from septet.bench.shapes import SHAPES
from septet.hub.safetensors import SafetensorsDir

if TYPE_CHECKING:
    from pathlib import Path

TINY: dict[str, Any] = {
    **SHAPES["1b"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40_000,
    "tie_word_embeddings": False,
}


def test_a_written_checkpoint_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(cold_start, "BLOCK", 1 << 16)
    model = write_checkpoint("tiny", tmp_path, shard=6 << 20)
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) >= 2
    with SafetensorsDir.open(model) as files:
        assert float(files.load("model.norm.weight").float().mean()) == 1.0
        gate, up = (files.load(f"model.layers.0.mlp.{name}_proj.weight").float() for name in ("gate", "up"))
        assert float(gate.std()) == pytest.approx(0.02, rel=0.1)
        assert not bool((gate == up).all())
    written = shards[0].stat().st_mtime_ns
    assert write_checkpoint("tiny", tmp_path) == model
    assert shards[0].stat().st_mtime_ns == written
    got = start(model, tmp_path, {"device": "cpu", "kernels": "reference", "num_kv_slots": 20_000})
    parts = ("python_and_api_s", "engine_process_and_imports_s", "load_s", "first_request_s")
    assert sum(got[part] for part in parts) == pytest.approx(got["first_token_s"], abs=0.01)
    assert all(got[part] > 0 for part in parts)
    assert "weights" in got["load"]
    when = {line.split(" ", 2)[2]: float(line.split(" ", 2)[0]) for line in got["events"]}
    here, loaded = (
        when["the " + words] for words in ("configuration is here; now the libraries", "libraries are loaded")
    )
    assert 0 < here < loaded < got["first_token_s"]
