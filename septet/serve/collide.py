"""Paths that several engines use for different things: the request itself tells whose it is.

A dialect lists the path among its routes and says in `Dialect.claims` by which field or header it knows a request of
its own; the dialect without a claim takes the rest. `app.py` asks `joined` for its routes. Knows no dialect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.errors import InvalidRequest
from septet.serve.body import keep_body, read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.dialect import Claim, Dialect, ErrorStyle, Handler
    from septet.serve.sse import Reply

__all__ = ["joined"]

Way = tuple["Claim | None", "Handler", "ErrorStyle"]


def joined(dialects: Sequence[Dialect]) -> Iterator[tuple[str, str, Handler, ErrorStyle]]:
    """(method, path pattern, handler, errors) of every route, each path once."""
    found: dict[tuple[str, str], list[Way]] = {}
    for dialect in dialects:
        for method, pattern, handler in dialect.routes:
            ways = found.setdefault((method, pattern), [])
            ways.append((dialect.claims.get(pattern), handler, dialect.errors))
    for (method, pattern), ways in found.items():
        rest = [way for way in ways if way[0] is None]
        if len(rest) > 1:
            raise ValueError(f"{method} {pattern} has {len(rest)} handlers without a claim")
        ordered = [way for way in ways if way[0] is not None] + rest
        if len(ordered) == 1:
            yield method, pattern, ordered[0][1], ordered[0][2]
        else:
            yield method, pattern, _chooser(ordered), (rest or ordered)[0][2]


def _chooser(ways: list[Way]) -> Handler:
    by_fields = any(claim is not None and claim.fields for claim, _, _ in ways)

    async def choose(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
        headers = {name.decode("latin-1").lower() for name, _ in scope["headers"]}
        body: dict[str, Any] = {}
        if by_fields:
            settings = service.settings
            limits: dict[str, Any] = {"max_bytes": settings.max_body_bytes, "timeout_s": settings.body_timeout_s}
            body = await read_object(scope, receive, **limits)
            keep_body(scope, body)
        for claim, handler, errors in ways:
            if claim is None or claim.fits(headers, body):
                reply.errors = errors
                await handler(service, scope, receive, reply)
                return
        known = [f"{' or '.join(claim.fields)} ({claim.of})" for claim, _, _ in ways if claim is not None]
        raise InvalidRequest(f"the body has none of the fields that tell what is asked: {'; '.join(known)}")

    return choose
