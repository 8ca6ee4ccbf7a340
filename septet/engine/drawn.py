"""A launched step whose tokens were drawn on the device, and of which nothing else is asked: the usual one.

Made by the runner; `executor.PendingStep`. Kept apart because it is read once a step with hundreds of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.constraints import Answer, Verdict
    from septet.engine.staging import HostCopy

__all__ = ["NAN_LOGITS", "BoundStep", "DrawnStep", "judge"]

NAN_LOGITS = "the model produced NaN logits for this request"


@dataclass(slots=True)
class DrawnStep:
    step: int
    requests: list[str]  # of the rows that sample
    tokens: HostCopy  # one for each of them, at least one

    def result(self) -> StepResult:
        return StepResult(self.step, tuple(_rows(self.requests, self.tokens)))


@dataclass(slots=True)
class BoundStep:
    """The same with rows that follow a grammar: drawn when their masks are there, before the next step is launched."""

    step: int
    requests: list[str]
    draw: Callable[[], tuple[HostCopy, Answer | None]] | None  # -> the tokens and what the grammars say of them; once
    drawn: tuple[HostCopy, Answer | None] | None = None
    error: Exception | None = None

    def finish(self) -> None:
        """Draw, unless that has happened; an error is the result's."""
        draw, self.draw = self.draw, None
        if draw is not None:
            try:
                self.drawn = draw()
            except Exception as error:
                self.error = error

    def result(self) -> StepResult:
        self.finish()
        if self.drawn is None:
            raise self.error or RuntimeError("a step without tokens")
        tokens, answer = self.drawn
        rows = _rows(self.requests, tokens)
        if answer is not None:
            answer.read()
            judge(rows, answer.verdicts())
        return StepResult(self.step, tuple(rows))


def judge(rows: list[RowResult], verdicts: dict[int, Verdict]) -> None:
    """What the grammars say of rows by their number, into the results."""
    for i, verdict in verdicts.items():
        got = rows[i]
        if got.error is not None:
            continue
        if verdict.error is not None:
            rows[i] = RowResult(got.request, error=verdict.error.message, error_kind=verdict.error.kind)
        else:
            got.forced, got.ended = verdict.forced, verdict.ended


def _rows(requests: list[str], copy: HostCopy) -> list[RowResult]:
    tokens = copy.numpy()[: len(requests)].tolist()
    rows = [RowResult(request, (token,)) for request, token in zip(requests, tokens, strict=True)]
    if tokens and min(tokens) < 0:
        rows = [row if row.tokens[0] >= 0 else RowResult(row.request, error=NAN_LOGITS) for row in rows]
    return rows
