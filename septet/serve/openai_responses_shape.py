"""The response object of /v1/responses and the events of its stream, from a session's events.

Used by `openai_responses.py`: one `Answer` per response. Items (thoughts, message, calls) open and close as the text
changes its kind; the object at the end holds what the events told. Knows nothing of HTTP.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.serve.shapes import openai_token
from septet.session.events import Event, Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from septet.serve.openai_responses_call import ResponsesCall
    from septet.session.events import PositionLogprobs, ToolCallDelta, Usage

__all__ = ["Answer"]

Told = dict[str, Any]
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class Answer:
    """Feed it the events of the one choice; it yields the stream's events and keeps `body`."""

    def __init__(self, call: ResponsesCall, number: str, model: str, created: int) -> None:
        self.call = call
        self._with_logprobs = call.chat.params.logprobs is not None
        self._sequence = 0
        self._open: Told | None = None  # the item that is being written: the last of output
        self._open_call = -1  # its number, if it is a call
        self._texts: list[str] = []  # of the open item
        self._held: tuple[PositionLogprobs, ...] = ()  # of tokens whose text is still to come
        self.body: Told = {
            "id": f"resp_{number}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **call.shown,
        }

    def opening(self) -> Iterator[Told]:
        yield self._event("response.created", response=dict(self.body))
        yield self._event("response.in_progress", response=dict(self.body))

    def feed(self, event: Event) -> Iterator[Told]:
        if isinstance(event, TextDelta):
            if event.reasoning and self.call.chat.include_reasoning:
                yield from self._write("reasoning", event.reasoning, ())
            if event.text:
                yield from self._write("message", event.text, (*self._held, *event.logprobs))
            self._held = () if event.text or event.reasoning or event.calls else (*self._held, *event.logprobs)
            for piece in event.calls:
                yield from self._call(piece)
        elif isinstance(event, Finished):
            yield from self._finish(event)

    def fail(self, error: dict[str, Any]) -> Told:
        """The last event of a stream that broke. error: OpenAI's error object."""
        self.body["status"] = "failed"
        self.body["error"] = {"code": error.get("code") or "server_error", "message": error["message"]}
        return self._event("response.failed", response=self.body)

    # -- items --------------------------------------------------------------------------------------------------------
    def _write(self, kind: str, text: str, logprobs: Iterable[PositionLogprobs]) -> Iterator[Told]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._start(_new_item(kind))
        assert self._open is not None
        self._texts.append(text)
        entries = self._logprobs(logprobs)
        where = {**self._where(), "content_index": 0, "delta": text}
        if kind == "message":
            if self._with_logprobs:
                self._open["content"][0]["logprobs"] += entries
            yield self._event("response.output_text.delta", **where, logprobs=entries)
        else:
            yield self._event("response.reasoning_text.delta", **where)

    def _call(self, piece: ToolCallDelta) -> Iterator[Told]:
        if self._open is None or self._open_call != piece.number:
            yield from self._close()
            yield from self._start(_new_call(piece))
            self._open_call = piece.number
        if piece.arguments:
            self._texts.append(piece.arguments)
            yield self._event("response.function_call_arguments.delta", **self._where(), delta=piece.arguments)

    def _start(self, item: Told) -> Iterator[Told]:
        self._open = item
        self.body["output"].append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield self._event("response.output_item.added", output_index=len(self.body["output"]) - 1, item=shown)
        if item["type"] in _PARTS:
            part = dict(item["content"][0])
            yield self._event("response.content_part.added", **self._where(), content_index=0, part=part)

    def _close(self, status: str = "completed") -> Iterator[Told]:
        item, text = self._open, "".join(self._texts)
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event(
                "response.function_call_arguments.done", **self._where(), name=item["name"], arguments=text
            )
        else:
            part = item["content"][0]
            part["text"] = text
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            name = f"response.{_PARTS[item['type']]}.done"
            yield self._event(name, **self._where(), content_index=0, text=text, **more)
            yield self._event("response.content_part.done", **self._where(), content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self.body["output"]) - 1, item=item)
        self._open, self._open_call, self._texts = None, -1, []

    def _finish(self, finished: Finished) -> Iterator[Told]:
        cut = finished.reason is FinishReason.LENGTH
        if not self.body["output"]:
            yield from self._start(_new_item("message"))
        yield from self._close("incomplete" if cut else "completed")
        self.body["status"] = "incomplete" if cut else "completed"
        self.body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.body["usage"] = _usage(finished.usage)
        yield self._event("response.incomplete" if cut else "response.completed", response=self.body)

    def _where(self) -> Told:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.body["output"]) - 1}

    def _logprobs(self, positions: Iterable[PositionLogprobs]) -> list[Told]:
        if not self._with_logprobs:
            return []
        return [openai_token(p.chosen) | {"top_logprobs": [openai_token(t) for t in p.top]} for p in positions]

    def _event(self, kind: str, **fields: Any) -> Told:
        told = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return told


def _new_item(kind: str) -> Told:
    if kind == "reasoning":
        part: Told = {"type": "reasoning_text", "text": ""}
        return {"id": f"rs_{secrets.token_hex(12)}", "type": kind, "summary": [], "content": [part]}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": kind,
        "status": "in_progress",
        "role": "assistant",
        "content": [part],
    }


def _new_call(piece: ToolCallDelta) -> Told:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": "in_progress",
        "call_id": piece.id,
        "name": piece.name,
        "arguments": "",
    }


def _usage(usage: Usage) -> Told:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
