"""The HTTP server: routes, health, metrics, errors, start and drain.

Made by `septet serve` (or a test) around one `Session`. Knows HTTP and nothing of tokens or scheduling; a dialect
is one entry of `DIALECTS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

import septet
from septet.errors import EngineDead, InvalidRequest
from septet.serve.anthropic import ANTHROPIC
from septet.serve.collide import joined
from septet.serve.dialect import Dialect
from septet.serve.errors import ClientGone, HttpError
from septet.serve.guard import Guard
from septet.serve.metrics import Metrics
from septet.serve.models import FixedModels, Models
from septet.serve.openai import OPENAI
from septet.serve.openapi import document
from septet.serve.sse import Reply
from septet.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from septet.engine.messages import EngineStats
    from septet.serve.dialect import ErrorStyle, Handler

__all__ = ["Service", "Settings", "bind", "create_app", "serve_forever"]

DEAD_GRACE_S = 3.0  # how long /health says 503 before a server without an engine exits


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    served_names: tuple[str, ...] = ()  # () = the model's own name
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    head_timeout_s: float = 30.0  # a connection on which no whole head of a request comes for so long is cut
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0  # a reader that takes nothing for so long is dropped
    stats_timeout_s: float = 2.0
    drain_s: float = 30.0  # after SIGTERM or SIGINT, for open requests


class Service:
    """What every route gets: the models, the settings, the metrics, whether we are leaving."""

    def __init__(self, models: Models | Session, settings: Settings) -> None:
        self.models = FixedModels(models, settings.served_names) if isinstance(models, Session) else models
        self.settings = settings
        self.metrics = Metrics(next((card.name for card in self.models.cards()), ""))
        self.draining = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(card.name for card in self.models.cards())

    async def stats(self) -> EngineStats | None:
        """The default engine's numbers, or None if it does not answer in time (it is asked between steps)."""
        sessions = self.models.loaded()
        if not sessions:
            return None
        try:
            return await asyncio.wait_for(sessions[0].client.stats(), self.settings.stats_timeout_s)
        except (TimeoutError, EngineDead):
            return None


# -- operational routes -----------------------------------------------------------------------------------------------
async def health(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Ready to take requests? Costs the engine nothing."""
    if service.models.dead:
        raise EngineDead("the engine process has ended; restart the server")
    if service.draining:
        raise HttpError(503, "the server is shutting down", code="draining")
    await reply.json({"status": "ok"})


async def ping(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"status": "ok"})


async def version(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"version": septet.__version__})


async def metrics(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    body = service.metrics.render(await service.stats(), up=not service.models.dead)
    await reply.raw(body, "text/plain; version=0.0.4; charset=utf-8")


async def openapi(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json(document(DIALECTS))


OPERATIONS = Dialect(
    "operations",
    (
        ("GET", "/openapi.json", openapi),
        ("GET", "/health", health),
        ("GET", "/ping", ping),
        ("GET", "/version", version),
        ("GET", "/metrics", metrics),
    ),
)
DIALECTS = (OPERATIONS, OPENAI, ANTHROPIC)


# -- application ------------------------------------------------------------------------------------------------------
class Endpoint:
    """One route as an ASGI app: every error becomes an answer, every answer is counted."""

    def __init__(self, service: Service, pattern: str, handler: Handler, errors: ErrorStyle) -> None:
        self.service = service
        self.pattern = pattern
        self.handler = handler
        self.errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, write_timeout_s=self.service.settings.write_timeout_s, errors=self.errors)
        try:
            await self.handler(self.service, scope, receive, reply)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            await self._cut(reply)
            raise
        except Exception as error:
            with contextlib.suppress(ClientGone):
                await reply.error(error)
        finally:
            self.service.metrics.answered(self.pattern, scope["method"], reply.status or 499)

    async def _cut(self, reply: Reply) -> None:
        """The drain's time is over: say so in a stream that is open."""
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(1.0):
                await reply.error(EngineDead("the server was stopped before this answer was complete"))


def create_app(service: Service) -> ASGIApp:
    """The ASGI application. The caller owns the models and closes them."""
    routes = [
        Route(pattern, Endpoint(service, pattern, handler, errors), methods=[method])
        for method, pattern, handler, errors in joined(DIALECTS)
    ]
    app: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: _on_http_exception})
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    settings = service.settings
    if settings.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        app = CORSMiddleware(app, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return Guard(app, _refuse, settings.host, settings.allowed_hosts, settings.allowed_origins)


def _on_http_exception(request: Request, error: Exception) -> Any:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    from starlette.responses import JSONResponse

    from septet.serve.errors import error_body

    assert isinstance(error, HTTPException)
    there = "the API is under /v1: /v1/models, /v1/chat/completions, /v1/completions"
    words = {404: f"no such route; {there}", 405: "this route does not take that method"}
    shown = HttpError(error.status_code, words.get(error.status_code, str(error.detail)))
    return JSONResponse(error_body(shown), error.status_code, headers=error.headers)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: HttpError) -> None:
    with contextlib.suppress(ClientGone):
        await Reply(send, write_timeout_s=10.0).error(error)


# -- running ----------------------------------------------------------------------------------------------------------
def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, without listening yet. Raises `InvalidRequest` if it is taken."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], info[1])
    except OSError as error:
        raise InvalidRequest(f"can't use the address {host}: {error.strerror or error}", param="host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
    except OSError as error:
        sock.close()
        raise InvalidRequest(
            f"can't listen on {host} port {port}: {error.strerror or error}; choose another with --port", param="port"
        ) from None
    return sock


async def serve_forever(service: Service, sock: socket.socket, on_ready: Callable[[], None] = lambda: None) -> int:
    """Serve until SIGTERM, SIGINT or the engine's death. Returns the exit code: 0 after a drain, 1 without an engine.

    The first signal stops accepting and gives open requests `drain_s`; a second one ends at once.
    """
    import uvicorn

    from septet.serve.connection import Connection

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own raises the signal again when all is done: a clean drain would look like a crash."""
            loop = asyncio.get_running_loop()
            for sig in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(sig, self.on_signal)
            try:
                yield
            finally:
                for sig in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(sig)

        def on_signal(self) -> None:
            self.force_exit = self.should_exit
            self.should_exit = service.draining = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=partial(Connection, head_timeout_s=service.settings.head_timeout_s),  # type: ignore[arg-type]
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(service.settings.drain_s)),
        h11_max_incomplete_event_size=64 * 1024,
        backlog=512,
    )
    server = Server(config)
    watch = asyncio.create_task(_end_with_engine(service, server))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
    return 1 if service.models.dead else 0


async def _end_with_engine(service: Service, server: Any) -> None:
    while not service.models.dead:
        await asyncio.sleep(0.25)
    await asyncio.sleep(DEAD_GRACE_S)
    server.should_exit = True
