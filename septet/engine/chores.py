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
    """Is every KV slot accounted for (`audit`), and the garbage: once in each pause that follows some steps."""

    def __init__(self, audit: Callable[[], None], *, strict: bool, owns_gc: bool, pause_s: float) -> None:
        self.audit_failures = 0
        self._audit = audit
        self._strict = strict
        self._owns_gc = owns_gc
        self._pause_s = pause_s
        self._steps = 0  # since the last time
        self._not_before = 0.0  # monotonic

    def begin(self) -> None:
        """Before the first step, everything loaded."""
        if self._owns_gc:
            gc.freeze()  # the model and its modules are never garbage
            gc.disable()  # a collection in the middle of a step is a pause for every stream

    @property
    def due(self) -> bool:
        return self._steps > 0 and time.monotonic() >= self._not_before

    def patience(self) -> float | None:
        """Seconds an idle loop waits before it does the chores; None = there are none, wait for ever."""
        return self._pause_s if self.due else None

    def step_done(self) -> None:
        self._steps += 1
        if self._owns_gc and self._steps % GC_STEPS == 0:
            gc.collect(0)

    def do(self) -> None:
        """Nobody waits: do what is due. A failed audit is logged and counted; with `strict` it raises."""
        if not self.due:
            return
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
