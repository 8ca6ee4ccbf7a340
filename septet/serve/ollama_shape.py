"""Ollama's answer objects, whole and in lines, from a session's events; times in nanoseconds.

Used by `ollama.py`. One `Answer` per response: what generate and chat name differently is all that differs. Knows
nothing of HTTP, engines or how the events came about.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from septet.serve.shapes import tool_calls
from septet.session.events import Finished, PositionLogprobs, PromptLogprobs, TokenLogprob, Usage

if TYPE_CHECKING:
    from septet.session.events import Event, ToolCallDelta

__all__ = ["Answer", "Clock", "timestamp"]

LOWEST = -9999.0  # JSON has no infinity


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339 in UTC; now, if no time is given."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class Clock:
    """When what happened, monotonic nanoseconds; 0 = not yet."""

    began: int = field(default_factory=time.monotonic_ns)
    loaded: int = 0
    first: int = 0  # token

    def mark_loaded(self) -> None:
        self.loaded = time.monotonic_ns()

    def durations(self) -> dict[str, int]:
        now = time.monotonic_ns()
        loaded = self.loaded or now
        first = self.first or now
        return {
            "total_duration": now - self.began,
            "load_duration": loaded - self.began,
            "prompt_eval_duration": first - loaded,
            "eval_duration": now - first,
        }


class Answer:
    """`chat`: the text is in a message; otherwise it is `response`, and the last object has the `context`."""

    def __init__(
        self, model: str, *, chat: bool, clock: Clock, prompt: tuple[int, ...] = (), show_thoughts: bool = True
    ) -> None:
        self.clock = clock
        self._model = model
        self._chat = chat
        self._show_thoughts = show_thoughts
        self._context = list(prompt)
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._logprobs: list[PositionLogprobs] = []
        self._n_told = 0  # calls
        self._finished: Finished | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, PromptLogprobs):
            return
        if isinstance(event, Finished):
            self._finished = event
            return
        self.clock.first = self.clock.first or time.monotonic_ns()
        self._context += event.token_ids
        self._text.append(event.text)
        self._calls += event.calls
        self._logprobs += event.logprobs
        if self._show_thoughts:
            self._thoughts.append(event.reasoning)

    def line(self) -> dict[str, Any] | None:
        """What is new, as a line of a stream; None if that is nothing. It is not told again."""
        text, thoughts = "".join(self._text), "".join(self._thoughts)
        if not (text or thoughts or self._calls or self._logprobs):
            return None
        told = self._head(text, thoughts) | {"done": False} | self._told_logprobs()
        self._text, self._thoughts, self._logprobs = [], [], []
        return told

    def last(self) -> dict[str, Any]:
        """The object that ends the answer: with all of it, or with what no line has told yet."""
        finished = self._finished
        usage = finished.usage if finished else Usage(0, 0, 0)
        reason = str(finished.reason) if finished else "stop"
        told = self._head("".join(self._text), "".join(self._thoughts))
        told |= {"done": True, "done_reason": reason}
        if not self._chat:
            told["context"] = self._context
        counts = {"prompt_eval_count": usage.prompt_tokens, "eval_count": usage.completion_tokens}
        return told | self.clock.durations() | counts | self._told_logprobs()

    def bare(self, reason: str) -> dict[str, Any]:
        """The answer to a request that only loads or unloads."""
        return self._head("", "") | {"done": True, "done_reason": reason}

    def _head(self, text: str, thoughts: str) -> dict[str, Any]:
        head: dict[str, Any] = {"model": self._model, "created_at": timestamp()}
        thinking = {"thinking": thoughts} if thoughts else {}
        if not self._chat:
            return head | {"response": text} | thinking
        calls = self._told_calls()
        message = {"role": "assistant", "content": text} | thinking
        return head | {"message": message | ({"tool_calls": calls} if calls else {})}

    def _told_calls(self) -> list[dict[str, Any]]:
        made = []
        for call in tool_calls(self._calls, numbered=False):
            function = call["function"]
            arguments = {"index": self._n_told, "name": function["name"], "arguments": _object(function["arguments"])}
            made.append({"id": call["id"], "function": arguments})
            self._n_told += 1
        self._calls = []
        return made

    def _told_logprobs(self) -> dict[str, Any]:
        if not self._logprobs:
            return {}
        told = []
        for position in self._logprobs:
            one = _logprob(position.chosen)
            told.append(one | ({"top_logprobs": [_logprob(t) for t in position.top]} if position.top else {}))
        return {"logprobs": told}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, LOWEST), "bytes": list(token.raw)}


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. What a parser has let through is JSON; a model's number may still be no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}
