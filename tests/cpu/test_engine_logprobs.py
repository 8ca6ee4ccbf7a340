"""Log-probabilities of prompt and output against transformers' logits, in chunks and beside other requests."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
import torch

from septet.request import Request, SamplingParams
from tests import tiny
from tests.cpu.test_engine_parity import start
from tests.native import native_library

if TYPE_CHECKING:
    from pathlib import Path

    from septet.engine.process import Engine
    from septet.step import Logprobs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("qwen3", tmp_path_factory.mktemp("tiny") / "hf")


def reference(directory: Path, ids: list[int]) -> torch.Tensor:
    """(n, V) log-probabilities of what follows each position."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def collect(engine: Engine, requests: list[Request]) -> dict[str, tuple[list[int], list[Logprobs], list[Logprobs]]]:
    """request id -> (tokens, output log-probabilities, prompt log-probabilities)."""
    for request in requests:
        engine.scheduler.submit(request)
    found: dict[str, tuple[list[int], list[Logprobs], list[Logprobs]]] = defaultdict(lambda: ([], [], []))
    while (plan := engine.scheduler.plan()) is not None:
        for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
            assert update.error is None
            parts = found[update.request]
            parts[0].extend(update.tokens)
            parts[1].extend(update.logprobs)
            parts[2].extend(update.prompt_logprobs)
    return found


def check(entry: Logprobs, token: int, logp: torch.Tensor, k: int) -> None:
    """One position against float64."""
    assert entry.token == token
    assert entry.logprob == pytest.approx(logp[token].item(), abs=1e-4)
    assert entry.rank == int((logp > logp[token] + 1e-5).sum()) + 1
    values, ids = logp.topk(k)
    assert [t for t, _ in entry.top] == ids.tolist()
    assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("step_tokens", [512, 9])
def test_prompt_and_output_logprobs(directory: Path, step_tokens: int, kernels: str) -> None:
    if kernels == "native":
        native_library()
    rng = random.Random(1)
    prompts = {name: [rng.randrange(300) for _ in range(n)] for name, n in (("a", 150), ("b", 3), ("c", 40))}
    params = {
        "a": SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=3, logprobs=2, seed=0, ignore_eos=True),
        "b": SamplingParams(temperature=0.0, max_tokens=9, logprobs=0, seed=0, ignore_eos=True),
        "c": SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, seed=0, ignore_eos=True),
    }
    engine = start(directory, kernels, max_num_batched_tokens=step_tokens)
    collect(engine, [Request(id="warm", tokens=tuple(prompts["a"]), params=params["b"])])  # the prompt is cached now
    found = collect(engine, [Request(id=i, tokens=tuple(prompts[i]), params=params[i]) for i in prompts])
    for name, prompt in prompts.items():
        tokens, output, prompt_part = found[name]
        ids = prompt + tokens
        logp = reference(directory, ids)
        p = params[name]
        assert len(tokens) == p.max_tokens
        assert len(output) == (0 if p.logprobs is None else len(tokens))
        for i, entry in enumerate(output):
            check(entry, tokens[i], logp[len(prompt) + i - 1], p.logprobs or 0)
        assert len(prompt_part) == (0 if p.prompt_logprobs is None else len(prompt) - 1)
        for i, entry in enumerate(prompt_part):
            check(entry, prompt[i + 1], logp[i], p.prompt_logprobs or 0)
    engine.scheduler.cache.audit()
