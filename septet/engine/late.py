"""Requests that wait for a library: an inbox before the loop's, which holds them back while a thread imports it.

Made by `process.py` over an executor that can do without torch (`native.py`), so that the first request that asks for
more stalls nobody else: it waits seconds, and whoever asks for tokens alone is not held. The loop hears each message
once and in its order, but for those of requests that wait. Knows no model.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.engine.grammars import GrammarReady
from septet.engine.messages import Abort, Shutdown, Submit

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.loop import Inbox
    from septet.engine.wire import Message
    from septet.request import Request

__all__ = ["LateInbox"]

MAX_HELD = 4096  # messages; those beyond go on, and their step waits for the library

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Put into the inbox by the thread that imports. Never on the wire."""


class LateInbox:
    """`loop.Inbox` over another one. `post` puts a message into that one from another thread."""

    def __init__(
        self, inbox: Inbox, post: Callable[[Any], None], asks: Callable[[Request], bool], load: Callable[[], None]
    ) -> None:
        """asks: does a request need what `load` imports?"""
        self._inbox = inbox
        self._post = post
        self._asks = asks
        self._load = load
        self._held: list[Any] = []
        self._loading = self._there = False

    def receive(self, timeout: float | None) -> list[Message]:
        messages = self._inbox.receive(timeout)
        return messages if self._there else [passed for message in messages for passed in self._passed(message)]

    def _passed(self, message: Any) -> list[Any]:
        """What the loop is to hear now."""
        match message:
            case Loaded():
                self._there = True
                return self._all()
            case Submit():
                return self._submitted(message)
            case GrammarReady() if self._loading and len(self._held) < MAX_HELD:
                self._held.append(message)
                return []
            case Abort(ids):
                return [*self._those(set(ids)), message]
            case Shutdown():
                return [*self._all(), message]
        return [message]

    def _submitted(self, message: Submit) -> list[Any]:
        """One with a grammar goes on, to wait for that first: it is held back when the grammar is ready."""
        asking = [request for request in message.requests if self._asks(request)]
        if not asking:
            return [message]
        self._begin()
        held = {request.id for request in asking if request.params.structured is None}
        if not held or len(self._held) >= MAX_HELD:
            return [message]
        self._held += [Submit((request,), message.sent_at) for request in asking if request.id in held]
        others = tuple(request for request in message.requests if request.id not in held)
        return [Submit(others, message.sent_at)] if others else []

    def _begin(self) -> None:
        if not self._loading:
            self._loading = True
            log.info("a request asks for more than tokens: importing torch")
            threading.Thread(target=self._run, name="imports", daemon=True).start()

    def _run(self) -> None:
        """What fails here fails again, and is told, where it is needed."""
        try:
            self._load()
        except Exception as error:
            log.warning("torch can't be imported: %s: %s", type(error).__name__, error)
        self._post(Loaded())

    def _all(self) -> list[Any]:
        held, self._held = self._held, []
        return held

    def _those(self, ids: set[str]) -> list[Any]:
        """Held requests of these ids: submitted, so that their end is told as any other's."""
        found = [one for one in self._held if isinstance(one, Submit) and one.requests[0].id in ids]
        self._held = [one for one in self._held if one not in found]
        return found
