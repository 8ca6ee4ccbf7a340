"""Pinned prefixes: who holds which against eviction, until when, and who gives way when there are too many.

Owned by the radix tree (`kv/radix.py`), which tells it a node and asks it whose pin goes next. A pin is a promise of
order, not of memory: what is pinned is evicted after all else, and its oldest first. Knows no requests and no tokens'
meaning; an owner is a name.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.kv.radix import Node

__all__ = ["MAX_OWNER_PINS", "MAX_PINS", "OWNER_SHARE", "TOTAL_SHARE", "Pin", "Pins"]

TOTAL_SHARE = 0.5  # of the pool's slots, that pins of all owners may hold
OWNER_SHARE = 0.25  # that those of one owner may hold; of the nameless owner: TOTAL_SHARE
MAX_PINS = 1024
MAX_OWNER_PINS = 256


@dataclass(slots=True, eq=False)
class Pin:
    """The path from the root to `node`, for `owner`. `node.pins` counts it, and so does every node above."""

    node: Node
    owner: str
    expires_at: float


class Pins:
    """Pins in the order of their last use, oldest first, and what they hold.

    Invariant: `node.pins[owner]` is the number of the owner's pins whose path runs through the edge.
    """

    def __init__(self, capacity: int) -> None:
        self.n_slots = 0  # held by pins, a slot counted once
        self._capacity = capacity
        self._pins: dict[tuple[int, str], Pin] = {}  # by node and owner
        self._owned: Counter[str] = Counter()  # slots by owner, a slot counted once
        self._first_end = math.inf  # no pin ends before

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins.values())

    def limit(self, owner: str) -> int:
        return int(self._capacity * (OWNER_SHARE if owner else TOTAL_SHARE))

    def add(self, node: Node, owner: str, expires_at: float) -> None:
        """A new pin, or the same one for longer: either way the newest now."""
        pin = self._pins.pop((id(node), owner), None)
        if pin is None:
            pin = Pin(node, owner, expires_at)
            self._count(node, owner, 1)
        pin.expires_at = max(pin.expires_at, expires_at)
        self._pins[id(node), owner] = pin
        self._first_end = min(self._first_end, expires_at)

    def drop(self, pin: Pin) -> Node:
        """Its node, which may be evictable now."""
        del self._pins[id(pin.node), pin.owner]
        self._count(pin.node, pin.owner, -1)
        return pin.node

    def ended(self, now: float) -> list[Pin]:
        """Those whose time is over."""
        if now < self._first_end:
            return []
        over = [pin for pin in self if pin.expires_at <= now]
        self._first_end = min((pin.expires_at for pin in self if pin.expires_at > now), default=math.inf)
        return over

    def surplus(self, owner: str) -> Pin | None:
        """The pin that goes next so that shares and counts are kept; None: they are kept."""
        own = [pin for pin in self if pin.owner == owner]
        if self._owned[owner] > self.limit(owner) or len(own) > MAX_OWNER_PINS:
            return own[0]
        if self.n_slots > self.limit("") or len(self) > MAX_PINS:
            return next(iter(self))
        return None

    def unlocked(self) -> Pin | None:
        """The oldest one on a path that no lease locks."""
        return next((pin for pin in self if not pin.node.locks), None)

    def audit(self) -> None:
        """AssertionError where the slots by owner are off. The tree checks the counts of its nodes."""
        nodes = {id(node): node for pin in self for node in _path(pin.node)}
        owned: Counter[str] = Counter()
        for node in nodes.values():
            for owner in node.pins:
                owned[owner] += len(node.slots)
        assert +self._owned == +owned, f"pins hold {owned}, the gauges say {self._owned}"
        assert self.n_slots == sum(len(node.slots) for node in nodes.values()), "the gauge of pinned slots is off"

    def _count(self, node: Node, owner: str, change: int) -> None:
        for step in _path(node):
            if not step.pins:
                self.n_slots += len(step.slots)
            if not step.pins.get(owner):
                self._owned[owner] += len(step.slots)
            step.pins[owner] = step.pins.get(owner, 0) + change
            if not step.pins[owner]:
                del step.pins[owner]
                self._owned[owner] -= len(step.slots)
            if not step.pins:
                self.n_slots -= len(step.slots)
        if not self._owned[owner]:
            del self._owned[owner]


def _path(node: Node) -> Iterator[Node]:
    """From `node` up, without the root, which holds nothing."""
    while node.parent is not None:
        yield node
        node = node.parent
