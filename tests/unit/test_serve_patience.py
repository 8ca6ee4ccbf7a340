"""A reader that stops reading is dropped after its time, however long the stream has gone well before."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from septet.serve.errors import ClientGone
from septet.serve.sse import Reply

LIMIT_S = 0.2


async def stalled_after(n_quick: int, pause_s: float) -> float:
    """Seconds until the write that hangs is given up."""
    sent = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal sent
        sent += 1
        if sent > n_quick:
            await asyncio.Event().wait()

    reply = Reply(send, write_timeout_s=LIMIT_S)
    for _ in range(n_quick - 1):  # the head is a message too
        await reply.event({"text": "x"})
        await asyncio.sleep(pause_s)
    began = time.monotonic()
    with pytest.raises(ClientGone):
        await reply.event({"text": "never taken"})
    assert reply.ended
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    await asyncio.sleep(0)  # no cancel is left over
    return time.monotonic() - began


@pytest.mark.parametrize(("n_quick", "pause_s"), [(2, 0.0), (2, LIMIT_S * 1.5), (5, LIMIT_S * 0.4)])
def test_a_stalled_write_ends_after_its_own_time(n_quick: int, pause_s: float) -> None:
    assert LIMIT_S * 0.95 <= asyncio.run(stalled_after(n_quick, pause_s)) < LIMIT_S * 2


def test_a_cancel_from_outside_stays_one() -> None:
    async def main() -> None:
        async def send(message: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(Reply(send, write_timeout_s=30).event({}))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_slow_writes_that_end_in_time_are_no_stall() -> None:
    async def main() -> None:
        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(LIMIT_S * 0.6)

        reply = Reply(send, write_timeout_s=LIMIT_S)
        for _ in range(4):
            await reply.event({})
        assert not reply.ended

    asyncio.run(main())
