"""Stored responses, for `previous_response_id` and for reading them again: in memory, bounded, the oldest go first.

Owned by one server's `openai_responses.py`; each response belongs to the API key that asked for it. Knows no HTTP.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ResponseStore", "Stored"]

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """messages: the conversation up to and with this response, without its instructions."""

    owner: str
    body: dict[str, Any]
    items: Sequence[dict[str, Any]]
    messages: Sequence[dict[str, Any]]
    size: int


class ResponseStore:
    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._max = max_responses, max_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def add(
        self, owner: str, body: dict[str, Any], items: Sequence[dict[str, Any]], messages: Sequence[dict[str, Any]]
    ) -> None:
        """One that is larger than the whole store is not kept."""
        size = len(msgspec.json.encode((body, items, messages)))
        if size > self._max[1]:
            return
        self._stored[body["id"]] = Stored(owner, body, items, messages, size)
        self._bytes += size
        while len(self._stored) > self._max[0] or self._bytes > self._max[1]:
            _, oldest = self._stored.popitem(last=False)
            self._bytes -= oldest.size

    def get(self, owner: str, number: str) -> Stored:
        """HttpError 404 for one that is not there, or another key's."""
        found = self._stored.get(number)
        if found is None or found.owner != owner:
            shown = number if len(number) <= 80 else number[:77] + "..."
            raise HttpError(
                404,
                f"no response {shown!r} here: it was not stored, was deleted, or gave way to newer ones",
                code="response_not_found",
            )
        return found

    def delete(self, owner: str, number: str) -> None:
        self._bytes -= self.get(owner, number).size
        del self._stored[number]
