"""SGLang's answer objects from a session's events: a part of a stream holds all that was made so far.

Used by `sglang.py`. One `Output` per choice. Knows nothing of HTTP or engines.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.session.events import Finished, PromptLogprobs, TextDelta

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from septet.serve.sglang_call import GenerateCall
    from septet.session.events import Event, PositionLogprobs, TokenLogprob
    from septet.session.session import Prompt

__all__ = ["Output"]

LOWEST = -9999.0  # JSON has no infinity
GROWTH = 128
"""A part is told once the output has grown by one in so many: what is told again each time stays bounded."""


class Output:
    """Call `feed` with each event; `due` says whether a stream should tell `answer` now."""

    def __init__(self, call: GenerateCall, index: int, number: str, prompt: Prompt, ends: Collection[int]) -> None:
        self._call = call
        self._index = index
        self._number = number
        self._prompt = prompt
        self._ends = ends
        self._began = time.monotonic()
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._input: tuple[PositionLogprobs | None, ...] = ()
        self._finished: Finished | None = None
        self._told = 0  # tokens of the last part

    def feed(self, event: Event) -> None:
        if isinstance(event, PromptLogprobs):
            self._input = event.positions
        elif isinstance(event, Finished):
            self._finished = event
        elif not self._call.only_prompt:
            self._texts.append(event.text)
            self._tokens += event.token_ids
            self._logprobs += event.logprobs

    def due(self, event: Event) -> bool:
        if isinstance(event, TextDelta):
            return len(self._tokens) - self._told > self._told // GROWTH
        return isinstance(event, Finished)

    def answer(self) -> dict[str, Any]:
        self._told = len(self._tokens)
        told: dict[str, Any] = {"text": "".join(self._texts), "output_ids": self._tokens, "meta_info": self._meta()}
        return told | ({"index": self._index} if self._call.stream and self._call.in_array else {})

    def _meta(self) -> dict[str, Any]:
        finished = self._finished
        told: dict[str, Any] = {
            "id": self._number,
            "finish_reason": None if finished is None else self._reason(finished),
            "prompt_tokens": len(self._prompt.tokens),
            "completion_tokens": len(self._tokens),
            "cached_tokens": 0 if finished is None else finished.usage.cached_tokens,
            "weight_version": "default",
            "e2e_latency": round(time.monotonic() - self._began, 6),
        }
        if self._call.logprobs:
            told |= self._output_logprobs()
            told |= self._input_logprobs() if finished is not None else {}
        return told

    def _reason(self, finished: Finished) -> dict[str, Any]:
        if finished.reason is FinishReason.LENGTH:
            return {"type": "length", "length": 0 if self._call.only_prompt else finished.usage.completion_tokens}
        matched: Any = finished.stop_reason
        if matched is None and self._tokens and self._tokens[-1] in self._ends:
            matched = self._tokens[-1]
        return {"type": "stop", "matched": matched}

    def _output_logprobs(self) -> dict[str, Any]:
        told: dict[str, Any] = {"output_token_logprobs": [self._pair(p.chosen) for p in self._logprobs]}
        if self._call.params.logprobs:
            told["output_top_logprobs"] = [self._top(p.top) for p in self._logprobs]
        return told

    def _input_logprobs(self) -> dict[str, Any]:
        start = self._call.input_from
        if start is None:
            return {"input_token_logprobs": []}
        tokens = self._prompt.tokens
        told = [[None, tokens[i], None] if p is None else self._pair(p.chosen) for i, p in enumerate(self._input)]
        result: dict[str, Any] = {"input_token_logprobs": told[start:]}
        if self._call.params.prompt_logprobs:
            result["input_top_logprobs"] = [None if p is None else self._top(p.top) for p in self._input][start:]
        return result

    def _top(self, tokens: Iterable[TokenLogprob]) -> list[list[Any]]:
        return [self._pair(token) for token in tokens]

    def _pair(self, token: TokenLogprob) -> list[Any]:
        return [max(token.logprob, LOWEST), token.token_id, token.text if self._call.texts else None]
