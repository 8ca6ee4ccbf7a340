"""Anthropic's `cache_control`: where marks stand in a conversation, the pins they become, what the answer tells of it.

Called by `anthropic_messages.py` (marks), `anthropic.py` (pins) and `anthropic_shape.py` (usage). Knows messages and
token counts; what a pin holds, and for how long at most, is the engine's (`kv/pins.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.request import Pin
from septet.serve.context import current
from septet.session.prefix import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.serve.anthropic_call import Conversation
    from septet.session.events import Usage
    from septet.session.session import Prompt, Session

__all__ = ["TOOLS", "Mark", "checked_marks", "input_usage", "pins_of", "ttl_of"]

MAX_MARKS = 4
TOOLS = -1  # the message of a mark on a tool
_TTLS = {"5m": 300.0, "1h": 3600.0}


@dataclass(frozen=True, slots=True)
class Mark:
    """All up to here: the first `chars` characters of a message's text, or the whole message (None)."""

    message: int
    chars: int | None
    ttl_s: float


def ttl_of(where: str, value: Any) -> float | None:
    """Seconds that a `cache_control` asks for; None where there is none."""
    if value is None:
        return None
    ttl = value.get("ttl", "5m") if isinstance(value, dict) and value.get("type") == "ephemeral" else None
    if not isinstance(ttl, str) or ttl not in _TTLS:
        raise InvalidRequest(f'{where}.cache_control must be {{"type": "ephemeral"}}, ttl 5m or 1h', param=where)
    return _TTLS[ttl]


def checked_marks(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    if len(marks) > MAX_MARKS:
        raise InvalidRequest(f"{len(marks)} blocks have cache_control; at most {MAX_MARKS} may", param="cache_control")
    return tuple(marks)


async def pins_of(session: Session, call: Conversation, prompt: Prompt) -> tuple[Pin, ...]:
    """The marks in tokens of this prompt, for the share of the key that asks. One that marks nothing is left out."""
    context = current()
    owner = context.key.name if context is not None and context.key is not None else ""
    pins = []
    for mark in call.marks:
        tools, options = call.for_template(session)
        length = await shared_prefix(session, prompt, _until(call.messages, mark), tools, **options)
        if length:
            pins.append(Pin(length=length, ttl_s=mark.ttl_s, owner=owner))
    return tuple(pins)


def _until(messages: Sequence[dict[str, Any]], mark: Mark) -> list[dict[str, Any]]:
    """The conversation up to a mark. Templates write tools with the system message, or before all else."""
    if mark.message == TOOLS:
        system = [m for m in messages[:1] if m["role"] == "system"]
        return system or [{"role": "user", "content": ""}]
    last = messages[mark.message]
    if mark.chars is not None:
        last = {"role": last["role"], "content": last["content"][: mark.chars]}
    return [*messages[: mark.message], last]


def input_usage(usage: Usage, pins: Sequence[Pin]) -> dict[str, Any]:
    """The prompt's tokens, each counted once: read from the cache, computed and pinned, or computed."""
    written = dict.fromkeys(_TTLS, 0)
    names = {seconds: name for name, seconds in _TTLS.items()}
    reached = usage.cached_tokens
    for held, pin in sorted(zip(usage.pinned, pins, strict=False), key=lambda pair: pair[0]):
        written[names[pin.ttl_s]] += max(0, held - reached)
        reached = max(reached, held)
    return {
        "input_tokens": usage.prompt_tokens - reached,
        "cache_creation_input_tokens": sum(written.values()),
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {f"ephemeral_{name}_input_tokens": n for name, n in written.items()},
    }
