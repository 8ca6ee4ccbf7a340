"""A GGUF file on the native kernels is served without torch until somebody asks for more than tokens, and what it says
is the same whether torch is there or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from septet import LLM, SamplingParams, Structured
from tests import tiny
from tests.native import native_library

CHILD = """
import json, sys
model, early = sys.argv[1], sys.argv[2] == "early"
if early:
    import torch
from septet.config import EngineConfig
from septet.engine.process import build_engine
from septet.request import Request, SamplingParams

engine = build_engine(EngineConfig(model=model, device="cpu", kernels="native", max_num_seqs=8, num_kv_slots=4096))
told = []

def ask(each, **more):
    said = {str(i): [[], [], []] for i in range(len(each))}
    for i, params in enumerate(each):
        tokens = tuple((7 * i + 3 * j) % 290 for j in range(5 + 40 * i))
        params = SamplingParams(max_tokens=1 if more else 12, seed=100 + i, ignore_eos=True, **params)
        engine.scheduler.submit(Request(id=str(i), tokens=tokens, params=params, **more))
    while (plan := engine.scheduler.plan()) is not None:
        for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
            assert update.error is None, update.error
            tokens, logprobs, pooled = said[update.request]
            tokens += update.tokens
            logprobs += [[l.token, l.logprob, l.rank, l.top] for l in (*update.prompt_logprobs, *update.logprobs)]
            pooled.append(update.pooled.hex())
    told.append([said, "torch" in sys.modules])

cold, warm = {"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
ask([cold, warm, cold, {"temperature": 1.0}])
ask([cold, warm, {**cold, "logprobs": 3, "prompt_logprobs": 1}, {**warm, "repetition_penalty": 1.3, "min_tokens": 3}])
ask([cold, warm, cold, {"temperature": 1.0}])
ask([cold, warm], pooling="mean")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_library()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.to_gguf(tiny.build("llama", folder / "hf", attention_bias=True), folder / "m.gguf", "Q8_0")


def child(model: Path, when: str) -> list[Any]:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), when], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_the_same_answers_with_torch_and_without(model: Path) -> None:
    """Tokens, log-probabilities, pooled states to the last bit: plain steps, steps of all kinds, plain ones again."""
    late, early = child(model, "late"), child(model, "early")
    assert [there for _, there in early] == [True] * 4
    assert [there for _, there in late] == [False, True, True, True]
    for (got, _), (want, _) in zip(late, early, strict=True):
        assert got == want
    (first, _), (mixed, _), (again, _), _ = late
    assert first == again
    assert [len(tokens) for tokens, _, _ in first.values()] == [12] * 4
    assert [mixed[i][0] for i in "012"] == [first[i][0] for i in "012"]  # neighbours' wishes change nobody's tokens
    assert mixed["2"][1]


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_an_engine_process_imports_it_for_the_first_grammar(model: Path) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 8}
    with LLM(str(model), device="cpu", kernels="native", max_num_seqs=4, num_kv_slots=4096) as llm:
        pid = llm._session.client.info.pid
        before = llm.generate(["the and"], SamplingParams(**greedy), use_tqdm=False)
        assert before[0].outputs[0].token_ids
        assert not has_torch(pid)
        bound = SamplingParams(**greedy, structured=Structured("regex", "[ab]{4}"))
        texts = llm.generate(["the and"], [bound], use_tqdm=False)
        assert has_torch(pid)
        assert set(texts[0].outputs[0].text) <= {"a", "b"}
        assert len(texts[0].outputs[0].text) == 4
        assert llm.generate(["the and"], SamplingParams(**greedy, logprobs=2), use_tqdm=False)[0].outputs[0].logprobs
        after = llm.generate(["the and"], SamplingParams(**greedy), use_tqdm=False)
        assert after[0].outputs[0].token_ids == before[0].outputs[0].token_ids
