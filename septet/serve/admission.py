"""What the server takes in: requests and prompt tokens that wait, bounded; more is refused at once, with a time.

Owned by `Service`, asked by `generation.py` before anything reaches an engine. The answer costs no engine work. Knows
keys and counts; no HTTP, no text.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.errors import Overloaded
from septet.serve.limits import FairOrder, KeyLimits

if TYPE_CHECKING:
    from septet.serve.keys import Key

__all__ = ["Admission", "Ticket"]

EXPECTED_OUTPUT = 256  # tokens of a request whose max_tokens is larger
MAX_RETRY_S = 60.0
RECENT = 64  # ended sequences from which the rate is taken


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted call: `n` sequences of `tokens` prompt tokens together."""

    admission: Admission
    key: Key | None
    n: int
    tokens: int
    expected: float
    place: float | None  # in the fair order; None: first come, first served
    backfill: bool = False
    used: int = 0  # output tokens so far
    begun: bool = False
    closed: bool = False

    def output(self, n_tokens: int) -> None:
        """New output: the call is no longer waiting, and its key pays."""
        if not self.begun:
            self._begin()
        self.used += n_tokens
        if self.key is not None:
            self.admission.keys.charge(self.key, n_tokens)

    def leave(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self.begun:
            self._begin()
        self.admission.left(self)

    def _begin(self) -> None:
        self.begun = True
        self.admission.begun(self)


class Admission:
    """Counts of all models together. `max_waiting` sequences beyond what the engines run; 0 tokens = no limit.

    Backfill (batches) has places of its own, as many as an engine runs at once, and an order of its own: it takes
    nobody's place, whoever else asks.
    """

    def __init__(self, max_waiting: int, max_waiting_tokens: int = 0) -> None:
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.keys = KeyLimits()
        self.fair = FairOrder()
        self.fair_backfill = FairOrder()
        self.open = 0  # sequences that run or wait, without backfill
        self.backfill = 0
        self.waiting_tokens = 0  # of prompts of calls without output yet
        self.refused: dict[str, int] = {"requests": 0, "tokens": 0, "key": 0}
        self._ends: deque[float] = deque(maxlen=RECENT)

    def begin(self, key: Key) -> None:
        """An HTTP request of `key` begins. Raises RateLimited; `keys.leave` must follow otherwise."""
        try:
            self.keys.enter(key)
        except Overloaded:
            self.refused["key"] += 1
            raise

    def enter(
        self, key: Key | None, *, n: int, tokens: int, max_output: int | None, rows: int, backfill: bool = False
    ) -> Ticket:
        """Take in a call, or raise Overloaded. rows: sequences that the engine runs at once. `leave` must follow."""
        if backfill:
            self._check_backfill(n, rows)
        else:
            self._check(n, tokens, rows)
        expected = float(tokens + n * min(max_output or EXPECTED_OUTPUT, EXPECTED_OUTPUT))
        place = None
        if key is not None:
            try:
                self.keys.check_tokens(key, tokens)
            except Overloaded:
                self.refused["key"] += 1
                raise
            self.keys.charge(key, tokens)
            place = (self.fair_backfill if backfill else self.fair).place(key, expected)
        if backfill:
            self.backfill += n
        else:
            self.open += n
            self.waiting_tokens += tokens
        return Ticket(self, key, n, tokens, expected, place, backfill)

    def _check(self, n: int, tokens: int, rows: int) -> None:
        if self.open and self.open + n > rows + self.max_waiting:
            self.refused["requests"] += 1
            raise Overloaded(f"{self.open} requests run or wait already; try again later", retry_after_s=self._retry())
        if self.waiting_tokens and 0 < self.max_waiting_tokens < self.waiting_tokens + tokens:
            self.refused["tokens"] += 1
            raise Overloaded(
                f"prompts of {self.waiting_tokens} tokens wait already; try again later", retry_after_s=self._retry()
            )

    def _check_backfill(self, n: int, rows: int) -> None:
        if self.backfill and self.backfill + n > rows:
            raise Overloaded(f"{self.backfill} requests of batches run already", retry_after_s=self._retry())

    def begun(self, ticket: Ticket) -> None:
        if not ticket.backfill:
            self.waiting_tokens -= ticket.tokens
        if ticket.place is not None:
            self._order(ticket).began(ticket.place)

    def left(self, ticket: Ticket) -> None:
        if ticket.backfill:
            self.backfill -= ticket.n
        else:
            self.open -= ticket.n
        self._ends.append(time.monotonic())
        if ticket.key is not None:
            self._order(ticket).settle(ticket.key, ticket.tokens + ticket.used - ticket.expected)

    def _order(self, ticket: Ticket) -> FairOrder:
        return self.fair_backfill if ticket.backfill else self.fair

    def _retry(self) -> float:
        """Seconds until one more place is likely: by the rate at which calls ended lately."""
        if len(self._ends) < 2:
            return 1.0
        span = time.monotonic() - self._ends[0]
        return min(MAX_RETRY_S, max(0.05, span / len(self._ends)))
