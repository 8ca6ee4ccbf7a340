"""Who may speak to the server from a browser: Host and Origin, checked before any route.

A loopback server answers only to loopback names (DNS rebinding), and no server answers a page of another site unless
that origin was allowed at start. Decides on parsed names, never on string prefixes of a path.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["LOOPBACK_ORIGIN", "Guard", "host_of", "is_loopback"]

_HOST = re.compile(r"([a-z0-9](?:[a-z0-9._-]{0,252})|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://(.+)", re.IGNORECASE)
_LOOPBACK_NAME = r"localhost|[a-z0-9.-]+\.localhost|127\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}|\[::1\]"
_LOOPBACK = re.compile(rf"{_LOOPBACK_NAME}|::1", re.IGNORECASE)
LOOPBACK_ORIGIN = rf"https?://({_LOOPBACK_NAME})(:[0-9]{{1,5}})?"
"""Pages that a server on loopback answers, as a pattern of the whole Origin."""


def host_of(header: str) -> str | None:
    """The name in a Host header without its port, in lower case; None if it is malformed."""
    match = _HOST.fullmatch(header.strip())
    return match[1].lower() if match else None


def is_loopback(host: str) -> bool:
    return _LOOPBACK.fullmatch(host) is not None


class Guard:
    """ASGI middleware. `refuse` writes the error; `bound_to` is the address that the server listens on,
    `allowed_origins` are in lower case, `probes` are paths that HTTP/1.0 may ask for without a Host."""

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[Scope, Receive, Send, HttpError], Awaitable[None]],
        bound_to: str,
        allowed_hosts: tuple[str, ...] = (),
        allowed_origins: tuple[str, ...] = (),
        probes: frozenset[str] = frozenset(),
    ) -> None:
        self.app = app
        self.refuse = refuse
        self.only_loopback = is_loopback(bound_to)
        self.allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self.allowed_origins = frozenset(allowed_origins)
        self.probes = probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self.problem(scope)
        if error is None:
            await self.app(scope, receive, send)
        else:
            await self.refuse(scope, receive, send, error)

    def problem(self, scope: Scope) -> HttpError | None:
        values: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name.lower() in values:
                values[name.lower()].append(value.decode("latin-1"))
        if not values[b"host"] and self._is_old_probe(scope):
            return None
        if len(values[b"host"]) != 1 or (host := host_of(values[b"host"][0])) is None:
            return HttpError(400, "the Host header must be one host name, with or without a port")
        if self.only_loopback and not is_loopback(host) and host not in self.allowed_hosts:
            return HttpError(
                403,
                f"a server on loopback answers only to its own name; start it with --allowed-host {host[:100]}",
                code="host_refused",
            )
        return next((e for origin in values[b"origin"] if (e := self._origin_problem(origin, host))), None)

    def _origin_problem(self, origin: str, host: str) -> HttpError | None:
        if origin.lower() in self.allowed_origins or "*" in self.allowed_origins:
            return None
        match = _ORIGIN.fullmatch(origin)
        name = host_of(match[1]) if match else None
        if name is not None and (name == host or (is_loopback(name) and is_loopback(host))):
            return None
        return HttpError(
            403,
            "pages of another origin may not use this server; start it with --allowed-origin and the page's origin",
            code="origin_refused",
        )

    def _is_old_probe(self, scope: Scope) -> bool:
        """A load balancer's check. A browser always sends a Host."""
        return bool(scope["http_version"] == "1.0" and scope["method"] == "GET" and scope["path"] in self.probes)
