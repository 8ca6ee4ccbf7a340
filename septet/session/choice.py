"""One choice of a generation as a pure machine: engine updates in, text events out.

Owns detokenising, stop strings, min_tokens and the text of log-probabilities for a single engine request; called by
`Session`. Knows no client, no asyncio: any way of cutting the same tokens into updates gives the same text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.errors import (
    EngineDead,
    InvalidRequest,
    ModelFileError,
    OutOfMemory,
    Overloaded,
    SeptetError,
    UnsupportedModel,
)
from septet.request import FinishReason
from septet.session.events import Event, Finished, PositionLogprobs, PromptLogprobs, TextDelta, TokenLogprob, Usage
from septet.text.detokenize import Detokenizer
from septet.text.stops import StopMatcher

if TYPE_CHECKING:
    from septet.engine.messages import Update
    from septet.request import SamplingParams
    from septet.step import Logprobs
    from septet.text.tokenizer import Tokenizer

__all__ = ["Choice", "error_of", "token_logprob"]

_ERRORS: dict[str, type[SeptetError]] = {
    error.kind: error
    for error in (EngineDead, InvalidRequest, ModelFileError, OutOfMemory, Overloaded, UnsupportedModel)
}


def error_of(update: Update) -> SeptetError:
    """The typed error that an update with `finish_reason` ERROR stands for."""
    message = update.error or "the engine ended this request with an error"
    return _ERRORS.get(update.error_kind, SeptetError)(message, param=update.error_param)


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> TokenLogprob:
    raw = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""  # rows that pad an embedding
    return TokenLogprob(token, raw.decode("utf-8", "replace"), raw, logprob, rank)


def _position(tokenizer: Tokenizer, entry: Logprobs) -> PositionLogprobs:
    chosen = token_logprob(tokenizer, entry.token, entry.logprob, entry.rank)
    top = tuple(token_logprob(tokenizer, token, lp, rank) for rank, (token, lp) in enumerate(entry.top, start=1))
    return PositionLogprobs(chosen, top)


class Choice:
    """Call `feed` with each update in order until `finished`. A stop string may finish it before the engine does."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_tokens: int,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self.index = index
        self.finished = False
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, keep=keep)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._pinned: tuple[int, ...] = ()
        self._waited_s: float | None = None
        self._prefill_s = 0.0
        self._n_output = 0
        self._prompt: list[PositionLogprobs | None] = [None]

    def feed(self, update: Update) -> list[Event]:
        """Events of one update, in order. Raises the typed error of an update that carries one."""
        if update.finish_reason is FinishReason.ERROR:
            raise error_of(update)
        if not self._n_output:  # a request that goes on after a cut finds its own output in the cache
            self._cached_tokens = max(self._cached_tokens, update.cached_tokens)
            if update.tokens:
                self._pinned, self._waited_s, self._prefill_s = update.pinned, update.waited_s, update.prefill_s
        events = self._prompt_events(update)
        text, n_taken, stop = self._take(update)
        reason = update.finish_reason
        stop_reason: str | int | None = self._stop_id(update)
        if stop is not None:
            reason, stop_reason = FinishReason.STOP, stop
        elif reason is not None:
            tail, stop = self._tail()
            text += tail
            if stop is not None:
                reason, stop_reason = FinishReason.STOP, stop
        if n_taken or text:
            events.append(TextDelta(self.index, text, update.tokens[:n_taken], self._logprobs(update, n_taken)))
        if reason is not None:
            events.append(self.end(reason, stop_reason))
        return events

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> Finished:
        """The last event, also where it is not the engine that ends the choice."""
        self.finished = True
        usage = Usage(self._prompt_tokens, self._n_output, self._cached_tokens, pinned=self._pinned)
        return Finished(self.index, reason, stop_reason, usage, waited_s=self._waited_s, prefill_s=self._prefill_s)

    def _take(self, update: Update) -> tuple[str, int, str | None]:
        """Turn tokens into text up to the first stop string: (text, tokens used, stop string or None)."""
        parts: list[str] = []
        n_visible = len(update.tokens)
        if update.stop_token is not None and not self._params.include_stop_str_in_output:
            n_visible -= 1  # the id that ended it is output, but not text
        for i, token in enumerate(update.tokens):
            self._n_output += 1
            if i >= n_visible:
                continue
            text, stop = self._match(self._detokenizer.push((token,)))
            parts.append(text)
            if stop is not None:
                return "".join(parts), i + 1, stop
        return "".join(parts), len(update.tokens), None

    def _match(self, text: str) -> tuple[str, str | None]:
        if self._matcher is None or self._n_output <= self._params.min_tokens:
            return text, None
        return self._matcher.push(text)

    def _tail(self) -> tuple[str, str | None]:
        """What was held back, at the end: an unfinished character, the start of a stop string."""
        text, stop = self._match(self._detokenizer.finish())
        if stop is None and self._matcher is not None:
            text += self._matcher.finish()
        return text, stop

    def _stop_id(self, update: Update) -> int | None:
        return update.stop_token if update.stop_token in self._params.stop_token_ids else None

    def _logprobs(self, update: Update, n: int) -> tuple[PositionLogprobs, ...]:
        if self._params.logprobs is None:
            return ()
        return tuple(_position(self._tokenizer, entry) for entry in update.logprobs[:n])

    def _prompt_events(self, update: Update) -> list[Event]:
        """Parts of the prompt's log-probabilities are gathered and given once, before the first output."""
        if self._params.prompt_logprobs is None or self._n_output:
            return []
        self._prompt.extend(_position(self._tokenizer, entry) for entry in update.prompt_logprobs)
        if not update.tokens and update.finish_reason is None:
            return []
        return [PromptLogprobs(self.index, tuple(self._prompt))]
