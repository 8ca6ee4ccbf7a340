"""The grammars of the rows: one matcher each, a mask for every token that is sampled, in step with `septet/step.py`.

Owned by the runner. Only the sampler waits for masks: step N + 1's forward pass is launched first; then the tokens of
step N are read (they are there, or about to be), taken by the matchers and turned into masks on host threads while the
device computes. A matcher is a function of the row's output tokens: a join (preemption included) makes it anew from
them. Rows without a grammar cost nothing. Knows no scheduling and no grammar's text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.engine.staging import on_device
from septet.errors import InvalidRequest, SeptetError
from septet.grammar.masks import Masks, mask_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher
    from torch import Tensor

    from septet.engine.grammars import Grammars
    from septet.engine.runner import HostCopy
    from septet.engine.sampler import Pick
    from septet.step import Join

__all__ = ["Answer", "Constraints", "TokenMasks"]

RING = 2  # buffers in turn: masks of step N + 1 follow the tokens of step N, before which its own copy has ended


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """For the constrained ones of a step's picks, on the device."""

    words: Tensor  # (C, words of the vocabulary) int32, as `Ops.apply_mask` reads them
    picks: Tensor  # (C,) int64, ascending: which rows of the logits


@dataclass(slots=True)
class RowMatcher:
    """A row's grammar. After its end or an error it allows everything: what is sampled then is dropped."""

    row: int
    matcher: LLMatcher
    ended: bool = False
    error: SeptetError | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None


class Answer:
    """What the grammars say of one step's tokens. `read` waits for the tokens; steps are read in order."""

    def __init__(self, owner: Constraints, rows: list[tuple[int, RowMatcher]], tokens: HostCopy) -> None:
        self._owner = owner
        self._rows = rows
        self._tokens: HostCopy | None = tokens

    def read(self) -> None:
        if self._tokens is None:
            return
        tokens = self._tokens.numpy()
        self._tokens = None
        self._owner.accept([(row, int(tokens[i])) for i, row in self._rows])

    def ended(self) -> set[int]:
        """Picks (by number) whose grammar their token has completed."""
        return {i for i, row in self._rows if row.ended}

    def errors(self) -> dict[int, SeptetError]:
        return {i: row.error for i, row in self._rows if row.error is not None}


class Constraints:
    def __init__(self, grammars: Grammars, vocab_size: int, device: torch.device) -> None:
        self.grammars = grammars
        self.vocab_size = vocab_size
        self.device = device
        self._rows: dict[int, RowMatcher] = {}
        self._unread: deque[Answer] = deque()
        self._masks: Masks | None = None
        self._ring: list[Tensor] = []
        self._turn = 0

    def join(self, joins: Sequence[Join]) -> None:
        """Rows change hands: a constrained one starts with the matcher of its output so far."""
        for join in joins:
            self._rows.pop(join.row, None)
            if join.params.structured is not None:
                row = self._rows[join.row] = RowMatcher(join.row, self.grammars.matcher(join.request))
                output = list(join.tokens[join.n_prompt :])
                if output and not row.matcher.consume_tokens(output):
                    row.error = _why(row.matcher)

    def masks(self, picks: Sequence[Pick]) -> TokenMasks | None:
        """Masks of the tokens that these picks will sample, once all sampled before are known; None: no need."""
        if not self._rows:
            return None
        while self._unread:
            self._unread.popleft().read()
        wanted = [(i, self._rows[pick.row]) for i, pick in enumerate(picks) if pick.row in self._rows]
        wanted = [(i, row) for i, row in wanted if not row.over]
        if not wanted:
            return None
        words = self._filled([row for _, row in wanted])
        for line, (i, row) in zip(words.numpy(), wanted, strict=True):
            _settle(line, picks[i], row)
        at = on_device([i for i, _ in wanted], torch.int64, self.device)
        return TokenMasks(words.to(self.device, non_blocking=True), at)

    def follow(self, picks: Sequence[Pick], tokens: HostCopy) -> Answer | None:
        """The tokens of these picks are on their way: they will be taken before the next masks are made."""
        rows = [(i, self._rows[pick.row]) for i, pick in enumerate(picks) if pick.row in self._rows]
        if not rows:
            return None
        answer = Answer(self, rows, tokens)
        self._unread.append(answer)
        return answer

    def accept(self, pairs: list[tuple[RowMatcher, int]]) -> None:
        """A token for each row. Negative: the row failed; over: it was sampled past the end."""
        live = [(row, token) for row, token in pairs if not row.over]
        for row, token in live:
            if token < 0:
                row.error = SeptetError("the model produced NaN logits for this request")
        live = [(row, token) for row, token in live if token >= 0]
        if not live:
            return
        taken = self._library.accept([row.matcher for row, _ in live], [token for _, token in live])
        for (row, _), ok in zip(live, taken, strict=True):
            if not ok:
                row.error = _why(row.matcher)
            else:
                row.ended = row.matcher.is_stopped()
            if row.over and self._rows.get(row.row) is row:
                del self._rows[row.row]

    def _filled(self, rows: list[RowMatcher]) -> Tensor:
        buffer = self._buffer(len(rows))
        self._library.fill([row.matcher for row in rows], buffer.numpy())
        return buffer

    def _buffer(self, n: int) -> Tensor:
        """(n, words) int32 on the host; where a device copies out of it: pinned, and of a ring."""
        pinned = self.device.type == "cuda"
        if not self._ring or len(self._ring[0]) < n:
            size = max(8, 1 << (n - 1).bit_length())
            shape = (size, mask_words(self.vocab_size))
            self._ring = [
                torch.empty(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(RING if pinned else 1)
            ]
        self._turn = (self._turn + 1) % len(self._ring)
        return self._ring[self._turn][:n]

    @property
    def _library(self) -> Masks:
        if self._masks is None:
            self._masks = Masks()
        return self._masks


def _settle(line: np.ndarray, pick: Pick, row: RowMatcher) -> None:
    """min_tokens where the grammar has a choice; a grammar that can only end, or has failed, is not held back."""
    if row.matcher.is_error():
        row.error = _why(row.matcher)
        line.fill(-1)
        return
    info = pick.info
    if pick.position - info.n_prompt >= info.params.min_tokens:
        return
    before, bits = line.copy(), line.view(np.uint32)
    for token in info.end_ids:
        bits[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
    if not line.any():
        line[:] = before


def _why(matcher: LLMatcher) -> SeptetError:
    reason = matcher.stop_reason()
    if reason in ("ParserTooComplex", "LexerTooComplex"):
        return InvalidRequest("structured: the grammar became too complex for one step of this answer")
    return SeptetError(f"the grammar could not follow the answer ({reason})")
