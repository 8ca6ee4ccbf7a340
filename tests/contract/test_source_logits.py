"""Safetensors and GGUF of the same weights give transformers' greedy ids: names, layouts, norms and rope factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from septet.hub.model_config import read_model_config
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.weights.load import open_source
from tests import tiny
from tests.forward import Harness

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
PROMPT = [257, 32, 109, 259, 7, 260, 265, 99, 12, 200, 201, 54, 31, 77, 161, 8, 42, 42, 255, 0, 17, 130, 90, 5]
N_NEW = 40


def theirs(dir: Path) -> list[int]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(dir, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False, eos_token_id=[]
    )
    return out[0, len(PROMPT) :].tolist()


def ours(path: Path) -> list[int]:
    config, ops = read_model_config(path), ReferenceOps()
    source = open_source(path, config, ops, CPU, torch.float32)
    model = load_model(Build(config, ops, source, CPU, torch.float32, 128))
    return Harness(model, config, max_len=128, n_slots=256).greedy(0, PROMPT, N_NEW)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_ids(family: str, tmp_path: Path) -> None:
    dir = tiny.build(family, tmp_path / "hf")
    want = theirs(dir)
    assert len(want) == N_NEW
    assert len(set(want)) > 5  # a model that repeats itself would prove little
    assert ours(dir) == want
    assert ours(tiny.to_gguf(dir, tmp_path / "m.gguf")) == want
