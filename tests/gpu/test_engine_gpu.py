"""The engine on a GPU gives the ids of the CPU tests in float32: captured and eager, chunked and preempted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from septet.request import Request, SamplingParams
from tests.cpu.test_engine_parity import ask, oracle, start

if TYPE_CHECKING:
    from tests.cpu.test_engine_parity import Oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is there")]
assert oracle  # the fixture


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("eager", [False, True])
def test_greedy_ids_in_float32(oracle: Oracle, kernels: str, eager: bool) -> None:
    engine = start(oracle.directory, device="cuda", kernels=kernels, enforce_eager=eager)
    assert ask(engine, oracle.prompts, stagger=3) == oracle.answers
    graphs = engine.executor.runner.graphs  # type: ignore[attr-defined]
    assert (graphs is not None) == (kernels == "triton" and not eager)


def test_chunked_and_preempted_with_captured_steps(oracle: Oracle) -> None:
    engine = start(
        oracle.directory,
        device="cuda",
        kernels="triton",
        num_kv_slots=160,
        max_model_len=130,
        max_num_batched_tokens=16,
    )
    engine.scheduler.estimate.ratio = 0.0
    assert ask(engine, oracle.prompts) == oracle.answers
    assert engine.scheduler.stats.preemptions > 0


def test_a_chunk_without_a_sample_is_awaited_too(oracle: Oracle) -> None:
    """Or the host would run ahead of the device by all chunks of a long prompt, past whoever comes meanwhile."""
    engine = start(oracle.directory, device="cuda", kernels="triton", max_num_batched_tokens=16, enforce_eager=True)
    prompt = max(oracle.prompts, key=len)
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
    engine.scheduler.submit(Request(id="long", tokens=tuple(prompt), params=params))
    plan = engine.scheduler.plan()
    assert plan is not None
    assert plan.rows[0].n_sample == 0
    engine.executor.launch(plan).result()  # kernels are compiled now
    busy = torch.ones(4096, 4096, device="cuda")
    for _ in range(200):
        busy = busy @ busy * 0.0 + 1.0
    behind = torch.cuda.Event()
    behind.record()
    pending = engine.executor.launch(plan)  # writes the same positions again
    assert not behind.query(), "the launch waited"
    pending.result()
    assert behind.query(), "the result did not wait"
