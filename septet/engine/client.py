"""What a session holds of an engine: generate, abort, stats, close. Two ways to have one.

`ProcessClient` starts the engine as a child process and talks frames with it; `InlineClient` turns the loop in a thread
of this process (tests, small scripts). Both live on one asyncio loop and are used from it alone. Knows no text, no HTTP
and no torch. Updates that a slow reader has not taken are merged into one: what waits is bounded by the output itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from septet.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Fatal,
    Shutdown,
    StatsReply,
    StatsRequest,
    Submit,
    Teach,
    Update,
)
from septet.engine.wire import AsyncEnd, Disconnected, FrameTooLarge, WireError, encode
from septet.errors import EngineDead, InvalidRequest, SeptetError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from septet.config import EngineConfig
    from septet.engine.executor import Executor
    from septet.engine.grammars import Grammars
    from septet.engine.pulse import Pulse
    from septet.engine.scheduler import Scheduler
    from septet.engine.spawn import EngineProcess
    from septet.engine.wire import Message
    from septet.grammar.vocabulary import Vocabulary
    from septet.request import Request

__all__ = ["EngineClient", "InlineClient", "ProcessClient"]

MERGE_AT = 64  # updates of one request that wait before they become one
START_DEADLINE_S = 1800.0  # loading a large checkpoint from a slow disk is not a failure
CLOSE_GRACE_S = 5.0
EXIT_WAIT_S = 0.5  # between the end of the stream and the exit code of its process

log = logging.getLogger(__name__)


class EngineClient(Protocol):
    """An engine as its callers see it. All methods belong to one asyncio loop."""

    info: EngineInfo

    @property
    def dead(self) -> bool:
        """Whether the engine is gone: every call raises EngineDead from now on."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """Submit and yield its updates; the last one has a `finish_reason` (ERROR with the engine's words included).

        Closing or cancelling the generator before that aborts the request. Raises EngineDead, at once for all that
        wait, if the engine ends; InvalidRequest for an id in use or a request too large to send.
        """
        ...

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests; their generators yield a last update with `finish_reason` ABORT. Others are ignored."""
        ...

    def teach(self, vocabulary: Vocabulary) -> None:
        """What the tokens stand for: needed once before the first request with `params.structured`."""
        ...

    async def stats(self) -> EngineStats:
        """The engine's figures as of now, answered between two steps."""
        ...

    async def scope(self) -> StatsReply:
        """The figures and a bounded look at what runs, made between two steps: for a page that somebody watches."""
        ...

    def pulse(self) -> Pulse | None:
        """Does it move? Read from shared memory: costs the engine nothing. None: it lives in this process."""
        ...

    def kill(self, reason: str) -> None:
        """End an engine that does not move: everybody who waits hears `reason` as EngineDead."""
        ...

    async def close(self) -> None:
        """Abort everything and end the engine. May be called twice."""
        ...


# -- updates that wait for their reader -------------------------------------------------------------------------------
class Mailbox:
    """Updates of one request: `put` by the client, taken by the one generator that waits for them."""

    def __init__(self) -> None:
        self._waiting: list[Update] = []
        self._ready = asyncio.Event()
        self.complete = False  # the last update is here
        self._death: str | None = None

    def put(self, update: Update) -> None:
        self._waiting.append(update)
        self.complete = update.finish_reason is not None
        if len(self._waiting) >= MERGE_AT:
            self._waiting = [merge(self._waiting)]
        self._ready.set()

    def fail(self, reason: str) -> None:
        self._death = reason
        self._ready.set()

    async def take(self) -> Update:
        """All that waits, as one update. What came before the engine's death is delivered first, then EngineDead."""
        await self._ready.wait()
        if not self._waiting:
            raise EngineDead(self._death or "the engine is gone")
        waiting, self._waiting = self._waiting, []
        if self._death is None:
            self._ready.clear()
        return merge(waiting)


def merge(updates: Sequence[Update]) -> Update:
    """Consecutive updates of one request as one."""
    if len(updates) == 1:
        return updates[0]
    last = updates[-1]
    return Update(
        last.request,
        tokens=tuple(token for update in updates for token in update.tokens),
        logprobs=tuple(entry for update in updates for entry in update.logprobs),
        prompt_logprobs=tuple(entry for update in updates for entry in update.prompt_logprobs),
        finish_reason=last.finish_reason,
        stop_token=last.stop_token,
        cached_tokens=max(update.cached_tokens for update in updates),
        pinned=next((update.pinned for update in updates if update.pinned), ()),
        waited_s=max(update.waited_s for update in updates),
        prefill_s=max(update.prefill_s for update in updates),
        pooled=last.pooled,
        error=last.error,
        error_kind=last.error_kind,
    )


class _Client:
    """What both kinds share: the open requests and who waits for what. A subclass gets messages there and back."""

    info: EngineInfo

    def __init__(self) -> None:
        self._open: dict[str, Mailbox] = {}
        self._left: set[str] = set()  # ids whose reader has gone before the last update: not free until that arrives
        self._tickets: dict[int, asyncio.Future[StatsReply]] = {}
        self._numbers = itertools.count()
        self._death: str | None = None
        self._lost = asyncio.Event()

    @property
    def dead(self) -> bool:
        return self._death is not None

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        """See `EngineClient.generate`."""
        self._check_alive()
        if request.id in self._open or request.id in self._left:
            raise InvalidRequest("a request with this id is running already", param="id")
        mailbox = self._open[request.id] = Mailbox()
        try:
            self._post(Submit((request,), time.monotonic()))
        except InvalidRequest:
            del self._open[request.id]
            raise
        finished = False
        try:
            await self._drain()
            while not finished:
                update = await mailbox.take()
                finished = update.finish_reason is not None
                yield update
        finally:
            del self._open[request.id]
            if not mailbox.complete and not self.dead:
                self._left.add(request.id)
                self.abort((request.id,))

    def abort(self, ids: Iterable[str]) -> None:
        if not self.dead:
            self._post(Abort(tuple(ids)))

    def teach(self, vocabulary: Vocabulary) -> None:
        self._check_alive()
        self._post(Teach(vocabulary))

    async def stats(self) -> EngineStats:
        return (await self._ask(scope=False)).stats

    async def scope(self) -> StatsReply:
        return await self._ask(scope=True)

    async def _ask(self, *, scope: bool) -> StatsReply:
        self._check_alive()
        ticket = next(self._numbers)
        future = self._tickets[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._post(StatsRequest(ticket, scope))
            return await future
        finally:
            del self._tickets[ticket]

    def pulse(self) -> Pulse | None:
        return None

    def kill(self, reason: str) -> None:
        """See `EngineClient.kill`; a thread can't be killed."""

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(self._death)

    def _post(self, message: Message) -> None:
        """Hand a message to the engine without waiting. InvalidRequest if it can't travel."""
        raise NotImplementedError

    async def _drain(self) -> None:
        """Wait while the way to the engine is full."""

    # -- from the engine ----------------------------------------------------------------------------------------------
    def _on_messages(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Update):
                mailbox = self._open.get(message.request)
                if mailbox is not None:
                    mailbox.put(message)
                elif message.finish_reason is not None:
                    self._left.discard(message.request)
            elif isinstance(message, StatsReply):
                future = self._tickets.get(message.ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            else:
                self._on_other(message)

    def _on_other(self, message: Message) -> None:
        log.warning("ignored a message that is not for a client: %s", type(message).__name__)

    def _bury(self, reason: str) -> None:
        """The engine is gone: everybody who waits hears it now."""
        self._death = reason
        for mailbox in self._open.values():
            mailbox.fail(reason)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(EngineDead(reason))
        self._lost.set()


# -- the engine in a process of its own -------------------------------------------------------------------------------
class ProcessClient(_Client):
    """An engine as a child process. Make it with `start`; end it with `close`."""

    def __init__(self, process: EngineProcess, on_death: Callable[[EngineDead], None] | None = None) -> None:
        super().__init__()
        self._process = process
        self._on_death = on_death
        self._end = AsyncEnd(self._on_messages, self._on_lost)
        self._ready = asyncio.get_running_loop().create_future()
        self._fatal: Fatal | None = None
        self._closing = False
        self._burial: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        process: EngineProcess | None = None,
        deadline_s: float = START_DEADLINE_S,
        on_death: Callable[[EngineDead], None] | None = None,
    ) -> ProcessClient:
        """Start an engine, or give its configuration to `process`, and wait until it is ready.

        Raises what the engine raised while it loaded (ModelFileError, OutOfMemory, ...), EngineDead if it ended without
        a word or was not ready after `deadline_s`. `on_death` is called once if it dies later, not after `close`.
        """
        from septet.engine.spawn import EngineProcess

        client = cls(process or EngineProcess.spawn(), on_death)
        try:
            await client._connect(config)
            async with asyncio.timeout(deadline_s):
                client.info = await client._ready
        except TimeoutError:
            await client._kill()
            raise EngineDead(f"the engine was not ready after {deadline_s:g} s") from None
        except BaseException:
            await client._kill()
            raise
        return client

    def pulse(self) -> Pulse | None:
        return None if self.dead else self._process.pulse.read()

    def kill(self, reason: str) -> None:
        if not self.dead and not self._closing:
            self._fatal = Fatal(reason, EngineDead.kind)
            self._process.popen.kill()  # the end of the stream follows, and with it the burial

    async def close(self) -> None:
        self._closing = True
        try:
            if not self.dead:
                self._post(Shutdown())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), CLOSE_GRACE_S)
            await asyncio.to_thread(self._process.stop, CLOSE_GRACE_S)
        finally:
            await self._kill()

    async def _connect(self, config: EngineConfig) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._end, sock=self._process.sock)
        self._post(config)

    async def _kill(self) -> None:
        """Whatever state it is in, nothing of it stays."""
        self._closing = True
        self._process.popen.kill()
        self._end.close()
        if self._burial is not None:
            await self._burial
        elif not self.dead:
            self._bury("the engine was closed")
        await asyncio.to_thread(self._process.popen.wait)
        self._process.sock.close()
        self._process.pulse.close()

    def _post(self, message: Message) -> None:
        try:
            self._end.send(encode([message]))
        except FrameTooLarge as error:
            raise InvalidRequest(f"the request is too large for the engine: {error}") from error
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    async def _drain(self) -> None:
        await self._end.drain()

    # -- from the engine ----------------------------------------------------------------------------------------------
    def _on_other(self, message: Message) -> None:
        if isinstance(message, EngineInfo) and not self._ready.done():
            self._ready.set_result(message)
        elif isinstance(message, Fatal):
            self._fatal = message
        else:
            super()._on_other(message)

    def _on_lost(self, error: SeptetError) -> None:
        """The end of the stream: nothing new is taken from here on; those who wait hear it with the reason."""
        if self._closing:
            self._bury("the engine was closed")
            return
        self._death = "the engine is gone"
        self._burial = asyncio.get_running_loop().create_task(self._find_reason(error))

    async def _find_reason(self, error: SeptetError) -> None:
        """Why it ended: its own last words, garbage on the wire, or what the system says of the process."""
        if self._fatal is not None:
            reason = self._fatal.error
        elif isinstance(error, WireError):
            reason = f"the engine sent garbage: {error}"
        else:
            how = await self._exit_reason()
            reason = f"the engine process is gone: {how or 'it closed its connection'}"
        self._process.popen.kill()  # an engine that nobody hears must not run on
        self._bury(reason)
        if not self._ready.done():
            self._ready.set_exception(_typed(self._fatal, reason))
        elif not self._closing:
            log.error("%s", reason)
            if self._on_death is not None:
                self._on_death(EngineDead(reason))

    async def _exit_reason(self) -> str | None:
        """The exit follows the end of the stream by an instant."""
        deadline = asyncio.get_running_loop().time() + EXIT_WAIT_S
        while (how := self._process.exit_reason()) is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)
        return how


def _typed(fatal: Fatal | None, reason: str) -> SeptetError:
    """The error class that the engine named by its kind."""
    kinds = {cls.kind: cls for cls in SeptetError.__subclasses__() if cls.__module__ == SeptetError.__module__}
    return (kinds.get(fatal.error_kind, EngineDead) if fatal is not None else EngineDead)(reason)


# -- the engine in a thread -------------------------------------------------------------------------------------------
class _QueueInbox:
    """An inbox within one process."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # messages, and notes of the engine to itself

    def receive(self, timeout: float | None) -> list[Message]:
        messages: list[Message] = []
        with contextlib.suppress(queue.Empty):
            messages.append(self.queue.get(timeout != 0, timeout))
            while True:
                messages.append(self.queue.get_nowait())
        return messages


class InlineClient(_Client):
    """An engine whose loop turns in a thread of this process: the same words, no sockets. Make it inside a loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineInfo,
        *,
        grammars: Grammars | None = None,
        strict: bool = False,
    ) -> None:
        from septet.engine.loop import EngineLoop

        super().__init__()
        self.info = info
        self._home = asyncio.get_running_loop()
        self._inbox = _QueueInbox()
        if grammars is not None:
            grammars.notify = self._inbox.queue.put
        self.loop = EngineLoop(scheduler, executor, self._inbox, self, grammars=grammars, strict=strict)
        self._fatal: Fatal | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls, config: EngineConfig, *, strict: bool = False) -> InlineClient:
        """Load the model in this process. Raises what `build_engine` raises."""
        from septet.engine.process import build_engine

        engine = await asyncio.to_thread(build_engine, config)
        return cls(engine.scheduler, engine.executor, engine.info, grammars=engine.grammars, strict=strict)

    async def close(self) -> None:
        if not self.dead:
            self._post(Shutdown())
        await self._lost.wait()
        await asyncio.to_thread(self._thread.join)

    def send(self, messages: Sequence[Message]) -> None:
        """The loop's outbox: called in the engine's thread."""
        try:
            self._home.call_soon_threadsafe(self._on_messages, tuple(messages))
        except RuntimeError as error:
            raise Disconnected("the client's event loop is closed") from error

    def _run(self) -> None:
        try:
            self.loop.run()
        finally:
            with contextlib.suppress(RuntimeError):  # the event loop may be closed already
                self._home.call_soon_threadsafe(self._on_end)

    def _on_end(self) -> None:
        self._bury(self._fatal.error if self._fatal is not None else "the engine was closed")

    def _on_other(self, message: Message) -> None:
        if isinstance(message, Fatal):
            self._fatal = message
        else:
            super()._on_other(message)

    def _post(self, message: Message) -> None:
        self._inbox.queue.put(message)
