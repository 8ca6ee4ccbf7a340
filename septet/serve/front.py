"""The outermost layer around every request: its context, the id in its answer, one access-log line, one trace.

Wraps the whole application, so that what the guard refuses and what no route takes is told too. Knows no route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.serve.context import Context, entered

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from septet.serve.service import Service

__all__ = ["Front"]


class Front:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context, status, n_bytes = Context(), 0, 0
        entered(context)
        number = (b"x-request-id", context.id.encode())

        async def noting(message: Any) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), number]
            else:
                n_bytes += len(message.get("body", b""))
            await send(message)

        tracing = self.service.tracing
        span = tracing.begin(scope) if tracing is not None else None
        try:
            await self.app(scope, receive, noting)
        finally:
            context.ended = True
            if span is not None and tracing is not None:
                tracing.end(span, context, scope, status or 499)
            if self.service.access_log is not None:
                self.service.access_log.write(context, scope, status or 499, n_bytes)
