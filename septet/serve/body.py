"""Request bodies: read under a cap and a clock, decode as strict JSON objects.

Called by each dialect before it looks at a field. Every bad body is one `HttpError` (400, 408, 413, 415); nothing here
knows what the fields mean.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import msgspec

from septet.serve.context import current
from septet.serve.errors import ClientGone, HttpError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.app import Service

__all__ = ["body_of", "decode_object", "keep_body", "read_object"]

_KEPT = "septet.body"  # in the scope: a body that was read already

MAX_VALUES = 2**19
"""Of a body, about: decoding holds up everybody else's tokens, and its time goes by values, not by bytes."""


async def read_object(scope: Scope, receive: Receive, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The body of a request as a JSON object."""
    if _KEPT in scope:
        return scope[_KEPT]
    headers = {name.lower(): value for name, value in scope["headers"]}
    _check_type(headers.get(b"content-type"), headers.get(b"content-encoding"))
    _check_length(headers.get(b"content-length"), max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(receive, max_bytes)
    except TimeoutError:
        raise HttpError(408, f"the request body did not arrive within {timeout_s:g} s") from None
    fields = decode_object(body)
    take_timeout(fields)
    return fields


def take_timeout(fields: dict[str, Any]) -> None:
    """The field `timeout`, in every dialect, becomes the limit of the request; null is none."""
    context = current()
    if context is not None and (given := fields.pop("timeout", None)) is not None:
        context.limit(given, "timeout")


async def body_of(service: Service, scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body under the server's own limits."""
    settings = service.settings
    return await read_object(scope, receive, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)


def keep_body(scope: Scope, body: dict[str, Any]) -> None:
    """For a second `read_object`: who chooses a handler by the body has to read it first."""
    scope[_KEPT] = body


def _check_type(content_type: bytes | None, encoding: bytes | None) -> None:
    media = (content_type or b"").split(b";")[0].strip().lower()
    if media != b"application/json":
        raise HttpError(415, "Content-Type must be application/json")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        raise HttpError(415, "compressed request bodies are not accepted; send plain JSON")


def _check_length(length: bytes | None, max_bytes: int) -> None:
    if length is None:
        return
    if not length.isdigit() or len(length) > 18:
        raise HttpError(400, "Content-Length must be a non-negative integer")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the request body is larger than {max_bytes} bytes", code="request_too_large")


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    n_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        n_bytes += len(part)
        if n_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def decode_object(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no NaN, no lone surrogates, bounded numbers and depth, no key twice, an object at the top."""
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > MAX_VALUES:  # those inside of strings too: an upper bound
        raise HttpError(413, f"the request body holds more than {MAX_VALUES} values", code="request_too_large")
    try:
        value = msgspec.json.decode(body)
        if not isinstance(value, dict):
            raise HttpError(400, "the request body must be a JSON object")
        json.loads(body, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise HttpError(400, "the request body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise HttpError(400, f"the request body is no valid JSON: {str(error)[:200]}") from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Two parsers may pick different ones of two equal keys, so there must not be two. Values are not kept."""
    names = {name for name, _ in pairs}
    if len(names) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise HttpError(400, f"the request body holds {twice[:80]!r} twice", param=twice[:80])
