"""How long a request waited, told once, with its first token; against a clock that the test turns."""

from __future__ import annotations

from septet.engine.messages import Update
from septet.engine.waits import Waits
from septet.request import FinishReason, SamplingParams
from septet.step import Join, StepPlan


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plan(*joining: str) -> StepPlan:
    joins = tuple(Join(id, 0, (1,), 1, (), SamplingParams(), ()) for id in joining)
    return StepPlan(0, joins, ())


def times(update: Update) -> tuple[float, float]:
    return round(update.waited_s, 6), round(update.prefill_s, 6)


def test_from_sending_to_the_first_step_and_from_there_to_the_first_token() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.entered("a", sent_at=99.5)
    waits.entered("b")
    clock.now = 102.0
    waits.launched(plan("a"))
    clock.now = 103.0
    [scored, other] = waits.told([Update("a", prompt_logprobs=()), Update("x", (1,))])
    assert (times(scored), times(other)) == ((0, 0), (0, 0)), "no token of it yet"
    waits.launched(plan("b"))
    clock.now = 105.0
    told = waits.told([Update("a", (7,)), Update("b", (8, 9), finish_reason=FinishReason.STOP)])
    assert [(u.request, u.tokens, *times(u)) for u in told] == [("a", (7,), 2.5, 3.0), ("b", (8, 9), 3.0, 2.0)]
    assert [times(u) for u in waits.told([Update("a", (7,))])] == [(0, 0)], "once"
    assert len(waits) == 0


def test_who_joins_again_has_waited_once_and_who_leaves_leaves_nothing() -> None:
    clock = Clock()
    waits = Waits(clock)
    for id in ("a", "b", "c"):
        waits.entered(id)
    waits.launched(plan("a", "b"))
    clock.now = 200.0
    waits.launched(plan("a"))  # it was preempted
    gone = [Update("b", finish_reason=FinishReason.ABORT), Update("c", finish_reason=FinishReason.ABORT)]
    assert waits.told(gone) == gone
    [told] = waits.told([Update("a", (1,))])
    assert times(told) == (0.0, 100.0)
    assert len(waits) == 0
