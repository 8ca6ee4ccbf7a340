"""Anthropic's answer, as stream events and whole, from a session's events.

Used by `anthropic.py`. One machine opens and closes content blocks; a whole answer is what its events add up to, so
that both can't differ. Knows nothing of HTTP, engines or how the events came about.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.serve.anthropic_cache import input_usage
from septet.session.events import Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from septet.request import Pin
    from septet.serve.anthropic_call import MessagesCall
    from septet.session.events import Event, Usage
    from septet.session.session import Prompt

__all__ = ["Answer", "StreamEvent"]

StreamEvent = dict[str, Any]  # its "type" is its name


class Answer:
    """One message being written. `feed` tells stream events; `whole` the message once all were fed."""

    def __init__(
        self, call: MessagesCall, number: str, prompt: Prompt, max_model_len: int, pins: Sequence[Pin] = ()
    ) -> None:
        self._call = call
        self._pins = pins
        self._head = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": call.model}
        self._n_prompt = len(prompt.tokens)
        self._room = max_model_len - self._n_prompt
        self._content: list[dict[str, Any]] = []  # blocks as told so far
        self._kind = ""  # of the open block, "" = none is open
        self._texts: list[str] = []  # of the open block
        self._blank = ""  # white space that may turn out to stand before a call: no text block is made of that
        self._last: StreamEvent = {}
        self._edits: StreamEvent = {"context_management": {"applied_edits": []}} if call.edits is not None else {}

    def start(self) -> StreamEvent:
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": self._n_prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return {"type": "message_start", "message": self._head | empty | {"usage": usage | {"output_tokens": 0}}}

    def whole(self) -> dict[str, Any]:
        return (
            self._head | {"content": self._content} | self._last["delta"] | {"usage": self._last["usage"]} | self._edits
        )

    def feed(self, event: Event) -> Iterator[StreamEvent]:
        if isinstance(event, TextDelta) and not self._call.only_prompt:
            yield from self._delta(event)
        elif isinstance(event, Finished):
            yield from self._close()
            self._last = {"type": "message_delta", "delta": self._reason(event), "usage": self._usage(event.usage)}
            yield self._last | self._edits
            yield {"type": "message_stop"}

    # -- blocks
    def _delta(self, delta: TextDelta) -> Iterator[StreamEvent]:
        if delta.reasoning:
            yield from self._open("thinking", {"thinking": "", "signature": ""})
            yield from self._piece("thinking", delta.reasoning)
        if delta.text:
            yield from self._text(delta.text)
        for call in delta.calls:
            if call.name is not None:
                yield from self._close()
                number = (call.id or "").replace("call_", "toolu_", 1)
                yield from self._open("tool_use", {"id": number, "name": call.name, "input": {}})
            if call.arguments:
                yield from self._piece("input_json", call.arguments)

    def _text(self, text: str) -> Iterator[StreamEvent]:
        if self._kind != "text":
            text = self._blank + text
            self._blank = text if text.isspace() else ""
            if self._blank:
                return
            yield from self._open("text", {"text": ""})
        yield from self._piece("text", text)

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[StreamEvent]:
        if self._kind == kind:
            return
        yield from self._close()
        self._kind, self._blank = kind, ""
        self._content.append({"type": kind, **block})
        shown = {"type": kind, **block}
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": shown}

    def _piece(self, kind: str, text: str) -> Iterator[StreamEvent]:
        self._texts.append(text)
        if kind != "thinking" or not self._call.hidden:
            name = "partial_json" if kind == "input_json" else kind
            yield self._told({"type": f"{kind}_delta", name: text})

    def _close(self) -> Iterator[StreamEvent]:
        if not self._kind:
            return
        block, text = self._content[-1], "".join(self._texts)
        if self._kind == "tool_use":
            block["input"] = _object(text)
        elif self._kind == "thinking":
            block["thinking"] = "" if self._call.hidden else text
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            yield self._told({"type": "signature_delta", "signature": block["signature"]})
        else:
            block["text"] = text
        yield {"type": "content_block_stop", "index": len(self._content) - 1}
        self._kind = ""
        self._texts.clear()

    def _told(self, delta: dict[str, Any]) -> StreamEvent:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    # -- the end
    def _reason(self, finished: Finished) -> dict[str, Any]:
        matched = finished.stop_reason if isinstance(finished.stop_reason, str) else None
        if self._call.only_prompt:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if finished.reason is FinishReason.LENGTH:
            wanted, made = self._call.params.max_tokens or 0, finished.usage.completion_tokens
            reason = "model_context_window_exceeded" if made < wanted and made >= self._room else "max_tokens"
        elif matched is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if finished.n_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            **input_usage(usage, self._pins),
            "output_tokens": 0 if self._call.only_prompt else usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }


def _object(text: str) -> dict[str, Any]:
    """The input of a call; {} where the tokens ended in the middle of it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
