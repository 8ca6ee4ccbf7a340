"""The EchoExecutor as an oracle: it refuses plans that break a rule of step.py, each by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from septet.engine.echo import BrokenPlan, EchoExecutor
from septet.request import SamplingParams
from septet.step import Join, PlanRow, StepPlan

PARAMS = SamplingParams(seed=1)


def join(request: str = "a", row: int = 0, slots: tuple[int, ...] = (), tokens: tuple[int, ...] = (5, 6, 7)) -> Join:
    return Join(request, row, tokens, len(tokens), slots, PARAMS)


FIRST = StepPlan(0, (join(),), (PlanRow("a", 0, 0, 3, (1, 2, 3), 1),))
DECODE = PlanRow("a", 0, 3, 1, (4,), 1)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (StepPlan(2, (), (DECODE,)), "step 2 follows step 0"),
        (StepPlan(1), "has rows"),
        (StepPlan(1, (), (DECODE, replace(DECODE, slots=(5,)))), "rows are distinct"),
        (StepPlan(1, (), (replace(DECODE, row=3),)), "has joined"),
        (StepPlan(1, (), (replace(DECODE, request="b"),)), "belongs to it"),
        (StepPlan(1, (), (replace(DECODE, start=4),)), "3 positions are computed"),
        (StepPlan(1, (), (replace(DECODE, n=2, slots=(4, 5)),)), "computes 2 of 1"),
        (StepPlan(1, (), (replace(DECODE, slots=()),)), "0 slots for 1"),
        (StepPlan(1, (), (replace(DECODE, slots=(0,)),)), "slot 0"),
        (StepPlan(1, (), (replace(DECODE, n_sample=0),)), "samples 0"),
        (StepPlan(1, (), (replace(DECODE, slots=(2,)),)), "slots of a are distinct"),
        (StepPlan(1, (join("b", 1),), (DECODE,)), "comes with a row"),
        (StepPlan(1, (join("b", 1),), (DECODE, PlanRow("b", 1, 0, 3, (4, 8, 9), 1))), "written slots are distinct"),
        (StepPlan(1, (join("b", 1),), (PlanRow("b", 1, 0, 3, (2, 8, 9), 1), DECODE)), "foreign KV in slot 2"),
        (StepPlan(1, (join("b", 1, (9,)),), (PlanRow("b", 1, 1, 2, (5, 6), 1),)), "foreign KV in slot 9"),
        (StepPlan(1, (join("b", 1, (2,)),), (PlanRow("b", 1, 1, 2, (5, 6), 1),)), "foreign KV in slot 2"),
        (StepPlan(1, (join("b", 1, (1, 2, 3)),), (PlanRow("b", 1, 3, 1, (5,), 1),)), "has a token to compute"),
    ],
)
def test_a_broken_plan_is_refused(plan: StepPlan, says: str) -> None:
    executor = EchoExecutor()
    executor.launch(FIRST)
    with pytest.raises(BrokenPlan, match=says):
        executor.launch(plan)


def test_a_shared_prefix_is_allowed() -> None:
    executor = EchoExecutor()
    executor.launch(FIRST)
    shared = StepPlan(1, (join("b", 1, (1, 2)),), (DECODE, PlanRow("b", 1, 2, 1, (9,), 1)))
    assert [row.request for row in executor.launch(shared).result().rows] == ["a", "b"]


def test_text_depends_on_seed_and_not_on_rows_or_slots() -> None:
    def first_token(seed: int, row: int, slots: tuple[int, ...]) -> int:
        asked = replace(join(row=row), params=SamplingParams(seed=seed))
        plan = StepPlan(0, (asked,), (PlanRow("a", row, 0, 3, slots, 1),))
        return EchoExecutor(vocab_size=100_000).launch(plan).result().rows[0].tokens[0]

    assert first_token(1, 0, (1, 2, 3)) == first_token(1, 7, (9, 4, 5))
    assert len({first_token(seed, 0, (1, 2, 3)) for seed in range(20)}) > 15


def test_a_step_takes_the_time_it_pretends_to() -> None:
    import time

    executor = EchoExecutor(depth=2, step_s=0.02)
    start = time.monotonic()
    first = executor.launch(FIRST)
    second = executor.launch(StepPlan(1, (), (DECODE,)))
    first.result(), second.result()
    assert time.monotonic() - start >= 0.04, "steps run one after the other"
