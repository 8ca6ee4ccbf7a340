"""What the engine takes in: each refusal names the field and the way out. Pure functions over one request.

Called by `Scheduler.submit`. The values of `SamplingParams` were checked when it was made; here they meet this engine's
vocabulary, lengths and pool.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.request import Request

__all__ = ["SchedulerLimits", "check_tokens", "output_limit", "stop_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes of one engine. max_num_batched_tokens >= max_num_seqs, so that decoding rows never crowd out prefill."""

    max_num_seqs: int  # rows
    max_num_batched_tokens: int  # tokens per step
    max_model_len: int  # tokens per sequence, output included
    max_waiting: int = 4096  # queued requests

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len must hold a prompt token and an output token, not {self.max_model_len}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence computes a token per step"
            )


def check_tokens(request: Request, limits: SchedulerLimits, vocab_size: int, capacity: int) -> array[int]:
    """The prompt as an array of int32. InvalidRequest if this engine can't run the request."""
    n_prompt = len(request.tokens)
    if n_prompt == 0:
        raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
    if n_prompt + 1 > limits.max_model_len:
        raise InvalidRequest(
            f"the prompt has {n_prompt} tokens, but this model's context is {limits.max_model_len} tokens and at "
            "least one is needed for the answer: shorten the prompt",
            param="prompt",
        )
    if n_prompt > capacity:
        raise InvalidRequest(
            f"the prompt has {n_prompt} tokens, but the KV pool holds {capacity}: shorten the prompt or start the "
            "engine with more KV memory",
            param="prompt",
        )
    try:
        tokens = array("i", request.tokens)
    except (TypeError, OverflowError):
        raise InvalidRequest("the prompt must be token ids (integers below 2**31)", param="prompt") from None
    _check_ids("prompt", tokens, vocab_size)
    _check_ids("eos_token_ids", request.eos_token_ids, vocab_size)
    _check_ids("stop_token_ids", request.params.stop_token_ids, vocab_size)
    _check_ids("logit_bias", request.params.logit_bias, vocab_size)
    return tokens


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    low, high = min(ids, default=0), max(ids, default=0)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"{name} names token id {bad}, which is outside the vocabulary (0 .. {vocab_size - 1})", param=name
        )


def output_limit(request: Request, limits: SchedulerLimits, capacity: int) -> int:
    """Prompt and output tokens at which the request ends by length.

    The last token is never computed, so a pool of `capacity` slots carries capacity + 1 tokens. `max_tokens` None
    means the context's end.
    """
    end = min(limits.max_model_len, capacity + 1)
    if request.params.max_tokens is None:
        return end
    return min(len(request.tokens) + request.params.max_tokens, end)


def stop_ids(request: Request) -> frozenset[int]:
    """Ids that end the generation, once min_tokens are out."""
    eos = () if request.params.ignore_eos else request.eos_token_ids
    return frozenset((*eos, *request.params.stop_token_ids))
