"""Pooled hidden states against transformers': in chunks, beside other requests, of a prompt that the cache holds."""

from __future__ import annotations

import random
from array import array
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

ONE = SamplingParams(temperature=0.0, max_tokens=1, seed=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("qwen3", tmp_path_factory.mktemp("tiny") / "hf")


def pooled(engine: Engine, requests: list[Request]) -> dict[str, array[float]]:
    for request in requests:
        engine.scheduler.submit(request)
    found = {}
    while (plan := engine.scheduler.plan()) is not None:
        for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
            assert update.error is None
            if update.pooled:
                assert update.finish_reason is not None
                assert update.cached_tokens == 0
                found[update.request] = array("f", update.pooled)
    engine.scheduler.cache.audit()
    return found


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("step_tokens", [512, 9])
def test_pools_equal_transformers_hidden_states(directory: Path, step_tokens: int, kernels: str) -> None:
    import transformers

    if kernels == "native":
        native_library()
    rng = random.Random(1)
    prompts = {name: [rng.randrange(300) for _ in range(n)] for name, n in (("a", 60), ("b", 1), ("c", 19), ("d", 9))}
    kinds = {"a": "mean", "b": "mean", "c": "last", "d": "mean"}
    engine = start(directory, kernels, max_num_batched_tokens=step_tokens)
    assert pooled(engine, [Request(id="warm", tokens=tuple(prompts["a"]), params=ONE)]) == {}
    plain = SamplingParams(temperature=0.0, max_tokens=12, seed=0, ignore_eos=True)
    beside = Request(id="beside", tokens=tuple(range(30)), params=plain)
    asked = [Request(id=i, tokens=tuple(p), params=ONE, pooling=kinds[i]) for i, p in prompts.items()]
    for _ in range(2):  # the second time every prompt is in the cache
        found = pooled(engine, [beside, *asked])
        assert found.keys() == prompts.keys()
        model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        for name, ids in prompts.items():
            with torch.inference_mode():
                states = model(torch.tensor([ids])).last_hidden_state[0]
            wanted = states.mean(0) if kinds[name] == "mean" else states[-1]
            assert list(found[name]) == pytest.approx(wanted.tolist(), abs=2e-3, rel=1e-2)
