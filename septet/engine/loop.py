"""The engine's loop, a sentence: hear, plan, launch, commit the step before.

Owns the steps in flight and what happens when one fails; called by the engine process (`process.serve`) and by
`InlineClient`, in one thread that nobody else enters. Knows no sockets (an inbox and an outbox), no model (an executor)
and no policy (a scheduler). Every submitted request is answered by exactly one final `Update`, whatever happens here.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from septet.engine.messages import Abort, Fatal, Shutdown, StatsReply, StatsRequest, Submit, Update
from septet.engine.wire import Disconnected
from septet.errors import EngineDead, SeptetError
from septet.request import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.engine.executor import Executor, PendingStep
    from septet.engine.messages import EngineStats
    from septet.engine.scheduler import Scheduler
    from septet.engine.wire import Message
    from septet.step import StepPlan

__all__ = ["EngineLoop", "Inbox", "Outbox"]

MAX_FAILURES = 16  # steps failing in a row before the engine gives up: the device is broken, not a request
REST_AFTER_S = 0.2  # idle time before housekeeping, so that it does not meet the next request of a conversation
REST_SHARE = 0.01  # of the time, at most, goes into housekeeping: an audit of a large pool takes a while
GC_STEPS = 4096  # steps without rest after which the youngest garbage is collected all the same

log = logging.getLogger(__name__)


class Inbox(Protocol):
    def receive(self, timeout: float | None) -> list[Message]:
        """What has arrived; waits up to `timeout` seconds for something (None: for ever). Raises Disconnected."""
        ...


class Outbox(Protocol):
    def send(self, messages: Sequence[Message]) -> None:
        """One frame of messages of one class. Raises Disconnected."""
        ...


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


class EngineLoop:
    """Turns until Shutdown, until the client leaves, or until the engine can't go on."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        *,
        strict: bool = False,  # tests: a failed audit raises
        owns_gc: bool = False,  # in a process of its own, garbage is collected when nobody waits
        max_failures: int = MAX_FAILURES,
        rest_after_s: float = REST_AFTER_S,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.inbox = inbox
        self.outbox = outbox
        self.strict = strict
        self.owns_gc = owns_gc
        self.max_failures = max_failures
        self.rest_after_s = rest_after_s
        self.in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self.running = True
        self.idle = True
        self.failures = 0  # failed steps in a row
        self.failed_steps = 0
        self.audit_failures = 0
        self.steps_since_rest = 0
        self.next_rest = 0.0  # monotonic time before which there is no housekeeping
        self.clock = HostClock()

    def run(self) -> int:
        """Serve; returns the exit code: 0 after Shutdown or when the client left, 1 after telling it `Fatal`."""
        if self.owns_gc:
            gc.freeze()  # the model and its modules are never garbage
            gc.disable()  # a collection in the middle of a step is a pause for every stream
        try:
            while self.running:
                self.turn()
            return 0
        except Disconnected as gone:
            log.info("%s", gone)
            return 0
        except Exception as error:
            self._die(error)
            return 1
        finally:
            self.executor.close()

    def turn(self) -> None:
        """One turn: hear what has arrived, plan, launch, commit the step before."""
        self._hear()
        with self.clock:
            plan = self.scheduler.plan()
        if plan is not None:
            self._launch(plan)
        if self.in_flight and (plan is None or len(self.in_flight) >= self.executor.depth):
            self._commit()
        self.idle = plan is None and not self.in_flight

    # -- hearing ------------------------------------------------------------------------------------------------------
    def _hear(self) -> None:
        """Take in what has arrived. With nothing to compute: wait a moment, do the housekeeping, then wait for ever."""
        rest_is_due = self.steps_since_rest > 0 and time.monotonic() >= self.next_rest
        patience = 0.0 if not self.idle else self.rest_after_s if rest_is_due else None
        messages = self.inbox.receive(patience)
        if self.idle and rest_is_due and not messages:
            self._rest()
        for message in messages:
            match message:
                case Submit(requests):
                    self._say([update for request in requests for update in self._submit(request)])
                case Abort(ids):
                    self._say([update for id in ids for update in self.scheduler.abort(id)])
                case StatsRequest(ticket):
                    self.outbox.send([StatsReply(ticket, self.stats())])
                case Shutdown():
                    self._shut_down()
                case _:
                    log.warning("ignored a message that is not for an engine: %s", type(message).__name__)

    def _submit(self, request: Request) -> list[Update]:
        """Queue a request; a refusal, or any failure to take it in, is its answer and nobody else's business."""
        try:
            self.scheduler.submit(request)
        except SeptetError as refusal:
            return [_failed(request.id, str(refusal), refusal.kind)]
        except Exception:
            log.exception("could not take in a request")
            return [_failed(request.id, "the engine could not take in this request", SeptetError.kind)]
        return []

    def _say(self, updates: list[Update]) -> None:
        """All updates of one step in one frame."""
        if updates:
            self.outbox.send(updates)

    def stats(self) -> EngineStats:
        """The scheduler's figures with the loop's own."""
        return replace(
            self.scheduler.stats,
            step_s=self.clock.step_s,
            host_s=self.clock.host_s,
            progress_at=self.clock.progress_at,
            failed_steps=self.failed_steps,
            audit_failures=self.audit_failures,
        )

    # -- steps --------------------------------------------------------------------------------------------------------
    def _launch(self, plan: StepPlan) -> None:
        self.clock.step_starts()
        try:
            self.in_flight.append((plan, self.executor.launch(plan)))
        except Exception as error:
            while self.in_flight:  # steps before this one are sound, and come first
                self._commit()
            self._fail(plan, error)

    def _commit(self) -> None:
        """Wait for the oldest step in flight and hand its result to the scheduler and the clients."""
        plan, pending = self.in_flight.popleft()
        self.steps_since_rest += 1
        try:
            result = pending.result()
        except Exception as error:
            self._fail(plan, error)
            return
        self.clock.step_ends(still_busy=bool(self.in_flight))
        self.failures = 0
        with self.clock:
            updates = self.scheduler.commit(result)
        self._say(updates)
        if self.owns_gc and self.steps_since_rest % GC_STEPS == 0:
            gc.collect(0)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """A step raised: its requests end with an error, everybody else goes on."""
        self.clock.step_ends(still_busy=bool(self.in_flight))
        self.failures += 1
        self.failed_steps += 1
        log.error("step %d of %d rows failed", plan.step, len(plan.rows), exc_info=error)
        self._say(self.scheduler.fail(plan, error))
        if self.failures >= self.max_failures:
            raise EngineDead(f"{self.failures} steps failed in a row, the last with {type(error).__name__}")

    # -- rest and end -------------------------------------------------------------------------------------------------
    def _rest(self) -> None:
        """Housekeeping while nobody waits: is every KV slot accounted for, and the garbage."""
        began = time.monotonic()
        self.steps_since_rest = 0
        try:
            self.scheduler.audit()
        except Exception:
            self.audit_failures += 1
            log.exception("the KV audit found a difference (%d so far)", self.audit_failures)
            if self.strict:
                raise
        if self.owns_gc:
            gc.collect()
        now = time.monotonic()
        self.next_rest = now + (now - began) / REST_SHARE

    def _shut_down(self) -> None:
        """Abort everything, answer every request, let the steps in flight come to their end."""
        self.running = False
        self._say(self.scheduler.abort_all())
        while self.in_flight:
            self._commit()

    def _die(self, error: Exception) -> None:
        log.error("the engine can't go on", exc_info=error)
        fatal = Fatal(str(error) if isinstance(error, SeptetError) else f"the engine failed: {type(error).__name__}")
        try:
            self.outbox.send([fatal])
        except SeptetError:
            log.info("nobody left to tell")


def _failed(request: str, error: str, kind: str) -> Update:
    return Update(request, finish_reason=FinishReason.ERROR, error=error, error_kind=kind)
