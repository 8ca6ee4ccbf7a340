"""A budget for thinking: where it is used up, the end of the thoughts is written for the model and it goes on.

Called by `Session`. To the engine the rest is a new request whose prompt is all so far; the prefix cache has its keys
and values, so nothing is computed twice. What it costs: penalties and min_tokens see the thoughts as prompt from there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from septet.engine.messages import Update
from septet.request import FinishReason, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.text.parsers.dialects import ReasoningDialect
    from septet.text.tokenizer import Tokenizer

__all__ = ["end_of_thoughts"]


def end_of_thoughts(
    request: Request, made: Sequence[int], thoughts: ReasoningDialect | None, tokenizer: Tokenizer, number: str
) -> tuple[Update, Request | None]:
    """(the update that tells the written end, the request that goes on or None where no token is left for it)."""
    assert thoughts is not None
    assert request.params.max_tokens is not None
    close = tuple(tokenizer.encode(f"\n{thoughts.close}\n\n", add_special_tokens=False))
    left = request.params.max_tokens - len(made) - len(close)
    if left < 1:
        return Update(request.id, tokens=close[: left + len(close)], finish_reason=FinishReason.LENGTH), None
    structured = request.params.structured
    params = replace(
        request.params,
        max_tokens=left,
        min_tokens=min(left, max(0, request.params.min_tokens - len(made) - len(close))),
        prompt_logprobs=None,
        structured=replace(structured, after=None, opening=None) if structured else None,
    )
    tokens = (*request.tokens, *made, *close)
    return Update(request.id, tokens=close), replace(request, id=number, tokens=tokens, params=params)
