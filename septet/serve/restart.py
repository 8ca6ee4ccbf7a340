"""One model whose engine is started again when it dies (`--restart-engine`).

Used by `septet serve` as `Models`. Requests under way at a death get its error; those that come while the engine loads
are refused with a time to come back. An engine that keeps dying is given up, and the server ends. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from septet.errors import EngineDead, SeptetError
from septet.serve.models import FixedModels

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from septet.session.session import Session

__all__ = ["RestartedModel"]

MAX_DEATHS, WITHIN_S = 3, 600.0  # more deaths in that time and it is given up
WATCH_S = 0.1
RETRY_S = 2.0  # what who asks meanwhile is told

log = logging.getLogger(__name__)


class RestartedModel(FixedModels):
    """`start` makes a new session, with the same limits. `close` ends the session that runs then."""

    def __init__(self, session: Session, names: Sequence[str], start: Callable[[], Awaitable[Session]]) -> None:
        super().__init__(session, names)
        self._start = start
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._given_up = False
        self._watch = asyncio.create_task(self._keep())

    @property
    def dead(self) -> bool:
        return self._given_up

    @property
    def restarting(self) -> bool:
        return self.session.client.dead and not self._given_up

    def loaded(self) -> Sequence[Session]:
        return [] if self.session.client.dead else [self.session]

    @asynccontextmanager
    async def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AsyncGenerator[Session, None]:
        self.find(name)
        if self.session.client.dead:
            if self._given_up:
                raise EngineDead("the engine has ended too often; the server exits")
            raise EngineDead("the engine has ended and is being started again", retry_after_s=RETRY_S)
        yield self.session

    async def close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self.session.close()

    async def _keep(self) -> None:
        while True:
            while not self.session.client.dead:
                await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < WITHIN_S:
                log.error("the engine has died %d times in %g s: giving up", MAX_DEATHS + 1, now - self._deaths[0])
                self._given_up = True
                return
            self._deaths.append(now)
            await self._again()

    async def _again(self) -> None:
        """A new session in place of the dead one; a failed start counts as a death."""
        with contextlib.suppress(Exception):
            await self.session.close()
        log.warning("starting the engine again")
        try:
            self.session = await self._start()
        except Exception as error:  # also what the system refuses: no memory, no descriptors
            log.error("the engine could not be started again: %s", error, exc_info=not isinstance(error, SeptetError))
            await asyncio.sleep(1.0)
            return
        self.restarts += 1
        log.warning("the engine serves again")
