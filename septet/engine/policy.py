"""Who runs first, who gives way, and how much room the running ones will still want: pure decisions over integers.

Called by the scheduler. Knows sequences as counts and orders; nothing of leases, executors or torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from septet.engine.sequence import Sequence

__all__ = ["AdmissionConfig", "OrderedSequences", "OutputEstimate", "choose_victim"]

_order = attrgetter("order")


class OrderedSequences:
    """Sequences in the order in which they should run. Insertion and removal bisect; the front is index 0."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]

    def add(self, seq: Sequence) -> None:
        insort(self._items, seq, key=_order)

    def discard(self, seq: Sequence) -> None:
        index = bisect_left(self._items, seq.order, key=_order)
        if index < len(self._items) and self._items[index] is seq:
            del self._items[index]


def choose_victim(running: OrderedSequences, step: int) -> Sequence:
    """Who gives its slots back for plan `step`: one whose last token is in flight already, else the last in order.

    The first loses nothing. It must not be in the very plan being made, which still reads its slots.
    """
    for seq in running:
        if seq.ending and seq.last_step != step:
            return seq
    return running[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How much output to expect of a request. Larger values admit later and preempt less."""

    initial_ratio: float = 0.5  # of output to max_tokens, before anything is known
    min_ratio: float = 0.02
    smoothing: float = 0.05  # weight of the newest finished request
    horizon: int = 1024  # output tokens that are expected at most, so that a huge max_tokens reserves no pool
    raise_on_preemption: float = 1.25  # the estimate was too small: multiply the ratio


class OutputEstimate:
    """Expected output as a share of what is allowed: an average of finished requests (SGLang's new-token ratio)."""

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        self.config = config or AdmissionConfig()
        self.ratio = self.config.initial_ratio

    def finished(self, generated: int, allowed: int) -> None:
        """A request ended by itself after `generated` of `allowed` output tokens."""
        weight = self.config.smoothing
        self.ratio = max(self.config.min_ratio, (1 - weight) * self.ratio + weight * generated / max(1, allowed))

    def preempted(self) -> None:
        self.ratio = min(1.0, self.ratio * self.config.raise_on_preemption)

    def output(self, seq: Sequence) -> int:
        """Tokens that it will still generate and compute, about."""
        return min(math.ceil((seq.limit - seq.length) * self.ratio), self.config.horizon)

    def slots(self, seq: Sequence) -> int:
        """Slots that a running sequence will still want: for what is not yet planned, and for its output."""
        return 0 if seq.ending else seq.length - seq.planned + self.output(seq)

    def slots_of(self, running: Iterable[Sequence]) -> int:
        """If all of them reached their end together: an upper bound of `peak`, and cheaper."""
        total, ratio, horizon = 0, self.ratio, self.config.horizon
        for seq in running:  # as `slots`, for hundreds of them
            left = seq.limit - seq.length
            if left > 0:
                total += seq.length - seq.planned + min(math.ceil(left * ratio), horizon)
        return total

    def peak(self, running: Iterable[Sequence], seq: Sequence, wanted: int) -> int:
        """Most slots wanted on top of those leased now, at any time, if `seq` starts now and wants `wanted` at once.

        Sequences end one after the other and give back what they hold (Past-Future scheduling, arXiv 2507.10150):
        when the one with t tokens to go ends, those that go on longer have grown by t each.
        """
        ends = [(self.output(seq), wanted, 0)]
        for other in running:
            held = other.lease.n_private if other.lease is not None else 0
            ends.append((self.output(other), max(0, other.length - other.planned), held))
        ends.sort(reverse=True)
        freed = sum([held for _, _, held in ends])
        most = grown = 0
        for n_alive, (left, to_plan, held) in enumerate(ends, 1):
            grown += to_plan
            freed -= held
            most = max(most, grown + n_alive * left - freed)
        return most
