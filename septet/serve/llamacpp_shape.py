"""llama.cpp's completion objects, whole and in parts, from a session's events.

Used by `llamacpp.py`. One `Completion` per choice. Knows nothing of HTTP or engines; times are handed to it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.session.events import Finished, TextDelta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.serve.llamacpp_call import CompletionCall
    from septet.session.events import Event, PositionLogprobs, TokenLogprob
    from septet.session.session import Prompt

__all__ = ["Completion", "chosen_fields"]

LOWEST = -9999.0  # JSON has no infinity


class Completion:
    """Call `feed` with each event; `part` tells it in a stream, `whole` all of them at the end."""

    def __init__(
        self, call: CompletionCall, index: int, prompt: Prompt, text: str, model: str, max_model_len: int
    ) -> None:
        self._call = call
        self._index = index
        self._prompt = prompt
        self._head = {"prompt": text, "model": model}
        self._limit = max_model_len
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._probs: list[dict[str, Any]] = []
        self._began = self._first = time.monotonic()
        self._finished: Finished | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            if not self._tokens:
                self._first = time.monotonic()
            self._texts.append(event.text)
            self._tokens += event.token_ids
            self._probs += _probabilities(event.logprobs)
        elif isinstance(event, Finished):
            self._finished = event

    def part(self, event: Event) -> dict[str, Any] | None:
        """The next object of a stream, None where there is nothing to tell."""
        if isinstance(event, Finished):
            return self.whole(stream=True)
        if not isinstance(event, TextDelta) or self._call.only_prompt:
            return None
        told: dict[str, Any] = {"index": self._index, "content": event.text, "tokens": event.token_ids, "stop": False}
        told |= {"id_slot": -1, "tokens_predicted": len(self._tokens), "tokens_evaluated": len(self._prompt.tokens)}
        if event.logprobs:
            told["completion_probabilities"] = _probabilities(event.logprobs)
        return told | ({"timings": self._timings(0)} if self._call.timings else {})

    def whole(self, *, stream: bool = False) -> dict[str, Any]:
        """The last object of a stream has all but the text, which was told."""
        finished, call = self._finished, self._call
        assert finished is not None
        usage, none = finished.usage, call.only_prompt
        text = "" if stream or none else "".join(self._texts)
        kind, word = _stop_type(finished)
        told = {
            "index": self._index,
            "content": text,
            "tokens": self._tokens if call.return_tokens and not stream and not none else [],
            "id_slot": -1,
            "stop": True,
            **self._head,
            "tokens_predicted": 0 if none else usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": call.settings | {"n_ctx": self._limit},
            "has_new_line": "\n" in text,
            "truncated": kind == "limit" and usage.prompt_tokens + usage.completion_tokens >= self._limit,
            "stop_type": kind,
            "stopping_word": word,
            "tokens_cached": usage.cached_tokens,
            "timings": self._timings(usage.cached_tokens),
        }
        if self._probs and not stream and not none:
            told["completion_probabilities"] = self._probs
        return told

    def _timings(self, cached: int) -> dict[str, Any]:
        now = time.monotonic()
        n_prompt, n_made = len(self._prompt.tokens) - cached, len(self._tokens)
        prompt_ms, made_ms = 1000 * (self._first - self._began), 1000 * (now - self._first)
        return {
            "cache_n": cached,
            **_speed("prompt", n_prompt, prompt_ms),
            **_speed("predicted", 0 if self._call.only_prompt else n_made, made_ms),
        }


def _speed(name: str, n: int, ms: float) -> dict[str, Any]:
    per_token, per_second = ms / n if n else 0.0, 1000 * n / ms if ms > 0 else 0.0
    return {
        f"{name}_n": n,
        f"{name}_ms": round(ms, 3),
        f"{name}_per_token_ms": round(per_token, 3),
        f"{name}_per_second": round(per_second, 3),
    }


def _stop_type(finished: Finished) -> tuple[str, str]:
    if finished.reason is FinishReason.LENGTH:
        return "limit", ""
    return ("word", finished.stop_reason) if isinstance(finished.stop_reason, str) else ("eos", "")


def _probabilities(positions: Sequence[PositionLogprobs]) -> list[dict[str, Any]]:
    return [_token(p.chosen) | {"top_logprobs": [_token(token) for token in p.top]} for p in positions]


def _token(token: TokenLogprob) -> dict[str, Any]:
    told = {"id": token.token_id, "token": token.text, "bytes": list(token.raw)}
    return told | {"logprob": max(token.logprob, LOWEST)}


def chosen_fields(answer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Only these; "a/b" is the field b of the object a, told at the top. No names: all."""
    if not names:
        return answer
    told: dict[str, Any] = {}
    for name in names:
        outer, _, inner = name.partition("/")
        value = answer.get(outer)
        if inner and isinstance(value, dict):
            told |= {inner: value[inner]} if inner in value else {}
        elif not inner and outer in answer:
            told[outer] = value
    return told
