"""The engine against transformers: greedy ids in float32, however requests are batched, chunked, shared or preempted.

The whole path below the client: scheduler, cache, runner, sampler, on checkpoints of each family and on the same
weights as GGUF. Each way of running must really happen (chunks, hits, preemptions), or the test says so.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from septet.config import EngineConfig
from septet.engine.process import Engine, build_engine
from septet.request import FinishReason, Request, SamplingParams
from tests import tiny
from tests.native import native_library

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

N_OUT = 64
LENGTHS = (1, 5, 23, 40, 61)


@dataclass(frozen=True)
class Oracle:
    """A checkpoint, its GGUF twin, prompts, and what transformers says to each."""

    directory: Path
    gguf: Path
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    import transformers

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp(request.param)
    directory = tiny.build(request.param, root / "hf")
    gguf = tiny.to_gguf(directory, root / "model.gguf", "F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rng = random.Random(request.param)
    prompts = [[rng.randrange(300) for _ in range(n)] for n in LENGTHS]
    prompts.append([*prompts[-1][:50], 7, 8, 9])  # shares 50 tokens with the one before
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=N_OUT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=302,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return Oracle(directory, gguf, prompts, answers)


@pytest.fixture(params=["reference", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        native_library()
    return request.param


def start(model: Path, kernels: str, **settings: object) -> Engine:
    defaults: dict[str, object] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_slots": 4096}
    engine = {"model": str(model), "device": "cpu", "dtype": "float32", "kernels": kernels, **defaults, **settings}
    return build_engine(EngineConfig(**engine))  # type: ignore[arg-type]


def ask(engine: Engine, prompts: Sequence[Sequence[int]], n_out: int = N_OUT, *, stagger: int = 0) -> list[list[int]]:
    """Greedy answers to all prompts at once; with `stagger`, one more request joins every so many steps."""
    scheduler, executor = engine.scheduler, engine.executor
    params = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True, seed=0)
    waiting = deque(Request(id=str(i), tokens=tuple(p), params=params) for i, p in enumerate(prompts))
    answers: dict[str, list[int]] = {request.id: [] for request in waiting}
    ended: set[str] = set()
    in_flight: deque = deque()
    step = 0
    while waiting or in_flight or len(ended) < len(prompts):
        while waiting and (not stagger or step % stagger == 0):
            scheduler.submit(waiting.popleft())
            if stagger:
                break
        step += 1
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append(executor.launch(plan))
        while in_flight and (len(in_flight) >= executor.depth or plan is None):
            for update in scheduler.commit(in_flight.popleft().result()):
                answers[update.request] += update.tokens
                assert update.error is None
                if update.finish_reason is not None:
                    assert update.finish_reason is FinishReason.LENGTH
                    ended.add(update.request)
        assert step < 20_000, "the engine makes no progress"
    scheduler.cache.audit()
    return [answers[str(i)] for i in range(len(prompts))]


def test_one_at_a_time_from_both_formats(oracle: Oracle, kernels: str) -> None:
    for model in (oracle.directory, oracle.gguf):
        engine = start(model, kernels, enable_prefix_caching=False)
        assert [ask(engine, [p])[0] for p in oracle.prompts] == oracle.answers
        assert engine.scheduler.stats.cached_tokens == 0


def test_batched_and_overlapped(oracle: Oracle, kernels: str) -> None:
    engine = start(oracle.directory, kernels, overlap="on")
    assert engine.executor.depth == 2
    assert ask(engine, oracle.prompts, stagger=3) == oracle.answers
    assert engine.scheduler.stats.mixed_steps > 0


def test_chunked(oracle: Oracle, kernels: str) -> None:
    engine = start(oracle.directory, kernels, max_num_batched_tokens=9, enable_prefix_caching=False)
    assert ask(engine, oracle.prompts, stagger=2) == oracle.answers
    stats = engine.scheduler.stats
    assert stats.mixed_steps > 0, "prefill chunks never met decoding rows"
    assert stats.computed_tokens >= sum(map(len, oracle.prompts)) + len(oracle.prompts) * (N_OUT - 1)


def test_prefix_shared(oracle: Oracle, kernels: str) -> None:
    engine = start(oracle.gguf, kernels)
    assert ask(engine, oracle.prompts) == oracle.answers
    again = ask(engine, [p + a[:10] for p, a in zip(oracle.prompts, oracle.answers, strict=True)], N_OUT - 10)
    assert again == [answer[10:] for answer in oracle.answers]
    assert engine.scheduler.stats.cached_tokens > sum(map(len, oracle.prompts))


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_preempted_and_resumed(oracle: Oracle, kernels: str, overlap: str) -> None:
    engine = start(
        oracle.directory, kernels, num_kv_slots=160, max_model_len=130, overlap=overlap, max_num_batched_tokens=16
    )
    engine.scheduler.estimate.ratio = 0.0  # admit as if nobody answered at length: the pool must run out
    assert ask(engine, oracle.prompts) == oracle.answers
    assert engine.scheduler.stats.preemptions > 0, "nothing was preempted: the test shows nothing"
