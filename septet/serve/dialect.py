"""A dialect: the routes of one engine's API, and how that API tells an error.

Each dialect is one value of `Dialect` made in its own module and listed in `app.py`. Must not know sessions or models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.serve.errors import error_body, headers_of, status_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.sse import Reply

__all__ = ["OPENAI_ERRORS", "Dialect", "ErrorStyle", "Handler", "Route"]

Handler = Callable[["Service", "Scope", "Receive", "Reply"], Awaitable[None]]
Route = tuple[str, str, Handler]  # method, Starlette path pattern, handler


@dataclass(frozen=True, slots=True)
class ErrorStyle:
    """How an error is told: as a whole answer, and as the end of a stream that has begun."""

    body: Callable[[BaseException], Any]
    in_stream: Callable[[Reply, Any], Awaitable[None]]  # gets what `body` made
    status: Callable[[BaseException], int] = status_of
    headers: Callable[[BaseException], dict[str, str]] = headers_of


async def _event_and_done(reply: Reply, body: Any) -> None:
    await reply.event(body)
    await reply.done()


OPENAI_ERRORS = ErrorStyle(body=error_body, in_stream=_event_and_done)


@dataclass(frozen=True, slots=True)
class Dialect:
    name: str
    routes: tuple[Route, ...]
    errors: ErrorStyle = OPENAI_ERRORS
