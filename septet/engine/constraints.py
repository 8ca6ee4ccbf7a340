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

from septet.errors import InvalidRequest, SeptetError
from septet.grammar.masks import Masks, mask_words, single_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from llguidance import LLMatcher
    from torch import Tensor

    from septet.engine.grammars import Grammars
    from septet.engine.runner import HostCopy
    from septet.step import Join

__all__ = ["Answer", "Constraints", "TokenMasks", "Verdict"]

RING = 2  # buffers in turn: masks of step N + 1 follow the tokens of step N, before which its own copy has ended
MAX_VIEWS = 512  # of the buffers, by size: a tensor's slice costs more than filling it
MAX_FORCED = 512  # tokens that a matcher goes ahead at once: what follows is found at its end

# A chunk among decoding rows costs each of them something, one step more costs its own row alone: forced tokens are
# told from MIN_TOLD on beside nobody, from one more for every ROWS_A_TOKEN rows of the step. Untold ones are sampled.
MIN_TOLD = 2
ROWS_A_TOKEN = 4
MANY_ROWS = 16  # from here on only long runs are told, so forced tokens are looked for in every LOOK-th step alone
LOOK = 8


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """For the constrained ones of a step's picks, as `Ops.apply_mask` reads them."""

    words: Tensor  # (C, words of the vocabulary) int32; on the host (pinned) until `on`
    line: Tensor  # (S,) int64: which of them a pick follows, -1 = none

    def on(self, device: torch.device) -> TokenMasks:
        return TokenMasks(self.words.to(device, non_blocking=True), self.line.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Buffers:
    """Masks to be made: memory, and its tensors where it is pinned."""

    words: np.ndarray
    line: np.ndarray
    pinned: TokenMasks | None = None

    def masks(self) -> TokenMasks:
        if self.pinned is not None:
            return self.pinned
        import torch

        return TokenMasks(torch.from_numpy(self.words), torch.from_numpy(self.line))


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
    lane: int  # rows of one lane are best served one after the other
    at: int  # position of the next token that the matcher would take
    held_until: int  # positions below hold back the ends of the answer, where the grammar has a choice
    end_ids: tuple[int, ...]
    tells: bool  # forced tokens may be told ahead; else they are sampled one by one, all the same
    tries: bool  # temperature and seed alone choose: what is drawn without a mask and allowed is what a mask would give
    ahead: dict[int, int] = field(default_factory=dict)  # forced tokens by position, below `at`
    told: int = 0  # forced tokens below this position were told
    looked: bool = False  # what the grammar forces at `at` was looked for: nothing
    ended: bool = False
    error: SeptetError | None = None
    notable: bool = False  # it went ahead, ended or failed some time: `verdict` may have something to say

    def fail(self, error: SeptetError) -> None:
        self.error, self.notable = error, True

    def over(self, position: int) -> bool:
        """Whether a token there means nothing to the grammar."""
        return self.error is not None or (self.ended and position >= self.at)

    def took(self) -> None:
        """One token, by the matcher."""
        self.at += 1
        self.looked = False
        if self.matcher.is_stopped():
            self.ended = self.notable = True

    def force(self) -> None:
        """Go ahead over what the grammar leaves no choice about."""
        tokens = self.matcher.compute_ff_tokens()[:MAX_FORCED]
        self.looked = not tokens
        if not tokens:
            return
        if not self.matcher.consume_tokens(tokens):
            self.fail(why(self.matcher))
            return
        self.notable = True
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


Bound = tuple[int, int, RowMatcher]  # number of the pick, position, whose


class Filling:
    """Masks in the making. One that turns out to be forced takes its matcher ahead, if `looks`."""

    def __init__(self, buffers: Buffers, free: list[Bound], library: Masks | None, *, looks: bool, later: bool) -> None:
        self._buffers = buffers
        self._free = free
        self._looks = looks
        self._matchers = [row.matcher for _, _, row in free]
        self._wait: Callable[[], None] | None = None
        if free and library is not None:
            if later:
                self._wait = library.start(self._matchers, buffers.words)
            else:
                library.fill(self._matchers, buffers.words)

    def masks(self) -> TokenMasks:
        return self.arrays().masks()

    def arrays(self) -> Buffers:
        """Waits for them; once."""
        if self._wait is not None:
            self._wait()
        words, free, matchers = self._buffers.words, self._free, self._matchers
        if self._looks:
            for i in single_bits(words[: len(free)]).tolist():
                if not matchers[i].is_error():
                    free[i][2].force()
        for i, (_, position, row) in enumerate(free):
            if matchers[i].is_error():
                row.fail(why(matchers[i]))
                words[i] = -1
            elif position < row.held_until and position == row.at:
                _hold_back(words[i], row.end_ids)
        return self._buffers


class Answer:
    """What the grammars say of one step's tokens. `read` waits for the tokens; steps are read in order."""

    def __init__(self, owner: Constraints, rows: list[Bound], tokens: HostCopy, n_rows: int) -> None:
        self._owner = owner
        self._n_rows = n_rows
        self._rows = rows
        self._tokens: HostCopy | None = tokens
        self._verdicts: dict[int, Verdict] | None = None

    def read(self) -> None:
        if self._tokens is None:
            return
        tokens = self._tokens.numpy().tolist()
        self._tokens = None
        self._owner.accept(self._rows, tokens)

    def verdicts(self) -> dict[int, Verdict]:
        """By the number of the pick, where there is something to say; asked for before later tokens are read."""
        if self._verdicts is None:
            self._verdicts = verdicts(self._rows, self._n_rows)
        return self._verdicts


def verdicts(rows: list[Bound], n_rows: int) -> dict[int, Verdict]:
    """By the number of the pick, where there is something to say of these in a step of so many rows; once."""
    notable = [bound for bound in rows if bound[2].notable]
    return {i: said for i, position, row in notable if (said := row.verdict(position, n_rows)) is not None}


class Constraints:
    def __init__(self, grammars: Grammars, vocab_size: int, device: torch.device) -> None:
        self.grammars = grammars
        self.vocab_size = vocab_size
        self.device = device
        self.overlaps = device.type == "cuda"  # the loop goes on while masks are made; a CPU would have to share itself
        self.rows: dict[int, RowMatcher] = {}
        self.library: Masks | None = None  # made with the first row
        self._bound: list[Bound] = []  # of the picks that `masks` saw last
        self._unread: deque[Answer] = deque()
        self._ring: list[Buffers] = []
        self._turn = 0
        self._views: dict[tuple[int, int, int], Buffers] = {}
        self._steps = 0

    def join(self, joins: Sequence[Join]) -> None:
        """Rows change hands: a constrained one starts with the matcher of its output so far."""
        for join in joins:
            self.rows.pop(join.row, None)
            if join.params.structured is not None:
                self.library = self.library or Masks()
                row = self.rows[join.row] = self._row(join)
                output = list(join.tokens[join.n_prompt :])
                if output and not row.matcher.consume_tokens(output):
                    row.fail(why(row.matcher))

    def _row(self, join: Join) -> RowMatcher:
        lane, params = self.grammars.lane(join.request), join.params
        filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        return RowMatcher(
            join.row,
            lane.matcher(),
            lane.number,
            at=len(join.tokens),
            held_until=join.n_prompt + params.min_tokens if params.min_tokens else 0,
            end_ids=(*join.eos_token_ids, *params.stop_token_ids),
            tells=params.logprobs is None,
            tries=params.greedy or not filters,
        )

    def masks(self, spots: Sequence[tuple[int, int]]) -> TokenMasks | None:
        """Masks of the tokens that will be sampled there, (row, position) each, once all sampled before are known;
        None: no need."""
        filling = self.begin(spots)
        return filling.masks() if filling is not None else None

    def begin(self, spots: Sequence[tuple[int, int]], *, later: bool = False) -> Filling | None:
        """The same, to be finished before the next begin. `later`: many of them are made while others work."""
        self._bound = []
        if not self.rows:
            return None
        self.read()
        rows = self.rows
        self._bound = [(i, at, row) for i, (r, at) in enumerate(spots) if (row := rows.get(r)) is not None]
        self._bound.sort(key=_lane)
        free, forced = [], []
        for bound in self._bound:
            _, position, row = bound
            if position == row.at and not row.ended and row.error is None:
                free.append(bound)
            elif not row.over(position):
                forced.append(bound)
        if not free and not forced:
            return None
        buffers = self._lined([*free, *forced], len(spots))
        words = buffers.words
        for c, (_, position, row) in enumerate(forced, len(free)):
            words[c] = 0
            token = row.ahead[position]
            words[c].view(np.uint32)[token >> 5] = 1 << (token & 31)
        self._steps += 1
        looks = len(free) < MANY_ROWS or not self._steps % LOOK
        return Filling(buffers, free, self.library, looks=looks, later=later)

    def read(self, *, judge: bool = False) -> None:
        """What was sampled so far is known to the matchers from here on. `judge`: they go on before it is committed."""
        while self._unread:
            answer = self._unread.popleft()
            answer.read()
            if judge:
                answer.verdicts()

    def held(self, bound: list[Bound], n_spots: int) -> Buffers:
        """Masks of free ones, now."""
        bound.sort(key=_lane)
        return Filling(self._lined(bound, n_spots), bound, self.library, looks=False, later=False).arrays()

    def follow(self, tokens: HostCopy, n_rows: int) -> Answer | None:
        """The tokens of the picks that `masks` has just seen are on their way: taken before the next masks are made."""
        if not self._bound:
            return None
        answer = Answer(self, self._bound, tokens, n_rows)
        self._unread.append(answer)
        return answer

    def accept(self, bound: list[Bound], tokens: list[int]) -> None:
        """tokens[i] was sampled for the i-th pick. A negative token: the row failed."""
        taking: list[RowMatcher] = []
        values: list[int] = []
        over: list[RowMatcher] = []
        for i, position, row in bound:
            token = tokens[i]
            if row.over(position):
                continue
            if token < 0:
                row.fail(SeptetError("the model produced NaN logits for this request"))
            elif position == row.at:
                taking.append(row)
                values.append(token)
                continue
            elif row.ahead.get(position, token) != token:
                row.fail(SeptetError("a forced token was not sampled"))
            if row.over(position + 1):
                over.append(row)
        over += self._take(taking, values) if taking else ()
        self.forget(over)

    def forget(self, over: Sequence[RowMatcher]) -> None:
        """Their grammars have nothing more to say."""
        for row in over:
            if self.rows.get(row.row) is row:
                del self.rows[row.row]

    def _take(self, rows: list[RowMatcher], tokens: list[int]) -> list[RowMatcher]:
        """One token each; -> whose grammar is over."""
        assert self.library is not None
        matchers, over = [row.matcher for row in rows], []
        for row, matcher, ok in zip(rows, matchers, self.library.accept(matchers, tokens), strict=True):
            row.took()
            if not ok:
                row.fail(why(matcher))
            if row.over(row.at):
                over.append(row)
        return over

    def _lined(self, bound: Sequence[Bound], n_spots: int) -> Buffers:
        """Room for their masks, in this order, and whose they are."""
        buffers, line = self._buffers(len(bound), n_spots), [-1] * n_spots
        for c, (i, _, _) in enumerate(bound):
            line[i] = c
        buffers.line[:] = line
        return buffers

    def _buffers(self, n_masks: int, n_spots: int) -> Buffers:
        """Room for so many; where a device copies out of it: pinned, of a ring."""
        if not self._ring or len(self._ring[0].line) < n_spots:
            size = max(8, 1 << (n_spots - 1).bit_length())
            self._ring = [self._room(size) for _ in range(RING if self.device.type == "cuda" else 1)]
            self._views.clear()
        self._turn = (self._turn + 1) % len(self._ring)
        key = self._turn, n_masks, n_spots
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            room = self._ring[self._turn]
            pinned = room.pinned and TokenMasks(room.pinned.words[:n_masks], room.pinned.line[:n_spots])
            found = self._views[key] = Buffers(room.words[:n_masks], room.line[:n_spots], pinned)
        return found

    def _room(self, size: int) -> Buffers:
        width = mask_words(self.vocab_size)
        if self.device.type != "cuda":
            return Buffers(np.empty((size, width), dtype=np.int32), np.empty(size, dtype=np.int64))
        import torch

        words = torch.empty(size, width, dtype=torch.int32, pin_memory=True)
        line = torch.empty(size, dtype=torch.int64, pin_memory=True)
        return Buffers(words.numpy(), line.numpy(), TokenMasks(words, line))


def _lane(bound: Bound) -> int:
    return bound[2].lane


def _hold_back(line: np.ndarray, end_ids: tuple[int, ...]) -> None:
    """min_tokens where the grammar has a choice; a grammar that can only end is not held back."""
    before, bits = line.copy(), line.view(np.uint32)
    for token in end_ids:
        bits[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
    if not line.any():
        line[:] = before


def why(matcher: LLMatcher) -> SeptetError:
    reason = matcher.stop_reason()
    if reason in ("ParserTooComplex", "LexerTooComplex"):
        return InvalidRequest("structured: the grammar became too complex for one step of this answer")
    return SeptetError(f"the grammar could not follow the answer ({reason})")
