"""The grammars of the rows: one matcher each, a mask for every token that is sampled, in step with `septet/step.py`.

Owned by the runner. Only the sampler waits for masks: step N + 1's forward pass is launched first; then the tokens of
step N are read (they are there, or about to be), taken by the matchers and turned into masks on host threads while the
device computes. A matcher is a function of the row's output tokens: a join (preemption included) makes it anew from
them. Rows without a grammar cost nothing. Knows no scheduling and no grammar's text.

Forced tokens: where the grammar allows one continuation, the matcher goes ahead of the samples by the whole of it
(`RowMatcher.ahead`); the scheduler is told and computes it as one chunk. What is sampled meanwhile at these positions,
in steps that were planned before, can be nothing else: its mask has one bit.

    sampled and taken              ahead: forced, to be told       | the next that the grammar leaves open
    ................ position ->   ............................... at
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.errors import InvalidRequest, SeptetError
from septet.grammar.masks import Masks, mask_words, single_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llguidance import LLMatcher
    from torch import Tensor

    from septet.engine.grammars import Grammars
    from septet.engine.runner import HostCopy
    from septet.engine.sampler import Pick
    from septet.step import Join

__all__ = ["Answer", "Constraints", "TokenMasks", "Verdict"]

RING = 2  # buffers in turn: masks of step N + 1 follow the tokens of step N, before which its own copy has ended
MAX_FORCED = 512  # tokens that a matcher goes ahead at once: what follows is found at its end

# A chunk among decoding rows costs each of them something, one step more costs its own row alone: forced tokens are
# told from MIN_TOLD on beside nobody, from one more for every ROWS_A_TOKEN rows of the step. Untold ones are sampled.
MIN_TOLD = 2
ROWS_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """For the constrained ones of a step's picks, as `Ops.apply_mask` reads them."""

    words: Tensor  # (C, words of the vocabulary) int32; on the host (pinned) until `on`
    line: Tensor  # (S,) int64: which of them a pick follows, -1 = none

    def on(self, device: torch.device) -> TokenMasks:
        return TokenMasks(self.words.to(device, non_blocking=True), self.line.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grammar says of one sampled token."""

    forced: tuple[int, ...] = ()  # the tokens that must follow it
    ended: bool = False  # nothing may follow these
    error: SeptetError | None = None


@dataclass(slots=True)
class RowMatcher:
    """A row's grammar. After its end or an error it allows everything: what is sampled then is dropped."""

    row: int
    matcher: LLMatcher
    at: int  # position of the next token that the matcher would take
    tells: bool  # forced tokens may be told ahead; else they are sampled one by one, all the same
    ahead: dict[int, int] = field(default_factory=dict)  # forced tokens by position, below `at`
    told: int = 0  # forced tokens below this position were told
    ended: bool = False
    error: SeptetError | None = None

    def over(self, position: int) -> bool:
        """Whether a token there means nothing to the grammar."""
        return self.error is not None or (self.ended and position >= self.at)

    def force(self) -> None:
        """Go ahead over what the grammar leaves no choice about."""
        tokens = self.matcher.compute_ff_tokens()[:MAX_FORCED]
        if not tokens:
            return
        if not self.matcher.consume_tokens(tokens):
            self.error = _why(self.matcher)
            return
        self.ahead = dict(enumerate(tokens, self.at))  # those before are sampled or told: `at` was the next position
        self.at += len(tokens)
        self.ended = self.matcher.is_stopped()

    def verdict(self, position: int, n_rows: int) -> Verdict | None:
        """Of the token at `position`, which the matcher has taken, in a step of so many rows; None: any may follow."""
        if self.at == position + 1 and not self.ended and self.error is None:
            return None
        if self.error is not None:
            return Verdict(error=self.error)
        first = max(position + 1, self.told)
        worth = self.tells and self.at - first >= MIN_TOLD + n_rows // ROWS_A_TOKEN
        forced = tuple(self.ahead[p] for p in range(first, self.at)) if worth else ()
        self.told = max(self.told, first + len(forced))
        return Verdict(forced, self.ended and self.told >= self.at and position < self.at)


class Answer:
    """What the grammars say of one step's tokens. `read` waits for the tokens; steps are read in order."""

    def __init__(
        self, owner: Constraints, rows: list[tuple[int, int, RowMatcher]], tokens: HostCopy, n_rows: int
    ) -> None:
        self._owner = owner
        self._n_rows = n_rows
        self._rows = rows  # (number of the pick, position, matcher)
        self._tokens: HostCopy | None = tokens

    def read(self) -> None:
        if self._tokens is None:
            return
        tokens = self._tokens.numpy().tolist()
        self._tokens = None
        self._owner.accept([(row, position, tokens[i]) for i, position, row in self._rows])

    def verdicts(self) -> dict[int, Verdict]:
        """By the number of the pick, where there is something to say; once."""
        n_rows = self._n_rows
        return {i: said for i, position, row in self._rows if (said := row.verdict(position, n_rows)) is not None}


class Constraints:
    def __init__(self, grammars: Grammars, vocab_size: int, device: torch.device) -> None:
        self.grammars = grammars
        self.vocab_size = vocab_size
        self.device = device
        self._rows: dict[int, RowMatcher] = {}
        self._unread: deque[Answer] = deque()
        self._masks: Masks | None = None
        self._ring: list[tuple[Tensor, Tensor]] = []
        self._turn = 0

    def join(self, joins: Sequence[Join]) -> None:
        """Rows change hands: a constrained one starts with the matcher of its output so far."""
        for join in joins:
            self._rows.pop(join.row, None)
            if join.params.structured is not None:
                matcher = self.grammars.matcher(join.request)
                row = RowMatcher(join.row, matcher, len(join.tokens), tells=join.params.logprobs is None)
                self._rows[join.row] = row
                output = list(join.tokens[join.n_prompt :])
                if output and not matcher.consume_tokens(output):
                    row.error = _why(matcher)

    def masks(self, picks: Sequence[Pick]) -> TokenMasks | None:
        """Masks of the tokens that these picks will sample, once all sampled before are known; None: no need."""
        if not self._rows:
            return None
        while self._unread:
            self._unread.popleft().read()
        lines: list[int] = []
        free: list[tuple[Pick, RowMatcher]] = []
        forced: list[tuple[int, Pick, RowMatcher]] = []
        for i, pick in enumerate(picks):
            row = self._rows.get(pick.row)
            if row is None or row.over(pick.position):
                continue
            if pick.position == row.at:
                lines.append(i)
                free.append((pick, row))
            else:
                forced.append((i, pick, row))
        n_masks = len(free) + len(forced)
        if not n_masks:
            return None
        masks = self._buffers(n_masks, len(picks))
        words, line = masks[0].numpy(), masks[1].numpy()
        line[lines + [i for i, _, _ in forced]] = np.arange(n_masks)
        self._fill(words, free)
        for c, (_, pick, row) in enumerate(forced, len(free)):
            words[c] = 0
            token = row.ahead[pick.position]
            words[c].view(np.uint32)[token >> 5] = 1 << (token & 31)
        return TokenMasks(*masks)

    def _fill(self, words: np.ndarray, rows: list[tuple[Pick, RowMatcher]]) -> None:
        """Masks of open positions. One that turns out to be forced takes its matcher ahead."""
        if not rows:
            return
        self._library.fill([row.matcher for _, row in rows], words)
        for i in single_bits(words[: len(rows)]).tolist():
            if not rows[i][1].matcher.is_error():
                rows[i][1].force()
        for i, (pick, row) in enumerate(rows):
            if row.matcher.is_error():
                row.error = _why(row.matcher)
                words[i] = -1
            elif pick.info.params.min_tokens and pick.position == row.at:
                _hold_back(words[i], pick)

    def follow(self, picks: Sequence[Pick], tokens: HostCopy) -> Answer | None:
        """The tokens of these picks are on their way: they will be taken before the next masks are made."""
        rows = [(i, pick.position, self._rows[pick.row]) for i, pick in enumerate(picks) if pick.row in self._rows]
        if not rows:
            return None
        answer = Answer(self, rows, tokens, len(picks))
        self._unread.append(answer)
        return answer

    def accept(self, sampled: list[tuple[RowMatcher, int, int]]) -> None:
        """(row, position, token) of each sample. A negative token: the row failed."""
        taking: list[RowMatcher] = []
        tokens: list[int] = []
        over: list[RowMatcher] = []
        for row, position, token in sampled:
            if row.over(position):
                continue
            if token < 0:
                row.error = SeptetError("the model produced NaN logits for this request")
            elif position == row.at:
                taking.append(row)
                tokens.append(token)
                continue
            elif row.ahead.get(position, token) != token:
                row.error = SeptetError("a forced token was not sampled")
            if row.over(position + 1):
                over.append(row)
        taken = self._library.accept([row.matcher for row in taking], tokens)
        for row, ok in zip(taking, taken, strict=True):
            row.at += 1
            if not ok:
                row.error = _why(row.matcher)
                over.append(row)
            elif row.matcher.is_stopped():
                row.ended = True
                over.append(row)
        for row in over:
            if self._rows.get(row.row) is row:
                del self._rows[row.row]

    def _buffers(self, n_masks: int, n_picks: int) -> tuple[Tensor, Tensor]:
        """(n_masks, words) int32 and (n_picks,) int64 of -1; where a device copies out of them: pinned, of a ring."""
        pinned = self.device.type == "cuda"
        if not self._ring or len(self._ring[0][1]) < n_picks:
            size = max(8, 1 << (n_picks - 1).bit_length())
            width = mask_words(self.vocab_size)
            self._ring = [
                (
                    torch.empty(size, width, dtype=torch.int32, pin_memory=pinned),
                    torch.empty(size, dtype=torch.int64, pin_memory=pinned),
                )
                for _ in range(RING if pinned else 1)
            ]
        self._turn = (self._turn + 1) % len(self._ring)
        words, line = self._ring[self._turn]
        line.numpy()[:n_picks] = -1
        return words[:n_masks], line[:n_picks]

    @property
    def _library(self) -> Masks:
        if self._masks is None:
            self._masks = Masks()
        return self._masks


def _hold_back(line: np.ndarray, pick: Pick) -> None:
    """min_tokens where the grammar has a choice; a grammar that can only end is not held back."""
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
