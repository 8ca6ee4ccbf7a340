"""The engine's loop, a sentence: hear, plan, launch, commit the step before.

Owns the steps in flight and what happens when one fails; called by the engine process (`process.serve`) and by
`InlineClient`, in one thread that nobody else enters. Knows no sockets (an inbox and an outbox), no model (an executor)
and no policy (a scheduler). Every submitted request is answered by exactly one final `Update`, whatever happens here.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from septet.engine.chores import Chores, HostClock
from septet.engine.frames import Frames
from septet.engine.grammars import GrammarReady
from septet.engine.messages import Abort, Fatal, Shutdown, StatsReply, StatsRequest, Submit, Teach, Update
from septet.engine.scope import look
from septet.engine.waits import Waits
from septet.engine.wire import Disconnected
from septet.errors import EngineDead, InvalidRequest, SeptetError
from septet.request import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.engine.executor import Executor, PendingStep
    from septet.engine.grammars import Grammars
    from septet.engine.messages import EngineStats
    from septet.engine.scheduler import Scheduler
    from septet.engine.wire import Message
    from septet.step import StepPlan

__all__ = ["EngineLoop", "Inbox", "Outbox"]

MAX_FAILURES = 16  # steps failing in a row before the engine gives up: the device is broken, not a request
PAUSE_S = 0.2  # idle time before the chores, so that they don't meet the next request of a conversation

log = logging.getLogger(__name__)


class Inbox(Protocol):
    def receive(self, timeout: float | None) -> list[Message]:
        """What has arrived; waits up to `timeout` seconds for something (None: for ever). Raises Disconnected."""
        ...


class Outbox(Protocol):
    def send(self, messages: Sequence[Message]) -> None:
        """One frame of messages of one class. Raises Disconnected."""
        ...


class EngineLoop:
    """Turns until Shutdown, until the client leaves, or until the engine can't go on."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        *,
        grammars: Grammars | None = None,  # None: the executor knows no grammars, and requests with one are refused
        strict: bool = False,  # tests: a failed audit raises
        owns_gc: bool = False,  # in a process of its own, garbage is collected when nobody waits
        max_failures: int = MAX_FAILURES,
        pause_s: float = PAUSE_S,
        gap_s: float = 0.0,  # see `frames.py`
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.inbox = inbox
        self.outbox = outbox
        self.grammars = grammars
        self.max_failures = max_failures
        self.in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self.running = True
        self.idle = True
        self.failures = 0  # failed steps in a row
        self.failed_steps = 0
        self.clock = HostClock()
        self.waits = Waits()
        self.frames = Frames(outbox, gap_s)
        self.chores = Chores(scheduler.audit, executor.spare, strict=strict, owns_gc=owns_gc, pause_s=pause_s)

    def run(self) -> int:
        """Serve; returns the exit code: 0 after Shutdown or when the client left, 1 after telling it `Fatal`."""
        self.chores.begin()
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
            if self.grammars is not None:
                self.grammars.close()

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
        if self.idle:
            self.frames.flush()
        else:
            self.chores.between_steps()

    # -- hearing ------------------------------------------------------------------------------------------------------
    def _hear(self) -> None:
        """Take in what has arrived. With nothing to compute: wait a moment, do the chores, then wait for ever."""
        messages = self.inbox.receive(self.chores.patience() if self.idle else 0.0)
        if self.idle and not messages:
            self.chores.do()
        for message in messages:
            match message:
                case Submit(requests, sent_at):
                    self._say([update for request in requests for update in self._submit(request, sent_at)])
                case Abort(ids):
                    self._say([update for id in ids for update in self._abort(id)])
                case GrammarReady(id):
                    self._say(self._grammar_ready(id))
                case Teach(vocabulary) if self.grammars is not None:
                    self.grammars.teach(vocabulary)
                case StatsRequest(ticket, scope):
                    self.outbox.send([StatsReply(ticket, self.stats(), look(self.scheduler) if scope else None)])
                case Shutdown():
                    self._shut_down()
                    return
                case _:
                    log.warning("ignored a message that is not for an engine: %s", type(message).__name__)

    def _submit(self, request: Request, sent_at: float) -> list[Update]:
        """Queue a request; a refusal, or any failure to take it in, is its answer and nobody else's business."""
        try:
            if request.params.structured is None:
                self.scheduler.submit(request)
            elif self.grammars is None:
                raise InvalidRequest("this engine has no grammars: structured output is not supported")
            else:
                self.scheduler.check(request)
                self.grammars.wait(request)
        except Exception as error:
            return [_refused(request.id, error)]
        self.waits.entered(request.id, sent_at)
        return []

    def _grammar_ready(self, id: str) -> list[Update]:
        """A constrained request may start, or its grammar is refused; nothing if it has gone meanwhile."""
        assert self.grammars is not None
        try:
            request = self.grammars.ready(id)
            if request is not None:
                self.scheduler.submit(request)
        except Exception as error:
            return [_refused(id, error)]
        return []

    def _abort(self, id: str) -> list[Update]:
        if self.grammars is not None and self.grammars.leave(id):
            return [Update(id, finish_reason=FinishReason.ABORT)]
        return self.scheduler.abort(id)

    def _say(self, updates: list[Update]) -> None:
        """All updates of one step in one frame."""
        if updates:
            updates = self.waits.told(updates)
            if self.grammars is not None and self.grammars.held:
                self._release(updates)
            self.frames.say(updates)

    def _release(self, updates: list[Update]) -> None:
        assert self.grammars is not None
        for update in updates:
            if update.finish_reason is not None:
                self.grammars.release(update.request)

    def stats(self) -> EngineStats:
        """The scheduler's figures with the loop's own."""
        stats = self.scheduler.stats
        return replace(
            stats,
            waiting=stats.waiting + (len(self.grammars) if self.grammars is not None else 0),
            step_s=self.clock.step_s,
            host_s=self.clock.host_s,
            progress_at=self.clock.progress_at,
            failed_steps=self.failed_steps,
            audit_failures=self.chores.audit_failures,
        )

    # -- steps --------------------------------------------------------------------------------------------------------
    def _launch(self, plan: StepPlan) -> None:
        self.clock.step_starts()
        self.waits.launched(plan)
        self.frames.before(plan)
        try:
            self.in_flight.append((plan, self.executor.launch(plan)))
        except Exception as error:
            while self.in_flight:  # steps before this one are sound, and come first
                self._commit()
            self._fail(plan, error)

    def _commit(self) -> None:
        """Wait for the oldest step in flight and hand its result to the scheduler and the clients."""
        plan, pending = self.in_flight.popleft()
        self.chores.step_done()
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

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """A step raised: its requests end with an error, everybody else goes on."""
        self.clock.step_ends(still_busy=bool(self.in_flight))
        self.failures += 1
        self.failed_steps += 1
        log.error("step %d of %d rows failed", plan.step, len(plan.rows), exc_info=error)
        self._say(self.scheduler.fail(plan, error))
        if self.failures >= self.max_failures:
            raise EngineDead(f"{self.failures} steps failed in a row, the last with {type(error).__name__}")

    # -- the end ------------------------------------------------------------------------------------------------------
    def _shut_down(self) -> None:
        """Abort everything, answer every request, let the steps in flight come to their end."""
        self.running = False
        ids = self.grammars.leave_all() if self.grammars is not None else []
        self._say([*(Update(id, finish_reason=FinishReason.ABORT) for id in ids), *self.scheduler.abort_all()])
        while self.in_flight:
            self._commit()

    def _die(self, error: Exception) -> None:
        log.error("the engine can't go on", exc_info=error)
        fatal = Fatal(str(error) if isinstance(error, SeptetError) else f"the engine failed: {type(error).__name__}")
        try:
            self.frames.flush()
            self.outbox.send([fatal])
        except SeptetError:
            log.info("nobody left to tell")


def _refused(request: str, error: Exception) -> Update:
    """A request that could not be taken in: our own errors in their words, others with a traceback in the log."""
    if isinstance(error, SeptetError):
        return _failed(request, str(error), error.kind, error.param)
    log.error("could not take in a request", exc_info=error)
    return _failed(request, "the engine could not take in this request", SeptetError.kind)


def _failed(request: str, error: str, kind: str, param: str | None = None) -> Update:
    return Update(request, finish_reason=FinishReason.ERROR, error=error, error_kind=kind, error_param=param)
