"""Captured steps on a GPU: replayed chunks and decode steps give the ids of eager ones, within the memory counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from septet.bench.shapes import write_shape
from septet.config import EngineConfig
from septet.engine.process import build_engine
from septet.engine.sizing import GRAPH_BYTES, captured_bytes
from septet.hub.model_config import read_model_config
from septet.request import Request, SamplingParams
from tests.cpu.test_engine_parity import ask, oracle, start

if TYPE_CHECKING:
    from pathlib import Path

    from septet.engine.graphs import StepGraphs
    from septet.engine.process import Engine
    from tests.cpu.test_engine_parity import Oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is there")]
assert oracle  # the fixture


@pytest.fixture(autouse=True)
def only_the_first_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured at the start leaves something to capture later."""
    monkeypatch.setattr("septet.engine.graphs.EAGER_S", 0.0)


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine.executor.runner.graphs  # type: ignore[attr-defined]
    assert graphs is not None
    return graphs


def capture_all(engine: Engine) -> StepGraphs:
    graphs = graphs_of(engine)
    while graphs.spare(busy=False):
        pass
    assert not graphs.broken
    return graphs


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_chunks_mixed_with_decoding_rows(oracle: Oracle, overlap: str) -> None:
    """Twice: shapes are captured once they have been asked for. The second time every step is a replay."""
    settings = {"max_num_batched_tokens": 40, "overlap": overlap, "enable_prefix_caching": False}
    engine = start(oracle.directory, device="cuda", kernels="triton", **settings)
    graphs = graphs_of(engine)
    for _ in range(2):
        graphs.wanted.clear()
        assert ask(engine, oracle.prompts, stagger=3) == oracle.answers
        missing = list(graphs.wanted)
        capture_all(engine)
    assert not missing
    assert {shape.decode for shape in graphs.captured} == {True, False}


def test_captured_while_the_engine_is_busy(oracle: Oracle) -> None:
    """Between steps in flight, as the loop does it: what is under way is not disturbed."""
    engine = start(oracle.directory, device="cuda", kernels="triton", overlap="on", max_num_batched_tokens=96)
    graphs = graphs_of(engine)
    first, launch = len(graphs.captured), engine.executor.launch

    def launch_then_capture(plan):  # type: ignore[no-untyped-def]
        pending = launch(plan)
        graphs._not_before = 0.0
        graphs.spare(busy=True)
        return pending

    engine.executor.launch = launch_then_capture  # type: ignore[method-assign]
    for _ in range(3):
        assert ask(engine, oracle.prompts, stagger=3) == oracle.answers
    assert len(graphs.captured) > first
    assert not graphs.broken


def test_logits_survive_until_an_eager_sampler_has_read_them(oracle: Oracle) -> None:
    """The logits of a shape share memory with other graphs; sampling that is not captured reads them all the same."""

    def answers(engine: Engine) -> dict[str, list[int]]:
        for i, prompt in enumerate(oracle.prompts):
            more = {"top_k": 9, "logprobs": 3} if i % 2 else {}
            params = SamplingParams(temperature=0.8, seed=i, max_tokens=40, ignore_eos=True, **more)
            engine.scheduler.submit(Request(id=str(i), tokens=tuple(prompt), params=params))
        got: dict[str, list[int]] = {}
        while (plan := engine.scheduler.plan()) is not None:
            for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
                got.setdefault(update.request, []).extend(update.tokens)
        return got

    engine = start(oracle.directory, device="cuda", kernels="triton", overlap="off")
    capture_all(engine)
    eager = start(oracle.directory, device="cuda", kernels="triton", overlap="off", enforce_eager=True)
    assert answers(engine) == answers(eager)


def test_the_memory_of_captured_steps_is_within_what_was_counted(tmp_path: Path) -> None:
    """Every usual shape of the 1B model and its widest logits, by the device's own count; then a full-size step."""
    directory = write_shape("1b", tmp_path)
    settings = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096, "num_kv_slots": 65536}
    engine = build_engine(EngineConfig(model=str(directory), device="cuda", **settings))
    graphs = graphs_of(engine)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    n_before = len(graphs.captured)
    capture_all(engine)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used = before - torch.cuda.mem_get_info()[0]
    counted = captured_bytes(read_model_config(directory), graphs.shapes, "bfloat16")
    print(f"{len(graphs.captured) - n_before} more graphs: {used >> 20} MiB of {counted >> 20} MiB counted for all")
    assert used <= (len(graphs.captured) - n_before) * GRAPH_BYTES


def test_out_of_memory_in_a_step_ends_one_request(oracle: Oracle) -> None:
    """Faked where the allocator would say it: the step is tried twice, then its largest request ends."""
    engine = start(oracle.directory, device="cuda", kernels="triton", overlap="off")
    runner, tries = engine.executor.runner, []  # type: ignore[attr-defined]
    run = runner.run

    def full(plan):  # type: ignore[no-untyped-def]
        if max(row.n for row in plan.rows) > 30:  # the first chunk of the longest prompt alone
            tries.append(plan.step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(plan)

    runner.run = full
    prompts = sorted(oracle.prompts, key=len)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)
    for i, prompt in enumerate([*prompts[:3], prompts[-1]]):
        engine.scheduler.submit(Request(id=str(i), tokens=tuple(prompt), params=params))
    errors, tokens = {}, {}
    while (plan := engine.scheduler.plan()) is not None:
        try:
            updates = engine.scheduler.commit(engine.executor.launch(plan).result())
        except Exception as error:
            updates = engine.scheduler.fail(plan, error)
        for update in updates:
            tokens.setdefault(update.request, []).extend(update.tokens)
            if update.error:
                errors[update.request] = update.error_kind
    assert errors == {"3": "out_of_memory_error"}
    assert len(tries) == 2
    by_prompt = dict(zip(map(tuple, oracle.prompts), oracle.answers, strict=True))
    for i in range(3):
        assert tokens[str(i)] == by_prompt[tuple(prompts[i])][:8]
