"""Pooled requests in the scheduler: cut into steps, beside others, preempted, with their prompt in the cache."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from septet.engine.echo import POOL_WIDTH, EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from septet.engine.messages import Update

VOCAB = 1000
ONE = SamplingParams(max_tokens=1, seed=0)


def mean(tokens: tuple[int, ...]) -> list[float]:
    return [sum(t % POOL_WIDTH == i for t in tokens) / len(tokens) for i in range(POOL_WIDTH)]


def read(update: Update) -> list[float]:
    return [round(v, 5) for v in struct.unpack(f"<{POOL_WIDTH}f", update.pooled)]


def test_pools_are_whole_whatever_happens_meanwhile() -> None:
    rng = random.Random(3)
    cache = KVCache(161)
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=128)
    scheduler, executor = Scheduler(limits, cache, VOCAB), EchoExecutor(vocab_size=VOCAB)
    shared = tuple(rng.randrange(VOCAB) for _ in range(64))
    prompts = {f"p{i}": shared + tuple(rng.randrange(VOCAB) for _ in range(1 + i)) for i in range(6)}
    decode = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    found: dict[str, Update] = {}
    for number, (name, tokens) in enumerate(prompts.items()):
        scheduler.submit(Request(id=name, tokens=tokens, params=ONE, pooling="mean", priority=1, arrival=number))
    step = 0
    while (plan := scheduler.plan()) is not None:
        if step in (1, 4):  # more urgent, and together larger than the pool: the pooled ones give way
            for i in range(2):
                tokens = shared[: 40 + i]
                scheduler.submit(Request(id=f"u{step}.{i}", tokens=tokens, params=decode, arrival=step))
        step += 1
        for update in scheduler.commit(executor.launch(plan).result()):
            if update.finish_reason is not None:
                found[update.request] = update
        scheduler.audit()
    assert scheduler.stats.preemptions > 0
    assert cache.leased == 0
    for name, tokens in prompts.items():
        assert found[name].finish_reason is FinishReason.LENGTH
        assert read(found[name]) == [round(v, 5) for v in mean(tokens)]
    assert all(not update.pooled for name, update in found.items() if name.startswith("u"))


def test_an_executor_that_gives_no_pool_ends_that_request_alone() -> None:
    cache = KVCache(161)
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=128)
    scheduler, executor = Scheduler(limits, cache, VOCAB), EchoExecutor(vocab_size=VOCAB)
    scheduler.submit(Request(id="pooled", tokens=(1, 2, 3), params=ONE, pooling="last"))
    scheduler.submit(Request(id="plain", tokens=(1, 2, 3), params=ONE))
    found = {}
    while (plan := scheduler.plan()) is not None:
        result = executor.launch(plan).result()
        for row in result.rows:
            row.pooled = b""
        found |= {update.request: update for update in scheduler.commit(result)}
    assert found["pooled"].finish_reason is FinishReason.ERROR
    assert "pooled" in (found["pooled"].error or "")
    assert found["plain"].finish_reason is FinishReason.LENGTH
