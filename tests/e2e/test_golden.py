"""The real models answer as llama.cpp does: golden text, recorded as `tests/data/golden_llama_cpp.json` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from septet import LLM, SamplingParams

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_llama_cpp.json").read_text())["models"]


def ask(llm: LLM, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(text, prompt tokens) for each golden row, all at once."""
    prompts = [r for r in rows if "prompt" in r]
    chats = [r for r in rows if "chat" in r]
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    outputs = dict(
        zip([r["prompt"] for r in prompts], llm.generate([r["prompt"] for r in prompts], greedy), strict=True)
    )
    if chats:
        talk = [[{"role": "user", "content": r["chat"]}] for r in chats]
        answers = llm.chat(talk, SamplingParams(temperature=0.0, max_tokens=48))
        outputs |= dict(zip([r["chat"] for r in chats], answers, strict=True))
    found = [outputs[r.get("prompt") or r["chat"]] for r in rows]
    return [(o.outputs[0].text, len(o.prompt_token_ids)) for o in found]


# Rows whose margins are wider than what two orders of addition make of activations rounded to eight bits.
WIDE = {
    "smollm2": ["What is the capital of France? Answer in one sentence.", "Name three primary colors."],
    "gemma3:270m": ["def fibonacci(n):"],
}


@pytest.mark.parametrize("model", WIDE)
def test_eight_bit_activations_say_what_llama_cpp_says(model: str) -> None:
    """The native kernels on the file as it is, and llama.cpp on the same."""
    rows = [r for r in GOLDEN[model] if (r.get("prompt") or r["chat"]) in WIDE[model]]
    with LLM(model, kernels="native", max_num_seqs=8, max_model_len=512) as llm:
        assert [text for text, _ in ask(llm, rows)] == [r["quantised"] for r in rows]


@pytest.mark.parametrize("model", GOLDEN)
@pytest.mark.parametrize(
    "rows", [slice(0, 2), pytest.param(slice(2, None), marks=pytest.mark.slow)], ids=["few", "rest"]
)
def test_greedy_text_is_that_of_llama_cpp(model: str, rows: slice) -> None:
    """In float32, by the reference kernels, on weights dequantised as llama.cpp dequantises them."""
    wanted = GOLDEN[model][rows]
    with LLM(model, kernels="reference", dtype="float32", max_num_seqs=8, max_model_len=512) as llm:
        assert ask(llm, wanted) == [(r["text"], r["prompt_tokens"]) for r in wanted]
