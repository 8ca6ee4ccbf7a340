"""The scope: what an engine does right now, as a stream of bounded frames for everybody who watches.

One poll of an engine a quarter of a second, shared by all its watchers and made only while there is one. A frame is the
engine's figures, its rows, the pool's map, the radix tree's top, and the latencies seen since the last frame. Text of
prefixes is told only where there is one user: on loopback, without API keys. Listed in `app.DIALECTS` as GET /scope.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from septet.errors import EngineDead, Overloaded
from septet.serve.dialect import Dialect
from septet.serve.errors import error_body
from septet.serve.guard import is_loopback
from septet.serve.models import not_found
from septet.serve.sse import until_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import Receive, Scope

    from septet.engine.messages import StatsReply
    from septet.serve.service import Service
    from septet.serve.sse import Reply
    from septet.session.session import Session

__all__ = ["SCOPE", "Scopes"]

PERIOD_S = 0.25
MAX_WATCHERS = 16
MAX_LATENCIES = 64  # told with one frame
PREVIEW_CHARS = 48


class Feed:
    """Frames of one engine, made while somebody watches; a slow watcher misses frames, it never queues them."""

    def __init__(self, service: Service, label: str) -> None:
        self.service = service
        self.label = label
        self.watchers = 0
        self.frame: dict[str, Any] | None = None
        self.number = 0
        self._news = asyncio.Condition()
        self._seen_at = time.monotonic()
        self._task = asyncio.create_task(self._poll())

    async def after(self, number: int) -> tuple[int, dict[str, Any]]:
        async with self._news:
            await self._news.wait_for(lambda: self.number > number)
            assert self.frame is not None
            return self.number, self.frame

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _poll(self) -> None:
        while True:
            session = self.service.scopes.session(self.label)
            try:
                frame = await self._frame(session) if session is not None else {"model": self.label, "gone": True}
            except Exception as error:  # the next one may be sound: nobody waits for ever
                failure = str(error_body(error)["error"]["message"])
                frame = {"model": self.label, "time": time.time(), "error": failure}
            async with self._news:
                self.frame, self.number = frame, self.number + 1
                self._news.notify_all()
            await asyncio.sleep(PERIOD_S)

    async def _frame(self, session: Session) -> dict[str, Any]:
        """An engine in a long step answers after it; until then the frame tells how long it has been at it."""
        frame: dict[str, Any] = {"model": self.label, "models": self.service.scopes.labels(), "time": time.time()}
        pulse = session.client.pulse()
        if pulse is not None:
            frame["pulse"] = {"silent_s": pulse.silent_s, "stuck_s": pulse.stuck_s}
        try:
            reply = await asyncio.wait_for(session.client.scope(), self.service.settings.stats_timeout_s)
        except (TimeoutError, EngineDead):
            return frame
        now, kept = time.monotonic(), self.service.metrics.of(self.label)
        for name, recent in (("ttft", kept.recent_ttft), ("tpot", kept.recent_tpot)):
            frame[name] = [round(value, 5) for at, value in recent if at > self._seen_at][-MAX_LATENCIES:]
        self._seen_at = now
        return frame | self._figures(session, reply)

    def _figures(self, session: Session, reply: StatsReply) -> dict[str, Any]:
        info, view = session.client.info, reply.scope
        engine = {
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "max_model_len": info.max_model_len,
            "device": info.device,
            "dtype": info.dtype,
            "kernels": info.kernels,
        }
        told: dict[str, Any] = {"engine": engine, "stats": msgspec.to_builtins(reply.stats)}
        if view is None:
            return told
        told |= {"rows": msgspec.to_builtins(view.rows), "more_rows": view.more_rows, "took_s": view.took_s}
        told["pool"] = msgspec.to_builtins(view.pool)
        told["tree"] = [
            {**msgspec.to_builtins(branch), "head": None, "text": self._preview(session, branch.head)}
            for branch in view.tree
        ]
        return told

    def _preview(self, session: Session, head: tuple[int, ...]) -> str | None:
        if not self.service.scopes.shows_text:
            return None
        with contextlib.suppress(Exception):  # an id that the tokenizer does not know is no reason to stop watching
            return session.tokenizer.decode(head, skip_special_tokens=False)[:PREVIEW_CHARS]
        return None


class Scopes:
    """Who watches which engine."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._feeds: dict[str, Feed] = {}
        self._watchers = 0

    @property
    def shows_text(self) -> bool:
        return not len(self.service.keys) and is_loopback(self.service.settings.host)

    def labels(self) -> list[str]:
        return [self.service.label(session) for session in self.service.models.loaded()]

    def session(self, label: str) -> Session | None:
        return next((s for s in self.service.models.loaded() if self.service.label(s) == label), None)

    async def watch(self, label: str) -> AsyncGenerator[dict[str, Any], None]:
        """Frames until the server drains. Raises Overloaded."""
        if self._watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} watch the scope already", retry_after_s=10.0)
        feed = self._feeds.get(label)
        if feed is None:
            feed = self._feeds[label] = Feed(self.service, label)
        self._watchers += 1
        feed.watchers += 1
        number = 0
        try:
            while not self.service.draining:
                number, frame = await feed.after(number)
                yield frame
        finally:
            self._watchers -= 1
            feed.watchers -= 1
            if not feed.watchers:
                self._feeds.pop(label, None)
                await feed.stop()


async def scope_stream(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Frames as server-sent events. Query: `model`, a loaded one; the first by default."""
    labels = service.scopes.labels()
    asked = parse_qs(scope["query_string"].decode("latin-1")).get("model", labels[:1])
    if not asked:
        raise not_found("any", ())
    if asked[0] not in labels:
        raise not_found(asked[0], labels)
    await until_gone(receive, _stream(service, asked[0], reply))


async def _stream(service: Service, label: str, reply: Reply) -> None:
    async with aclosing(service.scopes.watch(label)) as frames:
        async for frame in frames:
            await reply.event(frame)
    await reply.end()


SCOPE = Dialect("scope", (("GET", "/scope", scope_stream),))
