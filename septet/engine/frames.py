"""Tokens on their way out: those of several short steps travel in one frame.

Owned and called by `engine/loop.py`. A frame wakes another process, which takes a CPU from threads that compute and
all wait for each other, while a screen shows sixty pictures a second. So where reader and engine share the CPUs, a
token that follows a frame within `gap_s` waits for a later step's; first tokens, ends and errors leave at once, with
all that waits. What waits is bounded by the steps that fit into `gap_s`, and one more.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.loop import Outbox
    from septet.engine.messages import Update
    from septet.step import StepPlan

__all__ = ["GAP_S", "Frames"]

GAP_S = 1 / 60


class Frames:
    """`say` with all updates of a step, `before` with each plan, `flush` when nothing follows for a while."""

    def __init__(self, outbox: Outbox, gap_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._outbox = outbox
        self._gap_s = gap_s
        self._clock = clock
        self._waiting: list[Update] = []
        self._begun: set[str] = set()  # requests whose first token has left
        self._sent_at = 0.0

    def say(self, updates: list[Update]) -> None:
        """In the order of the calls; updates of one request may then stand in one frame."""
        if not self._gap_s:
            self._outbox.send(updates)
            return
        urgent = False
        for update in updates:
            if update.finish_reason is not None:
                self._begun.discard(update.request)
                urgent = True
            elif update.request not in self._begun:
                self._begun.add(update.request)
                urgent = True
        self._waiting += updates
        if urgent or self._clock() - self._sent_at >= self._gap_s:
            self.flush()

    def before(self, plan: StepPlan) -> None:
        """A step that computes more than a token a row may take long: nothing waits for it."""
        if self._waiting and any(row.n > 1 for row in plan.rows):
            self.flush()

    def flush(self) -> None:
        """Everything leaves now."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._outbox.send(waiting)
            self._sent_at = self._clock()
