"""OpenAI's answer objects, whole and in chunks, from a session's events.

Used by `openai.py`. One `Shape` per response: chat or text completion; both turn the same events into their own JSON.
Knows nothing of HTTP, engines or how the events came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.session.events import (
    Event,
    Finished,
    PositionLogprobs,
    PromptLogprobs,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from septet.serve.calls import Call, ChatCall, CompletionCall
    from septet.session.session import Prompt

__all__ = ["ChatShape", "CompletionShape", "Shape", "openai_token"]

LOWEST = -9999.0  # JSON has no infinity; the value OpenAI uses


@dataclass(slots=True)
class _Whole:
    """One choice being gathered for an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    finished: Finished | None = None


class Shape:
    """Common to both: numbering of choices (prompt number * n + index), usage, gathering."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, call: Call, model: str, prompts: list[Prompt], number: str, created: int) -> None:
        self.call = call
        self.prompts = prompts
        self.usages: dict[int, Usage] = {}
        self._head = {"id": f"{self.prefix}-{number}", "created": created, "model": model}
        self._prompt_logprobs: dict[int, tuple[PositionLogprobs | None, ...]] = {}
        self._n_output: dict[int, int] = {}  # tokens told so far, per choice of a stream
        self._choices = [_Whole() for _ in range(len(prompts) * call.params.n)]

    # -- whole --------------------------------------------------------------------------------------------------------
    def add(self, number: int, event: Event) -> None:
        """Take in the next event of prompt `number`."""
        choice = self._choices[number * self.call.params.n + event.index]
        if isinstance(event, TextDelta):
            choice.text.append(event.text)
            choice.token_ids.extend(event.token_ids)
            choice.logprobs.extend(event.logprobs)
            choice.reasoning.append(event.reasoning)
            choice.calls.extend(event.calls)
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs[number] = event.positions
        else:
            choice.finished = event
            self._note(number, event)

    def whole(self) -> dict[str, Any]:
        choices = [self.whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage(), **self.extra()}

    def whole_choice(self, index: int, choice: _Whole) -> dict[str, Any]:
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """Fields of the whole answer beside OpenAI's."""
        return {}

    # -- chunks -------------------------------------------------------------------------------------------------------
    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first event."""
        return iter(())

    def chunk(self, number: int, event: Event) -> dict[str, Any] | None:
        """The chunk of one event, None where it has nothing to tell."""
        index = number * self.call.params.n + event.index
        if isinstance(event, PromptLogprobs):
            self._prompt_logprobs[number] = event.positions
            return None
        if isinstance(event, Finished):
            self._note(number, event)
            return self._wrap(self.last_choice(index, event))
        self._n_output[index] = self._n_output.get(index, 0) + len(event.token_ids)
        told = event.text or event.logprobs or event.calls or event.reasoning
        if not told and not self.call.return_token_ids:
            return None
        return self._wrap(self.delta_choice(index, event))

    def delta_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        raise NotImplementedError

    def last_choice(self, index: int, finished: Finished) -> dict[str, Any]:
        raise NotImplementedError

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage()}

    def _wrap(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        if self.call.include_usage:
            chunk["usage"] = self._usage_so_far(choice["index"]) if self.call.usage_in_chunks else None
        return chunk

    def _usage_so_far(self, index: int) -> dict[str, int]:
        """Of one choice, as vLLM's continuous_usage_stats."""
        prompt = len(self.prompts[index // self.call.params.n].tokens)
        output = self.usages[index].completion_tokens if index in self.usages else self._n_output.get(index, 0)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    # -- usage --------------------------------------------------------------------------------------------------------
    def _note(self, number: int, finished: Finished) -> None:
        self.usages[number * self.call.params.n + finished.index] = finished.usage

    def usage(self) -> dict[str, Any]:
        """Each prompt once (its first choice), every choice's output."""
        n = self.call.params.n
        prompt = sum(len(p.tokens) for p in self.prompts)
        output = 0 if self._drops_output() else sum(u.completion_tokens for u in self.usages.values())
        cached = sum(u.cached_tokens for i, u in self.usages.items() if i % n == 0)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if thoughts := sum(u.reasoning_tokens for u in self.usages.values()):
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage

    def _drops_output(self) -> bool:
        return False

    def prompt_logprobs(self, number: int) -> list[dict[str, Any] | None] | None:
        """vLLM's form: per position, by token id. None unless asked for."""
        positions = self._prompt_logprobs.get(number)
        if positions is None or self.call.params.prompt_logprobs is None:
            return None
        return [None if p is None else {str(t.token_id): _plain(t) for t in (p.chosen, *p.top)} for p in positions]


class ChatShape(Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    call: ChatCall

    def __init__(self, *args: Any, echoed: str = "") -> None:
        super().__init__(*args)
        self._echoed = echoed

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self.call.params.n):
            delta = {"role": "assistant", "content": self._echoed}
            chunk = self._wrap({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
            if self.call.return_token_ids:
                chunk["prompt_token_ids"] = self.prompts[0].tokens
            yield chunk

    def delta_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        told: dict[str, Any] = self._thoughts(delta.reasoning)
        if delta.calls:
            told["tool_calls"] = tool_calls(delta.calls, numbered=True)
        if delta.text or not told:
            told["content"] = delta.text
        choice: dict[str, Any] = {"index": index, "delta": told}
        choice["logprobs"] = self._logprobs(delta.logprobs)
        choice["finish_reason"] = None
        if self.call.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def last_choice(self, index: int, finished: Finished) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None, **_reasons(finished)}

    def whole_choice(self, index: int, choice: _Whole) -> dict[str, Any]:
        content = self._echoed + "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= self._thoughts("".join(choice.reasoning))
        if choice.calls:
            message |= {"content": content or None, "tool_calls": tool_calls(choice.calls, numbered=False)}
        result = {"index": index, "message": message, "logprobs": self._logprobs(choice.logprobs)}
        result |= _reasons(choice.finished)
        return result | ({"token_ids": choice.token_ids} if self.call.return_token_ids else {})

    def _thoughts(self, text: str) -> dict[str, Any]:
        """Under the name that vLLM gives it now and the one that most clients know."""
        return {"reasoning": text, "reasoning_content": text} if text and self.call.include_reasoning else {}

    def extra(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.call.return_token_ids:
            result["prompt_token_ids"] = self.prompts[0].tokens
        if self.call.params.prompt_logprobs is not None:
            result["prompt_logprobs"] = self.prompt_logprobs(0)
        return result

    def _logprobs(self, positions: Iterable[PositionLogprobs]) -> dict[str, Any] | None:
        if self.call.params.logprobs is None:
            return None
        entries = [openai_token(p.chosen) | {"top_logprobs": [openai_token(t) for t in p.top]} for p in positions]
        return {"content": entries, "refusal": None}


class CompletionShape(Shape):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    call: CompletionCall

    def __init__(self, *args: Any, echoed: list[str], first_texts: list[str]) -> None:
        super().__init__(*args)
        self._echoed = echoed  # text of each prompt, where echo was asked for
        self._first_texts = first_texts  # of each prompt's first token, which has no prediction
        self._offsets = [0] * len(self._choices)  # characters given so far, per choice

    def opening(self) -> Iterator[dict[str, Any]]:
        """The echo, unless its log-probabilities have to come with it (see `delta_choice`)."""
        if not self._echoed or self.call.params.logprobs is not None:
            return
        for index in range(len(self._choices)):
            yield self._wrap(self._choice(index, self._echoed[index // self.call.params.n], (), None))

    def delta_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        text, positions = self._with_echo(index, delta.text, delta.logprobs)
        choice = self._choice(index, text, positions, None)
        if self.call.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if self._n_output[index] == len(delta.token_ids):  # the first of this choice
                choice["prompt_token_ids"] = self.prompts[index // self.call.params.n].tokens
        return choice

    def last_choice(self, index: int, finished: Finished) -> dict[str, Any]:
        return self._choice(index, "", (), finished)

    def whole_choice(self, index: int, choice: _Whole) -> dict[str, Any]:
        text = "".join(choice.text)
        positions: tuple[PositionLogprobs | None, ...] = tuple(choice.logprobs)
        if self.call.only_prompt:
            text, positions, choice.token_ids = "", (), []
        if self._echoed:
            text, positions = self._echo(index, text, positions)
        result = self._choice(index, text, positions, choice.finished)
        number = index // self.call.params.n
        if self.call.return_token_ids:
            result |= {"token_ids": choice.token_ids, "prompt_token_ids": self.prompts[number].tokens}
        if self.call.params.prompt_logprobs is not None:
            result["prompt_logprobs"] = self.prompt_logprobs(number)
        return result

    def _choice(
        self, index: int, text: str, positions: tuple[PositionLogprobs | None, ...], finished: Finished | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, positions),
            "finish_reason": finished and ("length" if self.call.only_prompt else finished.reason),
            "stop_reason": finished and finished.stop_reason,
        }

    def _with_echo(
        self, index: int, text: str, positions: tuple[PositionLogprobs, ...]
    ) -> tuple[str, tuple[PositionLogprobs | None, ...]]:
        """Streaming with echo and logprobs: the first delta of a choice carries the prompt as well."""
        if self.call.only_prompt:
            text, positions = "", ()
        first = self._echoed and self.call.params.logprobs is not None and not self._offsets[index]
        return self._echo(index, text, positions) if first else (text, positions)

    def _echo(
        self, index: int, text: str, positions: tuple[PositionLogprobs | None, ...]
    ) -> tuple[str, tuple[PositionLogprobs | None, ...]]:
        number = index // self.call.params.n
        return self._echoed[number] + text, self._prompt_logprobs.get(number, ()) + positions

    def _drops_output(self) -> bool:
        return self.call.only_prompt

    def _logprobs(self, index: int, positions: tuple[PositionLogprobs | None, ...]) -> dict[str, Any] | None:
        if self.call.params.logprobs is None:
            return None
        tokens: list[str] = []
        offsets: list[int] = []
        for position in positions:
            token = self._first_texts[index // self.call.params.n] if position is None else position.chosen.text
            tokens.append(token)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if p is None else _finite(p.chosen.logprob) for p in positions],
            "top_logprobs": [
                None if p is None else {t.text: _finite(t.logprob) for t in (p.chosen, *p.top)} for p in positions
            ],
            "text_offset": offsets,
        }


def _reasons(finished: Finished | None) -> dict[str, Any]:
    """An answer that ends by itself and calls tools ends because of them."""
    if finished is None:
        return {"finish_reason": None, "stop_reason": None}
    calls = finished.n_calls and finished.reason is FinishReason.STOP
    return {"finish_reason": "tool_calls" if calls else finished.reason, "stop_reason": finished.stop_reason}


def tool_calls(pieces: Iterable[ToolCallDelta], *, numbered: bool) -> list[dict[str, Any]]:
    """Pieces joined by call. `numbered`: as a stream's delta, with the index and without what was told before."""
    calls: dict[int, dict[str, Any]] = {}
    texts: dict[int, list[str]] = {}
    for piece in pieces:
        call = calls.setdefault(piece.number, {"index": piece.number} if numbered else {})
        texts.setdefault(piece.number, []).append(piece.arguments)
        if piece.name is not None:
            call |= {"id": piece.id, "type": "function", "function": {"name": piece.name}}
    for number, call in calls.items():
        call.setdefault("function", {})["arguments"] = "".join(texts[number])
    return list(calls.values())


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def openai_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def _plain(token: TokenLogprob) -> dict[str, Any]:
    return {"logprob": _finite(token.logprob), "rank": token.rank, "decoded_token": token.text}
