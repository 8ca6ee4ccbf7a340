"""Many models within one memory budget: loaded on first use, unloaded when idle, the least recently used one first.

Made by `septet serve`; every dialect uses it as `Models`. Names that share their weights share one engine. What a model
needs and how it is loaded is its `Loader`'s business. Lives on one asyncio loop; knows no HTTP and no files.

Invariants: the bytes of all slots and of those that are leaving never exceed the budget; a slot that is in use or
waited for is never unloaded; whoever waits gets the session or the error of the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from septet.errors import EngineDead, OutOfMemory
from septet.serve.models import ModelCard, Running

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from septet.hub.store import LocalModel
    from septet.session.session import Session

__all__ = ["DEFAULT_KEEP_ALIVE_S", "Loader", "ModelPool", "Need", "Shelf"]

DEFAULT_KEEP_ALIVE_S = 300.0

log = logging.getLogger(__name__)


class Shelf(Protocol):
    """Which models there are."""

    def cards(self) -> Sequence[ModelCard]: ...

    def find(self, name: str | None) -> LocalModel:
        """Raises ModelNotFound."""
        ...


@dataclass(frozen=True, slots=True)
class Need:
    n_bytes: int  # by arithmetic, before anything is loaded
    options: dict[str, Any] = field(default_factory=dict)  # of the engine, so that it keeps to that


class Loader(Protocol):
    async def need(self, model: LocalModel, budget: int) -> Need:
        """From the header of the model's file. Raises ModelFileError, UnsupportedModel, InvalidRequest."""
        ...

    async def load(self, model: LocalModel, need: Need) -> tuple[Session, int]:
        """The session, and the bytes that its engine has really taken. Nothing stays behind if it is cancelled."""
        ...

    def view(self, session: Session, model: LocalModel) -> Session:
        """The session under this model's name, with what its recipe adds."""
        ...


@dataclass(slots=True)
class View:
    """One name of a loaded model."""

    session: Session
    keep_s: float
    users: int = 0
    expires_at: float = math.inf  # of the loop's clock, while nobody uses it


@dataclass(slots=True, eq=False)
class Slot:
    """One engine, from the first request for it until it is closed."""

    key: str
    name: str  # that it was first asked for by
    ready: asyncio.Future[None]
    session: Session | None = None
    n_bytes: int = 0
    users: int = 0
    waiting: int = 0
    used_at: float = 0.0
    views: dict[str, View] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None  # loads it

    @property
    def idle(self) -> bool:
        return self.session is not None and not self.users and not self.waiting


class ModelPool:
    """See `Models`. `close` it on the loop that used it."""

    def __init__(
        self,
        shelf: Shelf,
        loader: Loader,
        *,
        budget: int,
        keep_alive_s: float = DEFAULT_KEEP_ALIVE_S,
        manages: bool = False,
    ) -> None:
        self.shelf = shelf
        self.loader = loader
        self.budget = budget
        self.keep_alive_s = keep_alive_s
        self.manages = manages
        self.restarts = 0  # an engine that has ended is loaded again like one that was unloaded
        self._slots: dict[str, Slot] = {}
        self._leaving: dict[Slot, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # -- Models -------------------------------------------------------------------------------------------------------
    def cards(self) -> Sequence[ModelCard]:
        lengths = {run.name: run.session.limits.max_model_len for run in self.running()}
        return [
            ModelCard(name=c.name, root=c.root, created=c.created, max_model_len=lengths.get(c.name))
            for c in self.shelf.cards()
        ]

    def find(self, name: str | None) -> LocalModel:
        return self.shelf.find(name)

    @asynccontextmanager
    async def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AsyncGenerator[Session, None]:
        model = self.shelf.find(name)
        slot = await self._acquire(model)
        view: View | None = None
        try:
            view = self._view(slot, model)
            view.users += 1
            if keep_alive_s is not None:
                view.keep_s = keep_alive_s
            yield view.session
        finally:
            self._release(slot, view)

    async def unload(self, name: str) -> None:
        model = self.shelf.find(name)
        slot = self._slots.get(_key(model))
        view = slot.views.get(model.name) if slot else None
        if slot is None or view is None:
            return
        view.keep_s = 0.0
        if not view.users:
            view.expires_at = 0.0
            self._expire()
            if slot in self._leaving:
                await asyncio.wait([self._leaving[slot]])

    def running(self) -> Sequence[Running]:
        now = asyncio.get_running_loop().time()
        return [
            Running(
                name=name,
                session=view.session,
                n_bytes=slot.n_bytes,
                users=view.users,
                left_s=None if view.expires_at == math.inf else max(0.0, view.expires_at - now),
            )
            for slot in self._alive()
            for name, view in slot.views.items()
        ]

    def loaded(self) -> Sequence[Session]:
        return [slot.session for slot in self._alive() if slot.session is not None]

    @property
    def restarting(self) -> bool:
        return False

    @property
    def dead(self) -> bool:
        return False  # a model whose engine has died is loaded again on its next use

    @property
    def used_bytes(self) -> int:
        return sum(slot.n_bytes for slot in (*self._slots.values(), *self._leaving))

    async def close(self) -> None:
        """Every engine ends, loading or loaded. May be called twice."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        loading = [slot.task for slot in self._slots.values() if slot.task and not slot.task.done()]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        for slot in list(self._slots.values()):
            self._retire(slot)
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)

    # -- in use -------------------------------------------------------------------------------------------------------
    async def _acquire(self, model: LocalModel) -> Slot:
        """The slot, ready, with this caller counted as its user."""
        slot = self._slots.get(_key(model))
        if slot is not None and slot.session is not None and slot.session.client.dead:
            self._retire(slot)
            slot = None
        if self._closed:
            raise EngineDead("the server is shutting down")
        slot = slot or self._begin(model)
        slot.waiting += 1
        try:
            await asyncio.shield(slot.ready)  # who leaves does not end the load for the others
        except BaseException:
            slot.waiting -= 1
            self._expire()
            raise
        slot.waiting -= 1
        slot.users += 1
        return slot

    def _view(self, slot: Slot, model: LocalModel) -> View:
        assert slot.session is not None
        view = slot.views.get(model.name)
        if view is None:
            session = self.loader.view(slot.session, model)
            view = slot.views[model.name] = View(session, self.keep_alive_s)
        view.expires_at = math.inf
        return view

    def _release(self, slot: Slot, view: View | None) -> None:
        now = asyncio.get_running_loop().time()
        slot.users -= 1
        slot.used_at = now
        if view is not None:
            view.users -= 1
            if not view.users:
                view.expires_at = math.inf if view.keep_s < 0 else now + view.keep_s
        self._expire()

    def _expire(self) -> None:
        """Unload what nobody has used for as long as it was to be kept; look again when the next one's time is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        for slot in list(self._slots.values()):
            for name, view in list(slot.views.items()):
                if not view.users and view.expires_at <= loop.time():
                    del slot.views[name]
            if slot.idle and not slot.views:
                self._retire(slot)
        times = [v.expires_at for slot in self._slots.values() for v in slot.views.values() if not v.users]
        if (first := min(times, default=math.inf)) < math.inf and not self._closed:
            self._timer = loop.call_at(first + 0.001, self._expire)

    def _alive(self) -> list[Slot]:
        """Loaded slots; those whose engine has died leave now."""
        for slot in list(self._slots.values()):
            if slot.session is not None and slot.session.client.dead:
                self._retire(slot)
        return [slot for slot in self._slots.values() if slot.session is not None]

    # -- loading ------------------------------------------------------------------------------------------------------
    def _begin(self, model: LocalModel) -> Slot:
        loop = asyncio.get_running_loop()
        slot = self._slots[_key(model)] = Slot(_key(model), model.name, loop.create_future())
        slot.task = loop.create_task(self._load(slot, model))
        return slot

    async def _load(self, slot: Slot, model: LocalModel) -> None:
        try:
            session = await self._loaded(slot, model)
        except BaseException as error:
            del self._slots[slot.key]
            slot.n_bytes = 0
            stopped = isinstance(error, asyncio.CancelledError)
            slot.ready.set_exception(EngineDead("the server was stopped while it loaded") if stopped else error)
            slot.ready.exception()  # nobody may be waiting any more
            if not isinstance(error, Exception):
                raise
            return
        slot.session = session
        slot.used_at = asyncio.get_running_loop().time()
        slot.ready.set_result(None)
        with contextlib.suppress(Exception):  # if all who waited have left, it stays for as long as after a use
            self._view(slot, model).expires_at = math.inf if self.keep_alive_s < 0 else slot.used_at + self.keep_alive_s
        self._expire()

    async def _loaded(self, slot: Slot, model: LocalModel) -> Session:
        need = await self.loader.need(model, self.budget)
        await self._reserve(slot, need.n_bytes)
        session, n_bytes = await self.loader.load(model, need)
        try:
            await self._reserve(slot, n_bytes)
        except BaseException:
            await asyncio.shield(session.close())
            raise
        return session

    # -- room ---------------------------------------------------------------------------------------------------------
    async def _reserve(self, slot: Slot, n_bytes: int) -> None:
        """Wait until the slot may have `n_bytes`; idle models leave for it, but none if that would not be enough."""
        if n_bytes > self.budget:
            raise OutOfMemory(
                f"{slot.name} needs {_size(n_bytes)}, more than the whole budget of {_size(self.budget)}: raise "
                "--memory-budget, or lower --max-model-len or --kv-cache-memory"
            )
        others = [s for s in self._alive_or_loading() if s is not slot]
        while sum(s.n_bytes for s in (*others, *self._leaving)) + n_bytes > self.budget:
            idle = [s for s in others if s.idle]
            if sum(s.n_bytes for s in others if not s.idle) + n_bytes > self.budget:
                needs = f"{slot.name} needs {_size(n_bytes)} of the budget of {_size(self.budget)}"
                raise OutOfMemory(f"{needs}, but {self._in_the_way(slot)}. Try again then, or raise --memory-budget")
            if not self._leaving:
                self._retire(min(idle, key=lambda s: s.used_at))
            await asyncio.wait(list(self._leaving.values()), return_when=asyncio.FIRST_COMPLETED)
            others = [s for s in self._alive_or_loading() if s is not slot]
        slot.n_bytes = n_bytes  # no await since the sum

    def _alive_or_loading(self) -> list[Slot]:
        self._alive()
        return list(self._slots.values())

    def _in_the_way(self, of: Slot) -> str:
        words = []
        for slot in self._slots.values():
            if slot is of or slot.idle or not slot.n_bytes:
                continue
            what = f"in use by {slot.users} of its requests" if slot.users else "being loaded"
            keep = max((view.keep_s for view in slot.views.values()), default=self.keep_alive_s)
            until = "it may leave once they end" if slot.users else "it may leave once it is idle"
            if slot.users and keep > 0:
                until += f" (kept {keep:g} s if nothing needs its place)"
            words.append(f"{slot.name} holds {_size(slot.n_bytes)} ({what}: {until})")
        return "; ".join(words)

    def _retire(self, slot: Slot) -> None:
        """Out of the pool now; its bytes count until it is closed."""
        del self._slots[slot.key]
        self._leaving[slot] = asyncio.get_running_loop().create_task(self._end(slot))

    async def _end(self, slot: Slot) -> None:
        try:
            assert slot.session is not None
            await slot.session.close()
        except Exception:
            log.exception("closing the engine of %s failed", slot.name)
        finally:
            del self._leaving[slot]


def _key(model: LocalModel) -> str:
    """Models of the same files share an engine."""
    return model.digest or str(model.path)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
