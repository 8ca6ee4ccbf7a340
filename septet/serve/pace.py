"""A stream of events with its silences: so that a dialect can send a ping, or tell what it holds back.

Used by dialects whose streams need it; costs a task per event. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["paced"]

T = TypeVar("T")


async def paced(
    events: AsyncGenerator[T, None], silence_s: float, *, again: bool = True
) -> AsyncGenerator[T | None, None]:
    """The events, and None when none came for `silence_s`; not `again`: once between two events. Closes nothing."""
    following: asyncio.Future[T] | None = None
    silent = False
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((following,), timeout=None if silent and not again else silence_s)
            if not done:
                silent = True
                yield None
                continue
            task, following, silent = following, None, False
            try:
                item = task.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
