"""The real scheduler with a shortcut for simulations: steps in which nothing but the clock moves are taken at once.

Used by `simulate.py`. While all running sequences decode and nobody can be admitted, one step is like the next: each
row has a token and a slot more. `land` commits so many such steps together, and leaves the scheduler and its cache as
so many turns of plan and commit would have (tests/unit/test_advisor_leap.py runs both).
"""

from __future__ import annotations

from array import array

from septet.engine.scheduler import Scheduler
from septet.request import FinishReason

__all__ = ["LeapingScheduler"]


class LeapingScheduler(Scheduler):
    """For requests of one priority that stop at no token, with one step in flight."""

    def ahead(self) -> int:
        """After `plan`: how many more steps would be like the planned one if nothing came in between. -1: it is itself
        not of this kind, and has to be committed."""
        (draft,) = self._in_flight
        n = len(draft.rows)
        if self._tally.last_step_prefill_tokens or draft.joins or n != len(self._running):
            return -1
        for seq in draft.sequences:
            if not seq.answered:
                return -1
        if self._waiting and self._free_rows and self._waiting[0] is not self._blocked:
            return 0
        left = min([seq.limit - seq.length for seq in draft.sequences])
        return min(left, self.cache.available // n)

    def land(self, more: int, token: int) -> list[str]:
        """Commit the plan in flight and `more` like it, each row having drawn `token` each time: who has ended."""
        draft = self._in_flight.popleft()
        drawn, grow = array("i", [token]) * (more + 1), self.cache.grow
        ending = []
        for seq in draft.sequences:
            if more:
                assert seq.lease is not None
                grow(seq.lease, more)
                seq.planned += more
                seq.length += more
                seq.last_step += more
            seq.in_flight -= 1
            seq.tokens.extend(drawn)
            seq.computed = seq.planned
            if seq.length >= seq.limit:
                ending.append(seq)
        for seq in ending:
            self.estimate.finished(len(seq.tokens) - seq.n_prompt, seq.limit - seq.n_prompt)
            self._end(seq, FinishReason.LENGTH)
        self._step += more
        self._tally.steps += more
        self._tally.computed_tokens += more * len(draft.rows)
        self._tally.generated_tokens += (more + 1) * len(draft.rows)
        return [seq.request.id for seq in ending]
