"""Lists in pages, as OpenAI's: newest first, `limit` and `after`, told by query parameters.

Used by the routes that list files and batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Scope

__all__ = ["page", "query_of"]


def query_of(scope: Scope, known: str) -> dict[str, str]:
    """The query parameters; InvalidRequest for one that is not among `known`, or comes twice."""
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(scope.get("query_string", b"").decode("ascii"), keep_blank_values=True, max_num_fields=32)
    except ValueError:
        raise InvalidRequest("the query string can't be read") from None
    for name, value in pairs:
        if name not in known.split() or name in found:
            raise InvalidRequest(f"query parameter {name[:80]!r} is unknown or comes twice", param=name[:80])
        found[name] = value
    return found


def page(items: Sequence[dict[str, Any]], query: dict[str, str], *, most: int, usual: int) -> dict[str, Any]:
    """items: oldest first, each with an id."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    text = query.get("limit", str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= most):
        raise InvalidRequest(f"limit must be an integer in [1, {most}]", param="limit")
    ordered = list(items) if order == "asc" else list(items)[::-1]
    if after := query.get("after"):
        at = next((i for i, item in enumerate(ordered) if item["id"] == after), None)
        if at is None:
            raise InvalidRequest("after names nothing in this list", param="after")
        ordered = ordered[at + 1 :]
    shown, rest = ordered[: int(text)], ordered[int(text) :]
    ids = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, **ids, "has_more": bool(rest)}
