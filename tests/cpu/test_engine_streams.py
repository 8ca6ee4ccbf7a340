"""64 concurrent streams on a real model, a third of them leaving at random moments.

Every stream ends; the survivors' ids are those of a quiet run, one request at a time; the audit finds every slot; waste
stays below 1 %. The engine runs through the client, with strict audits, a pool that is too small for all at once and
prompts that share prefixes; sampling at temperature 1 with a seed each.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
import torch

from septet.config import EngineConfig
from septet.engine.client import InlineClient
from septet.request import FinishReason, Request, SamplingParams
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from septet.engine.messages import EngineStats

N_STREAMS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("tiny") / "hf")


def requests() -> list[Request]:
    rng = random.Random(5)
    system = [rng.randrange(300) for _ in range(40)]
    made = []
    for i in range(N_STREAMS):
        tokens = (system if i % 2 else []) + [rng.randrange(300) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=i, max_tokens=rng.randint(8, 60), top_k=rng.choice([0, 20])
        )
        made.append(Request(id=f"r{i}", tokens=tuple(tokens), params=params, eos_token_ids=(301,), arrival=float(i)))
    return made


async def stream(client: InlineClient, request: Request, leave_after: int | None) -> list[int] | None:
    """The ids of one request, or None if we left after so many updates."""
    tokens: list[int] = []
    async with aclosing(client.generate(request)) as updates:
        n = 0
        if leave_after == 0:
            return None
        async for update in updates:
            tokens += update.tokens
            n += 1
            if update.finish_reason is not None:
                assert update.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), update.error
                return tokens
            if n == leave_after:
                return None
    raise AssertionError("the stream ended without a finish reason")


async def run(model: Path, leaving: dict[int, int], at_once: int, slots: int) -> tuple[list, EngineStats]:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        kernels="reference",
        max_num_seqs=32,
        max_num_batched_tokens=64,
        num_kv_slots=slots,
        max_model_len=256,
    )
    client = await InlineClient.start(config, strict=True)
    gate = asyncio.Semaphore(at_once)

    async def one(i: int, request: Request) -> list[int] | None:
        async with gate:
            return await stream(client, request, leaving.get(i))

    answers = await asyncio.wait_for(asyncio.gather(*(one(i, r) for i, r in enumerate(requests()))), 240)
    for _ in range(200):  # aborts are heard at the loop's next turn
        stats = await client.stats()
        if stats.running == stats.waiting == 0:
            break
        await asyncio.sleep(0.02)
    client.loop.scheduler.cache.audit()
    await client.close()
    return answers, stats


def test_random_aborts_disturb_nobody(model: Path) -> None:
    rng = random.Random(11)
    leaving = {i: rng.randint(0, 20) for i in rng.sample(range(N_STREAMS), N_STREAMS // 3)}
    quiet, _ = asyncio.run(run(model, {}, 1, 4096))
    assert all(quiet)
    busy, stats = asyncio.run(run(model, leaving, N_STREAMS, 1500))
    for i in range(N_STREAMS):
        assert busy[i] in ((None, quiet[i]) if i in leaving else (quiet[i],)), f"stream {i}"
    assert sum(answer is None for answer in busy) > N_STREAMS // 6, "hardly anybody left: the test shows little"
    assert stats.running == stats.waiting == stats.slots_leased == 0
    assert stats.slots_free + stats.slots_cached == stats.slots_total
    assert stats.audit_failures == 0
    assert stats.kv_waste < 0.01
    assert stats.mixed_steps > 0
    assert stats.cached_tokens > 0
