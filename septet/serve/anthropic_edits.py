"""Anthropic's `context_management`: edits of a conversation that would come to nothing are taken, the others refused.

A conversation is never edited here. Clients ask for edits in every request, most of which would change none; those are
answered with the empty list that says so. Called by `anthropic_call.py`; knows counts, no templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.serve.fields import Fields

__all__ = ["Edits", "edits_of"]

MAX_EDITS = 16
CLEAR_TOOLS_FROM = 100_000  # input tokens, where an edit names no trigger
_PARAM = "context_management"


@dataclass(frozen=True, slots=True)
class Edits:
    """Taken as long as the prompt has at most so many tokens."""

    up_to: int

    def check(self, n_prompt: int) -> None:
        if n_prompt > self.up_to:
            raise InvalidRequest(
                f"context_management: the prompt has {n_prompt} tokens, more than the {self.up_to} from which tool "
                "uses are to be cleared; a conversation is never edited here, shorten it in the client",
                param=_PARAM,
            )


def edits_of(fields: Fields, messages: Sequence[dict[str, Any]]) -> Edits:
    value = fields.object(_PARAM)
    edits = value.get("edits") or []
    if set(value) - {"edits"} or not isinstance(edits, list) or len(edits) > MAX_EDITS:
        raise InvalidRequest(f'context_management must be {{"edits": [...]}}, at most {MAX_EDITS}', param=_PARAM)
    return Edits(min((_limit(edit, messages) for edit in edits), default=2**62))


def _limit(edit: Any, messages: Sequence[dict[str, Any]]) -> int:
    """Tokens of the prompt beyond which the edit would change it."""
    kind = str(edit.get("type"))[:60] if isinstance(edit, dict) else ""
    if kind.startswith("clear_thinking_") and edit.get("keep") == "all":
        return 2**62
    if kind.startswith("clear_tool_uses_"):
        trigger = edit.get("trigger") or {"type": "input_tokens", "value": CLEAR_TOOLS_FROM}
        of, value = (trigger.get("type"), trigger.get("value")) if isinstance(trigger, dict) else (None, None)
        if of in ("input_tokens", "tool_uses") and isinstance(value, int) and 0 < value < 2**62:
            uses = sum(len(message.get("tool_calls", ())) for message in messages)
            if of == "input_tokens":
                return value if uses else 2**62
            if uses <= value:
                return 2**62
    raise InvalidRequest(f"context_management: a conversation is never edited here, as {kind!r} asks", param=_PARAM)
