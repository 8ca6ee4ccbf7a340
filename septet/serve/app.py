"""The HTTP application: every dialect's routes behind one door.

Made by `septet serve` (or a test) around one `Service`. Knows HTTP and nothing of tokens or scheduling; a dialect is
one entry of `DIALECTS`. What is around it: `front.py`, `guard.py`; what runs it: `running.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from septet.errors import EngineDead
from septet.serve.anthropic import ANTHROPIC
from septet.serve.collide import joined
from septet.serve.context import Context, current
from septet.serve.errors import ClientGone
from septet.serve.front import Front
from septet.serve.guard import LOOPBACK_ORIGIN, Guard, is_loopback
from septet.serve.keys import Unauthorized
from septet.serve.llamacpp import LLAMACPP
from septet.serve.ollama import OLLAMA
from septet.serve.openai import OPENAI
from septet.serve.openai_responses import RESPONSES_DIALECT
from septet.serve.operations import OPERATIONS
from septet.serve.page import PAGE
from septet.serve.running import bind, serve
from septet.serve.scope import SCOPE
from septet.serve.service import Service, Settings
from septet.serve.sglang import SGLANG
from septet.serve.sse import Reply
from septet.serve.tgi import TGI
from septet.serve.unrouted import refusal, style_of

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from septet.serve.dialect import ErrorStyle, Handler
    from septet.serve.errors import HttpError

__all__ = ["DIALECTS", "Service", "Settings", "bind", "create_app", "serve_forever"]

DIALECTS = (OPERATIONS, PAGE, SCOPE, OPENAI, RESPONSES_DIALECT, ANTHROPIC, OLLAMA, TGI, LLAMACPP, SGLANG)


class Endpoint:
    """One route as an ASGI app: who may ask, every error becomes an answer, every answer is counted."""

    def __init__(
        self, service: Service, pattern: str, handler: Handler, errors: ErrorStyle, public: bool = False
    ) -> None:
        self.service = service
        self.pattern = pattern
        self.handler = handler
        self.errors = errors
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = current() or Context()
        context.route = self.pattern
        reply = Reply(send, write_timeout_s=self.service.settings.write_timeout_s, errors=self.errors)
        try:
            await self._handle(context, scope, receive, reply)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            await self._cut(reply)
            raise
        except Exception as error:
            with contextlib.suppress(ClientGone):
                await reply.error(error)
        finally:
            seconds = time.monotonic() - context.began
            self.service.metrics.answered(self.pattern, scope["method"], reply.status or 499, seconds)

    async def _handle(self, context: Context, scope: Scope, receive: Receive, reply: Reply) -> None:
        """Who asks and until when, then the handler within the key's limits."""
        service = self.service
        key = context.key = None if self.public else service.keys.check(scope["headers"])
        if service.settings.request_timeout_s:
            context.limit(service.settings.request_timeout_s, "request timeout")
        for name, value in scope["headers"]:
            if name == b"x-request-timeout":
                context.limit(value.decode("latin-1"), "X-Request-Timeout")
        if key is None:
            await self.handler(service, scope, receive, reply)
            return
        service.admission.begin(key)
        try:
            await self.handler(service, scope, receive, reply)
        finally:
            service.admission.keys.leave(key)
            service.metrics.key_used(key.name, context.prompt_tokens, context.output_tokens)

    async def _cut(self, reply: Reply) -> None:
        """The drain's time is over: say so in a stream that is open."""
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(1.0):
                await reply.error(EngineDead("the server was stopped before this answer was complete"))


def create_app(service: Service) -> ASGIApp:
    """The ASGI application. The caller owns the models and closes them."""
    public = {(method, path) for d in DIALECTS for method, path, _ in d.routes if method == "GET" and path in d.public}
    routes = [
        Route(path, Endpoint(service, path, handler, errors, (method, path) in public), methods=[method])
        for method, path, handler, errors in joined(DIALECTS)
    ]

    def unrouted(request: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        return _on_http_exception(service, request, error)

    app: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: unrouted})
    app.router.redirect_slashes = False  # type: ignore[attr-defined]
    settings = service.settings
    origins = tuple(origin.lower().rstrip("/") for origin in settings.allowed_origins)  # as browsers write them
    loopback = is_loopback(settings.host)
    if origins or loopback:
        from starlette.middleware.cors import CORSMiddleware

        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_origin_regex=LOOPBACK_ORIGIN if loopback else None,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
        )

    async def refuse(scope: Scope, receive: Receive, send: Send, error: HttpError) -> None:
        service.metrics.answered("guard", scope["method"], error.status)
        with contextlib.suppress(ClientGone):
            await Reply(send, write_timeout_s=10.0).error(error)

    app = Guard(app, refuse, settings.host, settings.allowed_hosts, origins, probes=frozenset(p for _, p in public))
    return Front(app, service)


def _on_http_exception(service: Service, request: Request, error: HTTPException) -> Any:
    """Starlette's own 404 and 405. Which routes there are is told to those with a key only."""
    from starlette.responses import JSONResponse

    path = request.scope["path"]
    shown, style = refusal(path, error.status_code, str(error.detail)), style_of(path)
    try:
        service.keys.check(request.scope["headers"])
    except Unauthorized as refused:
        shown = refused
    status = style.status(shown)
    service.metrics.answered("unrouted", request.method, status)
    return JSONResponse(style.body(shown), status, headers={**(error.headers or {}), **style.headers(shown)})


async def serve_forever(service: Service, sock: socket.socket, on_ready: Callable[[], None] = lambda: None) -> int:
    """See `running.serve`."""
    return await serve(create_app(service), service, sock, on_ready)
