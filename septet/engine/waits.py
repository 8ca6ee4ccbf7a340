"""How long each request waited for its first step, and that step's way to its first token: told with that token.

Owned and called by `engine/loop.py` alone, which knows the time; the scheduler does not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.messages import Update
    from septet.step import StepPlan

__all__ = ["Waits"]


class Waits:
    """`entered`, `launched` with each plan, `told` with all updates on their way out. Ended requests leave nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}  # waiting requests: when they were sent
        self._begun: dict[str, tuple[float, float]] = {}  # without a token yet: (waited, when their first step began)

    def __len__(self) -> int:
        return len(self._since) + len(self._begun)

    def entered(self, request: str, sent_at: float = 0.0) -> None:
        self._since[request] = sent_at or self._clock()

    def launched(self, plan: StepPlan) -> None:
        """One that joins again, after it was preempted, has waited already."""
        if plan.joins and self._since:
            now = self._clock()
            for join in plan.joins:
                since = self._since.pop(join.request, None)
                if since is not None:
                    self._begun[join.request] = (max(0.0, now - since), now)

    def told(self, updates: list[Update]) -> list[Update]:
        """The updates, with the times where a first token is among them."""
        if self._begun:
            updates = [self._timed(update) if update.request in self._begun else update for update in updates]
        if self._since:
            for update in updates:
                if update.finish_reason is not None:
                    self._since.pop(update.request, None)
        return updates

    def _timed(self, update: Update) -> Update:
        if not update.tokens and update.finish_reason is None:
            return update
        waited, began = self._begun.pop(update.request)
        return replace(update, waited_s=waited, prefill_s=max(0.0, self._clock() - began)) if update.tokens else update
