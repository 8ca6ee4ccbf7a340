"""What a generation tells whoever asked: plain dataclasses, one stream of them per prompt.

Made by `session/choice.py` and `session/session.py`, read by the Python API, the HTTP dialects and the terminal. They
carry text beside token ids; no API's JSON shape may leak in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septet.request import FinishReason

__all__ = [
    "Event",
    "Finished",
    "PositionLogprobs",
    "PromptLogprobs",
    "TextDelta",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate token at one position."""

    token_id: int
    text: str  # the token's own bytes as UTF-8, with U+FFFD where they are not whole characters
    raw: bytes  # its exact bytes
    logprob: float  # natural logarithm
    rank: int  # 1 = most likely


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    chosen: TokenLogprob  # the sampled (or, in a prompt, the given) token
    top: tuple[TokenLogprob, ...] = ()  # the likeliest, best first; may or may not hold `chosen`


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one choice. The prompt is counted once per choice; a surface that sums choices counts it once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, served by the prefix cache
    reasoning_tokens: int = 0  # of the completion, where thoughts are told apart
    pinned: tuple[int, ...] = ()  # of the prompt, held by each pin that was asked for; 0 = it holds none


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Once per prompt, before its first text, if asked for. Position 0 has no prediction: None."""

    index: int
    positions: tuple[PositionLogprobs | None, ...]  # (prompt_tokens,)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one tool call. The pieces of a call, joined, are the JSON text of its arguments."""

    number: int  # of the call within its choice, from 0
    name: str | None  # of the function, with the first piece only
    arguments: str
    id: str | None = None  # made by us, with the first piece only


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New output of choice `index`. `text` may be empty: it is held back while it could still change or be a stop."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()  # one per token, when asked for
    reasoning: str = ""  # thoughts, where the session was asked to tell them apart
    calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of choice `index`. `stop_reason`: the stop string or stop id that matched, None otherwise."""

    index: int
    reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    n_calls: int = 0  # complete tool calls
    waited_s: float | None = None  # in the engine's queue; None: no token came
    prefill_s: float = 0.0  # from there to the first token


Event = PromptLogprobs | TextDelta | Finished
