"""Many streams as one: events of n choices or of a batch of prompts in the order in which they happen.

Owned by the session room, used by `Session` and by the surfaces that take a batch. Bounded: each source waits until its
last item was taken, so a slow reader slows the sources and never grows a queue.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

__all__ = ["merge"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """A source is done, well or not."""

    error: Exception | None


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield what the sources yield. The first error ends all; closing or cancelling this closes every source."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for one in only:
                yield one
        return
    queue: asyncio.Queue[T | _End] = asyncio.Queue(maxsize=len(sources))
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    open_sources = len(sources)
    try:
        while open_sources:
            item = await queue.get()
            if isinstance(item, _End):
                open_sources -= 1
                if item.error is not None:
                    raise item.error
                continue
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[T, None], queue: asyncio.Queue[T | _End]) -> None:
    error: Exception | None = None
    async with aclosing(source):
        try:
            async for item in source:
                await queue.put(item)
        except Exception as caught:
            error = caught
    await queue.put(_End(error))
