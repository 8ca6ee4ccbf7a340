"""Free draws held to their grammars: on a CPU a row draws as if it had none, and once more only where that is refused.

Called by the tape's decode steps (`taped.py`); the matchers are those of `constraints.py`. Where temperature and seed
alone choose, the largest of all noisy logits that a grammar allows is the one that a mask would have left largest: the
same token, without the mask in four draws of five. A row that filters (top-k, top-p, min-p), or that min_tokens holds
back, is drawn under its mask at once. Knows no tape and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.engine.constraints import verdicts, why
from septet.engine.drawn import NAN_LOGITS
from septet.errors import SeptetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.engine.constraints import Bound, Buffers, Constraints, RowMatcher, Verdict
    from septet.step import PlanRow

__all__ = ["Tries"]


class Tries:
    """One step in which every row draws one token: `masks`, then the draws, `refused`, draws again, `verdicts`."""

    def __init__(self, constraints: Constraints, rows: Sequence[PlanRow]) -> None:
        self._constraints = constraints
        self._n_rows = len(rows)
        self._refused: list[Bound] = []
        self.given: list[int] = []  # numbers of the rows whose token was known before: not the one that they drew
        constraints.read(judge=True)
        matchers = constraints.rows
        self._bound = [(i, row.start + 1, m) for i, row in enumerate(rows) if (m := matchers.get(row.row)) is not None]
        self._held: list[Bound] = []
        for bound in self._bound:
            _, position, matcher = bound
            if position == matcher.at and not matcher.over(position):
                if not matcher.looked:
                    matcher.force()
                if position == matcher.at and not (matcher.tries and position >= matcher.held_until):
                    self._held.append(bound)

    def masks(self) -> Buffers | None:
        """For the rows that may not draw freely."""
        return self._constraints.held(self._held, self._n_rows) if self._held else None

    def refused(self, tokens: list[int]) -> Buffers | None:
        """tokens[i]: what row i drew; what was known before stands there then. -> masks for the rows that have to draw
        again."""
        for bound in self._bound:
            i, position, matcher = bound
            if matcher.over(position):
                continue
            token = tokens[i]
            if token < 0:
                matcher.fail(SeptetError(NAN_LOGITS))
            elif position != matcher.at:
                tokens[i] = matcher.ahead[position]
                self.given.append(i)
            elif matcher.matcher.try_consume_tokens([token]):
                _took(matcher)
            elif matcher.matcher.is_error() or bound in self._held:
                matcher.fail(why(matcher.matcher))
            else:
                self._refused.append(bound)
        return self._constraints.held(self._refused, self._n_rows) if self._refused else None

    def verdicts(self, tokens: list[int]) -> dict[int, Verdict]:
        """By the number of the row, where there is something to say of the tokens that stand now."""
        for i, _, matcher in self._refused:
            if matcher.error is not None:
                continue
            if matcher.matcher.consume_token(tokens[i]):
                _took(matcher)
            else:
                matcher.fail(why(matcher.matcher))
        self._constraints.forget([matcher for _, position, matcher in self._bound if matcher.over(position + 1)])
        return verdicts(self._bound, self._n_rows)


def _took(matcher: RowMatcher) -> None:
    matcher.took()
    if not matcher.ended:
        matcher.force()
