"""Routes for those who run a server: is it alive, ready, does it progress; version, metrics, and the API's document.

The three answers are different ones and cost no engine work: they read what the server knows and what the engine has
written to shared memory. Listed in `app.DIALECTS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import septet
from septet.errors import EngineDead
from septet.serve.dialect import Dialect
from septet.serve.errors import HttpError
from septet.serve.openapi import document
from septet.serve.restart import RETRY_S

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.service import Service
    from septet.serve.sse import Reply

__all__ = ["OPERATIONS"]

PROBES = frozenset(("/health", "/live", "/ready", "/progressing", "/ping"))


async def live(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """This process answers. Restart it if it does not."""
    await reply.json({"status": "ok"})


async def ready(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Requests are taken: the engine lives and the server is not leaving. Send traffic elsewhere if not."""
    if service.models.dead:
        raise EngineDead("the engine process has ended; the server exits")
    if service.draining:
        raise HttpError(503, "the server is shutting down", code="draining")
    if service.models.restarting:
        raise EngineDead("the engine process has ended and is being started again", retry_after_s=RETRY_S)
    await reply.json({"status": "ok"})


async def progressing(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Engines with work finish steps. A long prefill is progress; a stopped or hung engine is not."""
    settings = service.settings
    engines = []
    for session in service.models.loaded():
        pulse = session.client.pulse()
        if pulse is None:
            continue
        moves = pulse.moves(silent_s=settings.silent_s, stuck_s=settings.stuck_s)
        shown = {"model": service.label(session), "progressing": moves}
        engines.append(shown | {"silent_s": round(pulse.silent_s, 3), "stuck_s": round(pulse.stuck_s, 3)})
    ok = not service.models.dead and all(engine["progressing"] for engine in engines)
    await reply.json({"status": "ok" if ok else "stalled", "engines": engines}, 200 if ok else 503)


async def version(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"version": septet.__version__})


async def metrics(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await service.refresh()
    await reply.raw(service.metrics.render(), "text/plain; version=0.0.4; charset=utf-8")


async def openapi(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    from septet.serve.app import DIALECTS

    await reply.json(document(DIALECTS))


OPERATIONS = Dialect(
    "operations",
    (
        ("GET", "/openapi.json", openapi),
        ("GET", "/health", ready),
        ("GET", "/live", live),
        ("GET", "/ready", ready),
        ("GET", "/progressing", progressing),
        ("GET", "/ping", ready),
        ("GET", "/version", version),
        ("GET", "/metrics", metrics),
    ),
    public=PROBES,
)
