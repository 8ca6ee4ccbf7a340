"""A server from its address to its exit code: bind, serve, watch the engines, drain.

Called by `septet serve` (and tests). Knows signals and uvicorn; no route and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from starlette.types import ASGIApp

    from septet.serve.service import Service, Settings

__all__ = ["bind", "check_tls", "serve"]

DEAD_GRACE_S = 3.0  # how long /ready says 503 before a server without an engine exits
WATCH_S = 0.25

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded, without listening yet. Raises `InvalidRequest` if it is taken."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(
            *info[:3]
        )  # without the protocol's number asyncio would leave Nagle's delay on: 40 ms a token
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


def check_tls(settings: Settings) -> None:
    """Can the certificate be used? Told before a model is loaded."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise InvalidRequest("--ssl-keyfile needs --ssl-certfile", param="ssl_keyfile")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile, password=_no_password
        )
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "no certificate and key"
        raise InvalidRequest(
            f"can't use the certificate {settings.ssl_certfile}: {reason}", param="ssl_certfile"
        ) from None


def _no_password() -> str:
    """Asked for an encrypted key, where OpenSSL would ask at the terminal."""
    raise InvalidRequest(
        "the TLS key has a password; give one without: openssl pkey -in KEY -out PLAIN", param="ssl_keyfile"
    )


async def serve(app: ASGIApp, service: Service, sock: socket.socket, on_ready: Callable[[], None]) -> int:
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
            if self.should_exit:
                log.warning("second signal: ending at once")
            else:
                n, drain = service.admission.open, service.settings.drain_s
                log.warning("draining: %d generations are open, up to %g s; a second signal ends at once", n, drain)
            self.force_exit = self.should_exit
            self.should_exit = service.draining = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    settings = service.settings
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=partial(Connection, head_timeout_s=settings.head_timeout_s),  # type: ignore[arg-type]
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        h11_max_incomplete_event_size=64 * 1024,
        backlog=512,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    server = Server(config)
    async with _beside(service, server):
        await server.serve(sockets=[sock])
    return 1 if service.models.dead or service.unwatched else 0


def _watch_ended(service: Service, server: Any, watch: asyncio.Task[None]) -> None:
    """A server that nobody watches any more ends, rather than to look alive with a dead engine."""
    if not watch.cancelled() and (error := watch.exception()) is not None:
        log.error("the watch over the engines failed; ending", exc_info=error)
        service.unwatched = server.should_exit = True


@contextlib.asynccontextmanager
async def _beside(service: Service, server: Any) -> AsyncGenerator[None, None]:
    """What goes on while requests are served: the watch over the engines, and batches."""
    watches = [asyncio.create_task(_end_with_engine(service, server)), asyncio.create_task(_end_stalled(service))]
    for watch in watches:
        watch.add_done_callback(partial(_watch_ended, service, server))
    try:
        service.batches.resume()
        yield
    finally:
        await service.batches.close()
        for watch in watches:
            watch.cancel()


async def _end_with_engine(service: Service, server: Any) -> None:
    """No request can be served any more: say so for a moment, then leave."""
    while not service.models.dead:
        await asyncio.sleep(WATCH_S)
    await asyncio.sleep(DEAD_GRACE_S)
    server.should_exit = True


async def _end_stalled(service: Service) -> None:
    """An engine that has not run at all for long is ended: its requests get an error, as after any death."""
    limit = service.settings.kill_silent_s
    while limit:
        for session in service.models.loaded():
            pulse = session.client.pulse()
            if pulse is not None and not pulse.moves(silent_s=limit, stuck_s=2 * service.settings.stuck_s):
                log.error("the engine of %s does not move; ending it", service.label(session))
                session.client.kill(f"the engine did not move for {max(pulse.silent_s, pulse.stuck_s):.0f} s")
        await asyncio.sleep(WATCH_S)
