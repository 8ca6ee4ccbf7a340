"""Prompts that are being prefilled right now, so that a second request waits for a long prefix instead of computing it.

Owned by the scheduler. Waiting is bounded: only a running sequence can be waited for, its prefill is committed in
finitely many steps, and what it has committed is in the cache, so the follower finds it there and waits no more. If the
leader leaves before that, it is discarded here and the follower goes on at its next turn.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from septet.engine.sequence import MIN_SHARED
from septet.kv.radix import common_length

if TYPE_CHECKING:
    from septet.engine.sequence import Sequence

__all__ = ["Prefills"]

MAX_COMPARED = 8  # latest prefills with the same head that a candidate is compared with


class Prefills:
    """Running sequences with prompt tokens to compute, by the head of their prompt."""

    def __init__(self) -> None:
        self._by_head: defaultdict[tuple[str, bytes], list[Sequence]] = defaultdict(list)

    def add(self, seq: Sequence) -> None:
        if seq.head is not None:
            self._by_head[seq.head].append(seq)

    def discard(self, seq: Sequence) -> None:
        group = self._by_head.get(seq.head) if seq.head is not None else None
        if group and seq in group:
            group.remove(seq)
            if not group and seq.head is not None:
                del self._by_head[seq.head]

    def worth_waiting(self, seq: Sequence, held: int) -> bool:
        """Will a running prefill soon share at least MIN_SHARED tokens more than the `held` ones of the cache?"""
        group = self._by_head.get(seq.head) if seq.head is not None else None
        for leader in group[-MAX_COMPARED:] if group else ():
            shared = min(common_length(seq.tokens, leader.tokens), len(seq.tokens) - 1, leader.n_known)
            if shared >= held + MIN_SHARED and leader.computed < shared:
                return True
        return False
