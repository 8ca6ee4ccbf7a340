"""The page at `/`: files of `static/`, read once, served by exact name under a strict policy.

The page needs no key (it holds no data; what it asks for does). `/` answers a browser with the page and anything else
as Ollama does, whose clients ask there whether a server is up. Listed in `app.DIALECTS`.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from septet.serve.dialect import Dialect
from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.service import Service
    from septet.serve.sse import Reply

__all__ = ["PAGE"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, type) of all there are: no path of a request ever reaches the file system."""
    found = {}
    for entry in files("septet.serve").joinpath("static").iterdir():
        media = _TYPES.get("." + entry.name.rpartition(".")[2])
        if media is not None:
            found[entry.name] = entry.read_bytes(), media
    return found


async def home(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """The page for a browser, a word for a client."""
    accepts = b",".join(value for name, value in scope["headers"] if name == b"accept")
    if service.settings.page and b"text/html" in accepts.lower():
        await _send("index.html", reply)
    else:
        await reply.raw(b"Ollama is running", "text/plain; charset=utf-8")


async def static(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    name = scope["path_params"]["name"]
    if not service.settings.page or name not in _files():
        raise HttpError(404, "no such file")
    await _send(name, reply)


async def _send(name: str, reply: Reply) -> None:
    body, media = _files()[name]
    await reply.raw(body, media, headers=_HEADERS)


PAGE = Dialect(
    "page",
    (("GET", "/", home), ("GET", "/static/{name}", static)),
    public=frozenset(("/", "/static/{name}")),
)
