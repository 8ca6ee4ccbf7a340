"""What the loop does beside its steps: the clock behind the figures, the audit and the garbage collector.

Owned and called by `engine/loop.py` alone. Chores wait until nobody does: no collection and no audit falls into a step.
"""

from __future__ import annotations

import gc
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Chores", "HostClock"]

CHORES_SHARE = 0.01  # of the time, at most: an audit of a large pool takes a while
GC_STEPS = 4096  # steps without a pause after which the youngest garbage is collected all the same

log = logging.getLogger(__name__)


class HostClock:
    """Where the time goes, for `EngineStats`. As a context manager it adds to the host's share (`with clock: ...`)."""

    def __init__(self) -> None:
        self.step_s = 0.0  # wall time with at least one step in flight
        self.host_s = 0.0  # planning and committing
        self.progress_at = time.monotonic()  # end of the last step
        self._busy_since: float | None = None
        self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.host_s += time.monotonic() - self._entered

    def step_starts(self) -> None:
        if self._busy_since is None:
            self._busy_since = time.monotonic()

    def step_ends(self, *, still_busy: bool) -> None:
        now = self.progress_at = time.monotonic()
        if self._busy_since is not None:
            self.step_s += now - self._busy_since
        self._busy_since = now if still_busy else None


class Chores:
    """Is every KV slot accounted for (`audit`), and the garbage: once in each pause that follows some steps.

    And what the executor has put off (`spare`, see `Executor`): piece by piece, in pauses and now and then under way.
    """

    def __init__(
        self,
        audit: Callable[[], None],
        spare: Callable[[bool], bool],
        *,
        strict: bool,
        owns_gc: bool,
        pause_s: float,
    ) -> None:
        self.audit_failures = 0
        self._audit = audit
        self._spare = spare
        self._more = False  # `spare` has something for a pause
        self._resting = False  # this pause has lasted pause_s
        self._strict = strict
        self._owns_gc = owns_gc
        self._pause_s = pause_s
        self._steps = 0  # since the last time
        self._not_before = 0.0  # monotonic

    def begin(self) -> None:
        """Before the first step, everything loaded."""
        self._more = self._spare(True)
        if self._owns_gc:
            gc.freeze()  # the model and its modules are never garbage
            gc.disable()  # a collection in the middle of a step is a pause for every stream

    @property
    def due(self) -> bool:
        return self._steps > 0 and time.monotonic() >= self._not_before

    def patience(self) -> float | None:
        """Seconds an idle loop waits before it does the chores; None = there are none, wait for ever."""
        if not (self.due or self._more):
            return None
        return 0.0 if self._resting and self._more else self._pause_s

    def step_done(self) -> None:
        self._steps += 1
        self._resting = False
        if self._owns_gc and self._steps % GC_STEPS == 0:
            gc.collect(0)

    def between_steps(self) -> None:
        self._more = self._spare(True)

    def do(self) -> None:
        """Nobody waits: do what is due. A failed audit is logged and counted; with `strict` it raises."""
        self._resting = True
        self._more = self._more and self._spare(False)
        if self.due:
            self._look_after()

    def _look_after(self) -> None:
        began = time.monotonic()
        self._steps = 0
        try:
            self._audit()
        except Exception:
            self.audit_failures += 1
            log.exception("the KV audit found a difference (%d so far)", self.audit_failures)
            if self._strict:
                raise
        if self._owns_gc:
            gc.collect()
        now = time.monotonic()
        self._not_before = now + (now - began) / CHORES_SHARE
