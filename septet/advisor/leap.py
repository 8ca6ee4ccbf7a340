"""The real scheduler with a shortcut for simulations: steps in which nothing but the clock moves are taken at once.

Used by `simulate.py`. While all running sequences decode and nobody can be admitted, one step is like the next: each
row has a token and a slot more. `leap` takes so many such steps, and leaves the scheduler and its cache as so many
turns of plan and commit would have (tests/unit/test_advisor_leap.py runs both).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from septet.engine.scheduler import Scheduler
from septet.request import FinishReason

__all__ = ["Ahead", "LeapingScheduler"]


class Ahead(NamedTuple):
    steps: int
    rows: int  # of each
    context: int  # that the first of them reads, summed over rows


class LeapingScheduler(Scheduler):
    """For requests of one priority that stop at no token, with nothing in flight when it is asked."""

    def ahead(self) -> Ahead | None:
        """The next steps, up to the first that ends somebody, if nothing comes in between. None: not so simple."""
        if not self._running or (self._waiting and self._free_rows and self._waiting[0] is not self._blocked):
            return None
        rows = len(self._running)
        most, context = self.cache.available // rows, rows
        for seq in self._running:
            planned, length = seq.planned, seq.length
            if planned + 1 != length or not seq.answered:
                return None
            context += planned
            if seq.limit - length < most:
                most = seq.limit - length
        return Ahead(most, rows, context) if most else None

    def leap(self, steps: int, token: int) -> list[str]:
        """Take so many of these steps, every row drawing `token` in each: who has ended."""
        drawn, last = array("i", [token]) * steps, self._step + steps - 1
        rows, ending = len(self._running), []
        self.cache.grow_each([seq.lease for seq in self._running if seq.lease is not None], steps)
        for seq in self._running:
            seq.tokens.extend(drawn)
            seq.length += steps
            seq.planned = seq.computed = seq.length - 1
            seq.last_step = last
            if seq.length >= seq.limit:
                ending.append(seq)
        self._tally.decodes(steps, rows)
        self._step += steps
        for seq in ending:
            self.estimate.finished(len(seq.tokens) - seq.n_prompt, seq.limit - seq.n_prompt)
            self._end(seq, FinishReason.LENGTH)
        return [seq.request.id for seq in ending]
