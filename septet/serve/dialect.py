"""A dialect: the routes of one engine's API, and how that API tells an error.

Each dialect is one value of `Dialect` made in its own module and listed in `app.py`. Must not know sessions or models.

A dialect tells what its bodies hold by `schemas`: path pattern -> JSON schema of the body of its POST or PUT. Build it
with `fields.schema_of` from the table of rules that the parser reads anyway (`fields.table` makes one); `openapi.py`
makes /openapi.json of them all. A route without an entry is listed there without a body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.serve.errors import error_body, headers_of, status_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.sse import Reply

__all__ = ["OPENAI_ERRORS", "Claim", "Dialect", "ErrorStyle", "Handler", "Route"]

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
class Claim:
    """By what a request to a path that other dialects have too is known as this one's: any of these."""

    of: str  # whose requests these are, for an error
    fields: tuple[str, ...] = ()  # at the top of the body
    headers: tuple[str, ...] = ()  # in lower case

    def fits(self, headers: Collection[str], body: Mapping[str, Any]) -> bool:
        return any(name in headers for name in self.headers) or any(name in body for name in self.fields)


@dataclass(frozen=True, slots=True)
class Dialect:
    name: str
    routes: tuple[Route, ...]
    errors: ErrorStyle = OPENAI_ERRORS
    claims: Mapping[str, Claim] = field(default_factory=dict)  # by path pattern; see `collide.py`
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # path pattern -> JSON schema of the body
    public: frozenset[str] = frozenset()  # path patterns that may be read without an API key: no data, no work
