"""The engine on a GPU gives the ids of the CPU tests in float32: captured and eager, chunked and preempted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

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
