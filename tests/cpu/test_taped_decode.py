"""Decode steps that sample natively draw the tokens that the torch sampler draws, for any parameters side by side,
under masks too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from septet.config import EngineConfig
from septet.engine.constraints import TokenMasks
from septet.engine.process import Engine, build_engine
from septet.engine.sampler import Pick, sample
from septet.engine.taped import TakenStep
from septet.kernels.reference import ReferenceOps
from septet.request import Request, SamplingParams
from septet.step import Join, PlanRow, StepPlan
from tests import tiny
from tests.native import native_library

if TYPE_CHECKING:
    from pathlib import Path

    from septet.engine.taped_torch import TapedSteps

N_OUT = 40
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 10_000},
    {"temperature": 100.0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_library()
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("tiny"))


def start(model: Path, kernels: str, **settings: Any) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(model),
            device="cpu",
            dtype="float32",
            kernels=kernels,
            max_num_seqs=16,
            num_kv_slots=4096,
            **settings,
        )
    )


def answers(engine: Engine, params: list[dict[str, Any]]) -> list[list[int]]:
    requests = [
        Request(
            id=str(i),
            tokens=tuple(range(20 + i, 40 + i)),
            params=SamplingParams(max_tokens=N_OUT, seed=1000 + i, ignore_eos=True, **p),
        )
        for i, p in enumerate(params)
    ]
    out: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        engine.scheduler.submit(request)
    ended = 0
    while ended < len(requests):
        plan = engine.scheduler.plan()
        assert plan is not None
        for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
            assert update.error is None
            out[update.request] += update.tokens
            ended += update.finish_reason is not None
    return list(out.values())


def test_the_same_tokens_as_in_torch(model: Path) -> None:
    native = start(model, "native")
    assert native.executor.decode is not None  # type: ignore[attr-defined]
    want = answers(start(model, "reference"), PARAMS)
    assert answers(native, PARAMS) == want
    assert len({tuple(tokens) for tokens in want}) == len(want)


def test_the_same_tokens_alone_and_without_the_native_step(model: Path) -> None:
    together = answers(start(model, "native"), PARAMS)
    assert answers(start(model, "native", enforce_eager=True), PARAMS) == together
    engine = start(model, "native", enable_prefix_caching=False)
    for i in (0, 3):
        padded = [PARAMS[i]] if i == 0 else [{"temperature": 0.0}] * i + [PARAMS[i]]
        assert answers(engine, padded)[i] == together[i]


def test_rows_that_need_python_share_the_step(model: Path) -> None:
    """A penalty or a bias in one row sends the step's sampling to Python: the other rows' tokens stay the same."""
    mixed = [*PARAMS, {"temperature": 0.7, "repetition_penalty": 1.3}, {"temperature": 0.0, "logit_bias": {7: 100.0}}]
    got = answers(start(model, "native"), mixed)
    assert got[: len(PARAMS)] == answers(start(model, "native"), PARAMS)
    assert got == answers(start(model, "reference"), mixed)
    assert set(got[-1]) == {7}


@torch.inference_mode()
def test_a_usual_step_is_one_call_and_any_other_is_not(model: Path) -> None:
    """`quick` takes steps of rows that decode and sample, and draws what the long way draws; no other step."""
    engine = start(model, "native")
    graphs, rows, _ = masked_step(engine, 1)
    executor: Any = engine.executor
    assert graphs.decode is executor.decode
    free = graphs.run(rows, sample=True).tokens.tolist()
    taken = executor.launch(StepPlan(7, rows=tuple(rows)))
    assert isinstance(taken, TakenStep)
    result = taken.result()
    assert (result.step, [row.tokens for row in result.rows]) == (7, [(token,) for token in free])
    assert [row.request for row in result.rows] == [row.request for row in rows]
    row = rows[0]
    odd: list[dict[str, Any]] = [{"n": 2}, {"n_sample": 0}, {"tokens": (3,)}, {"prompt_logprobs": True}]
    for change in [*odd, {"pooling": "mean"}]:
        assert executor.decode.quick(StepPlan(8, rows=(replace(row, **change), *rows[1:]))) is None
    joins = (Join("8", 8, (1, 2), 1, (), SamplingParams(logprobs=1, seed=0)),)
    executor.tables.join(joins)
    quick = executor.decode.quick
    assert quick(StepPlan(8, joins, tuple(rows))) is None
    assert quick(StepPlan(8, rows=(*rows, PlanRow("8", 8, 1, 1, (9,), 1)))) is None
    assert quick(StepPlan(8, rows=(PlanRow("none", 9, 1, 1, (9,), 1),))) is None


def test_a_row_of_nan_fails_alone() -> None:
    rows = [PlanRow(name, i, 4, 1, (i,), 1) for i, name in enumerate("abc")]
    got = TakenStep(3, rows, [5, -1, 6]).result().rows
    assert [(row.tokens, row.error is None) for row in got] == [((5,), True), ((), False), ((6,), True)]


def masked_step(engine: Engine, seed: int) -> tuple[TapedSteps, list[PlanRow], TokenMasks]:
    """Every row of PARAMS computes one token; masks of all kinds, in another order than the rows'."""
    executor: Any = engine.executor
    n, vocab, start = len(PARAMS), executor.tape.vocab, 4
    tokens = tuple(range(7, 7 + start + 1))
    params = [SamplingParams(seed=seed * 100 + i, **p) for i, p in enumerate(PARAMS)]
    slots = [tuple(range(100 * i, 100 * i + start)) for i in range(n)]
    joins = [Join(str(i), n - 1 - i, tokens, start, slots[i], p) for i, p in enumerate(params)]
    executor.tables.join(joins)
    rows = [PlanRow(str(i), n - 1 - i, start, 1, (100 * i + start,), 1) for i in range(n)]
    words = torch.randint(
        -(2**31), 2**31, (n + 2, -(-vocab // 32)), generator=torch.Generator().manual_seed(seed)
    ).int()
    words[0] = -1  # everything
    words[1] = 0
    words[1, 2] = 1 << 5  # one token
    words[2, 1:] = 0  # few
    words[3] = 0  # none
    line = torch.tensor([0, 1, -1, 2, n + 1, 3, 1, -1])
    return executor.runner.graphs, rows, TokenMasks(words, line.roll(seed))


@torch.inference_mode()
def test_drawn_under_masks_as_the_reference_draws(model: Path) -> None:
    engine = start(model, "native")
    runner = engine.executor.runner  # type: ignore[attr-defined]
    for seed in range(16):
        graphs, rows, masks = masked_step(engine, seed)
        out = graphs.run(rows, sample=False)
        logits, row, position = out.logits[: len(rows)].clone(), out.row[: len(rows)], out.position()[: len(rows)]
        picks = [Pick(r.row, 5, runner.rows.info[r.row]) for r in rows]
        want = sample(ReferenceOps(), logits, picks, runner.rows, row, position, masks).tokens
        free = graphs.run(rows, sample=True).tokens.clone()
        got = graphs.run(rows, sample=True, masks=masks).tokens.clone()
        assert got.tolist() == want.tolist()
        assert runner.rows.tokens[row, position].tolist() == want.tolist()
        assert (got == 69).sum() >= 2  # the only token that they may take
        unbound = (masks.line <= 0).nonzero()[:, 0]
        assert got[unbound].tolist() == free[unbound].tolist()
        assert (got != free).any()
