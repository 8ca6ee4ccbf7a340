"""Tokens of short steps travel together; nothing that somebody waits for does."""

from __future__ import annotations

from septet.config import EngineConfig
from septet.engine.frames import Frames
from septet.engine.messages import Update
from septet.engine.process import build_engine
from septet.request import FinishReason
from septet.step import PlanRow, StepPlan


class Desk:
    """An outbox and a clock."""

    def __init__(self, gap_s: float) -> None:
        self.now = 100.0
        self.sent: list[list[tuple[str, tuple[int, ...]]]] = []
        self.frames = Frames(self, gap_s, lambda: self.now)

    def send(self, messages) -> None:
        assert messages
        self.sent.append([(update.request, update.tokens) for update in messages])

    def step(self, at_ms: float, *updates: Update) -> int:
        """A step's updates at that time -> how many frames left."""
        before, self.now = len(self.sent), 100.0 + at_ms / 1000
        self.frames.say(list(updates))
        return len(self.sent) - before


def token(n: int, request: str = "r") -> Update:
    return Update(request, (n,))


def test_tokens_within_the_gap_leave_with_the_next_ones() -> None:
    desk = Desk(0.016)
    assert desk.step(0, token(1)) == 1  # the first of a request
    assert desk.step(6, token(2)) == desk.step(12, token(3)) == 0
    assert desk.step(18, token(4)) == 1
    assert desk.sent[-1] == [("r", (2,)), ("r", (3,)), ("r", (4,))]
    assert desk.step(24, token(5)) == 0
    assert desk.step(60, token(6)) == desk.step(100, token(7)) == 1  # slow steps wait for nothing


def test_ends_and_beginnings_take_all_that_waits_along() -> None:
    desk = Desk(0.016)
    desk.step(0, token(1))
    assert desk.step(1, token(2)) == 0
    assert desk.step(2, token(3), token(1, "s")) == 1
    assert desk.sent[-1] == [("r", (2,)), ("r", (3,)), ("s", (1,))]
    assert desk.step(3, token(4), token(2, "s")) == 0
    assert desk.step(4, Update("r", (5,), finish_reason=FinishReason.STOP), token(3, "s")) == 1
    assert desk.sent[-1] == [("r", (4,)), ("s", (2,)), ("r", (5,)), ("s", (3,))]
    assert desk.step(5, token(1)) == 1  # another request of that name begins anew
    assert desk.step(6, token(2)) == 0
    assert desk.step(7, Update("r", finish_reason=FinishReason.ABORT)) == 1


def test_nothing_waits_for_a_step_that_may_be_long() -> None:
    desk = Desk(0.016)
    desk.step(0, token(1))
    desk.step(5, token(2))
    decode, chunk = PlanRow("r", 0, 9, 1, (9,), 1), PlanRow("s", 1, 0, 2, (1, 2))
    desk.frames.before(StepPlan(1, rows=(decode,)))
    assert len(desk.sent) == 1
    desk.frames.before(StepPlan(2, rows=(decode, chunk)))
    assert desk.sent[1:] == [[("r", (2,))]]
    desk.frames.before(StepPlan(3, rows=(chunk,)))
    desk.frames.flush()
    assert len(desk.sent) == 2


def test_without_a_gap_each_step_is_a_frame() -> None:
    desk = Desk(0.0)
    assert [desk.step(0, token(n)) for n in range(5)] == [1] * 5


def test_the_gap_is_told_and_can_be_chosen() -> None:
    for asked, gap_s in ((-1, 0.0), (0, 0.0), (40, 0.04)):
        engine = build_engine(EngineConfig(model="echo:", stream_gap_ms=asked))
        assert engine.gap_s == gap_s
        assert engine.info.choices[-1][:2] == ("stream_gap_ms", str(round(gap_s * 1000)))
