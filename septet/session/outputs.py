"""What the Python API returns, in vLLM's terms: `RequestOutput` with its `CompletionOutput`s.

Filled by `llm.py` from a session's events; plain data for the caller, known to nothing else in Septet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.session.events import Event, Finished, PositionLogprobs, PromptLogprobs, TextDelta, ToolCallDelta

if TYPE_CHECKING:
    from septet.session.session import Prompt

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "ToolCall"]


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float  # natural logarithm
    rank: int  # 1 = most likely
    decoded_token: str


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""  # a JSON object


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""  # without what `reasoning` and `tool_calls` hold, where these are told apart
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # sum over the chosen tokens, when logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # one per token: chosen and top alternatives by token id
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add_calls(self, pieces: tuple[ToolCallDelta, ...]) -> None:
        for piece in pieces:
            if piece.number == len(self.tool_calls):
                self.tool_calls.append(ToolCall(piece.id or "", piece.name or ""))
            self.tool_calls[piece.number].arguments += piece.arguments


@dataclass(slots=True)
class RequestOutput:
    request_id: str  # the prompt's number within the call
    prompt: str | None  # text, after the chat template; None for a prompt of token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False

    @classmethod
    def empty(cls, request_id: str, prompt: Prompt, n: int) -> RequestOutput:
        return cls(request_id, prompt.text, list(prompt.tokens), [CompletionOutput(i) for i in range(n)])

    def add(self, event: Event) -> None:
        """Take in the next event of this prompt."""
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs = [None if p is None else _by_id(p) for p in event.positions]
            return
        output = self.outputs[event.index]
        if isinstance(event, TextDelta):
            output.text += event.text
            output.reasoning += event.reasoning
            output.add_calls(event.calls)
            output.token_ids.extend(event.token_ids)
            if event.logprobs:
                output.logprobs = output.logprobs if output.logprobs is not None else []
                output.logprobs.extend(_by_id(p) for p in event.logprobs)
                chosen = sum(p.chosen.logprob for p in event.logprobs)
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen
        elif isinstance(event, Finished):
            output.finish_reason = str(event.reason)
            output.stop_reason = event.stop_reason
            if event.index == 0:
                self.num_cached_tokens = event.usage.cached_tokens
            self.finished = all(o.finish_reason is not None for o in self.outputs)


def _by_id(position: PositionLogprobs) -> dict[int, Logprob]:
    return {t.token_id: Logprob(t.logprob, t.rank, t.text) for t in (position.chosen, *position.top)}
