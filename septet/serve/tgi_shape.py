"""TGI's answer objects, whole and per token, from a session's events.

Used by `tgi.py`. A stream has one event per token; the last one carries the whole text, so each token waits until it is
known whether another follows. Knows nothing of HTTP or engines.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

from septet.request import FinishReason
from septet.session.events import Finished, PromptLogprobs, TextDelta

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from septet.serve.tgi_call import GenerateCall
    from septet.session.events import Event, PositionLogprobs, TokenLogprob
    from septet.session.session import Prompt

__all__ = ["Answer", "Sequence", "finish_reason", "simple_tokens"]

LOWEST = -9999.0  # JSON has no infinity


class Sequence:
    """One choice. `feed` takes its events; then `finished` is set and the rest can be asked."""

    def __init__(self, call: GenerateCall, prompt: Prompt, special: Collection[int], first_text: str) -> None:
        self._call = call
        self._prompt = prompt
        self._special = special
        self._first_text = first_text  # of the prompt's first token, of which there is no prediction
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._texts: list[str] = [call.inputs] if call.full_text else []
        self._prefill: list[dict[str, Any]] = []
        self._logprob = 0.0  # of all tokens
        self.tokens: list[dict[str, Any]] = []
        self.top: list[list[dict[str, Any]]] = []
        self.finished: Finished | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
            for position in event.logprobs:
                self._logprob += position.chosen.logprob
                self.tokens.append(self._token(position.chosen, self._decoder.decode(position.chosen.raw)))
                self.top.append([self._token(token, token.text) for token in position.top])
        elif isinstance(event, PromptLogprobs):
            self._prefill = [self._prefilled(i, position) for i, position in enumerate(event.positions)]
        else:
            self.finished = event
            if self.tokens:  # a character that never became whole
                self.tokens[-1]["text"] += self._decoder.decode(b"", final=True)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def n_tokens(self) -> int:
        return self.finished.usage.completion_tokens if self.finished is not None else len(self.tokens)

    @property
    def mean_logprob(self) -> float:
        return self._logprob / max(1, len(self.tokens))

    def details(self, seed: int | None) -> dict[str, Any]:
        assert self.finished is not None
        told = {"finish_reason": finish_reason(self.finished), "generated_tokens": self.n_tokens, "seed": seed}
        told |= {"prefill": self._prefill, "tokens": self.tokens}
        return told | ({"top_tokens": self.top} if self._call.top else {})

    def _token(self, token: TokenLogprob, text: str) -> dict[str, Any]:
        special = token.token_id in self._special
        return {"id": token.token_id, "text": text, "logprob": max(token.logprob, LOWEST), "special": special}

    def _prefilled(self, i: int, position: PositionLogprobs | None) -> dict[str, Any]:
        if position is None:
            return {"id": self._prompt.tokens[i], "text": self._first_text, "logprob": None}
        return {
            "id": position.chosen.token_id,
            "text": position.chosen.text,
            "logprob": max(position.chosen.logprob, LOWEST),
        }


def finish_reason(finished: Finished) -> str:
    if finished.reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if finished.stop_reason is None else "stop_sequence"


class Answer:
    """All choices of one request."""

    def __init__(self, call: GenerateCall, prompt: Prompt, special: Collection[int], first_text: str) -> None:
        self.call = call
        self.n_prompt = len(prompt.tokens)
        self.sequences = [Sequence(call, prompt, special, first_text) for _ in range(call.params.n)]
        self._told = 0  # tokens of a stream

    # -- whole
    def whole(self) -> dict[str, Any]:
        """The likeliest sequence per token, and the others beside it."""
        ranked = sorted(enumerate(self.sequences), key=lambda pair: -pair[1].mean_logprob)
        best = ranked[0][1]
        if not self.call.details:
            return {"generated_text": best.text}
        details = best.details(self._seed(ranked[0][0]))
        if len(ranked) > 1:
            others = [{"generated_text": s.text, **s.details(self._seed(i))} for i, s in ranked[1:]]
            details["best_of_sequences"] = others
        return {"generated_text": best.text, "details": details}

    def _seed(self, index: int) -> int | None:
        return None if self.call.seed is None else (self.call.seed + index) % 2**64

    # -- stream
    def tokens(self) -> Iterator[dict[str, Any]]:
        """Events of the tokens that are sure not to be the last, or of all once the sequence has finished."""
        sequence = self.sequences[0]
        until = len(sequence.tokens) if sequence.finished is None else len(sequence.tokens) - 1
        while self._told < until:
            self._told += 1
            yield self._event(self._told - 1)

    def last(self) -> dict[str, Any]:
        sequence = self.sequences[0]
        assert sequence.finished is not None
        told: dict[str, Any] = {"generated_text": sequence.text, "details": None}
        if self.call.details:
            ended = {"finish_reason": finish_reason(sequence.finished), "generated_tokens": sequence.n_tokens}
            told["details"] = ended | {"seed": self._seed(0), "input_length": self.n_prompt}
        return self._event(self._told if self._told < len(sequence.tokens) else -1) | told

    def _event(self, i: int) -> dict[str, Any]:
        sequence = self.sequences[0]
        token = sequence.tokens[i] if i >= 0 else {"id": 0, "text": "", "logprob": 0.0, "special": True}
        told = {"index": i + 1, "token": token, "generated_text": None, "details": None}
        return told | ({"top_tokens": sequence.top[i]} if self.call.top and i >= 0 else {})


def simple_tokens(text: str, tokens: list[tuple[int, bytes]]) -> list[dict[str, Any]]:
    """Each token with the bytes of `text` it stands for; what a tokenizer has added stands for none."""
    raw, at, told = text.encode(), 0, []
    for token, piece in tokens:
        for part in (piece, piece.removeprefix(b" ")):  # a space may have been put before the text
            if part and raw.startswith(part, at):
                start, at = at, at + len(part)
                told.append({"id": token, "text": part.decode("utf-8", "replace"), "start": start, "stop": at})
                break
        else:
            told.append({"id": token, "text": "", "start": 0, "stop": 0})
    return told
