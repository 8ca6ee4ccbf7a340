"""The prefix index as a list scan: obviously right, slow. Oracle of the radix tree, by the contract of kv/cache.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.kv.pins import OWNER_SHARE, TOTAL_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Prefix = tuple[str, tuple[int, ...]]  # salt, tokens


@dataclass
class Entry:
    slot: int  # of the last token of the prefix
    locks: int = 0
    used: int = 0


class ListIndex:
    """One entry per held prefix. A handle is the prefix itself."""

    def __init__(self, capacity: int = 2**40, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.entries: dict[Prefix, Entry] = {}
        self.tick = 0
        self.capacity = capacity
        self.clock = clock
        self.pins: list[tuple[str, Prefix, float]] = []  # (owner, prefix, end), oldest first

    @property
    def n_slots(self) -> int:
        return len(self.entries)

    @property
    def n_locked(self) -> int:
        return sum(entry.locks > 0 for entry in self.entries.values())

    def _path(self, handle: Prefix) -> list[Entry]:
        salt, tokens = handle
        return [self.entries[salt, tokens[: n + 1]] for n in range(len(tokens))]

    def match(self, tokens: Sequence[int], salt: str) -> tuple[int, int]:
        held = 0
        while held < len(tokens) and (salt, tuple(tokens[: held + 1])) in self.entries:
            held += 1
        return held, sum(entry.locks > 0 for entry in self._path((salt, tuple(tokens[:held]))))

    def find(self, tokens: Sequence[int], salt: str) -> tuple[Prefix, list[int]]:
        handle = (salt, tuple(tokens[: self.match(tokens, salt)[0]]))
        for entry in self._path(handle):
            entry.locks += 1
        return handle, [entry.slot for entry in self._path(handle)]

    def extend(self, handle: Prefix, tokens: Sequence[int], slots: Sequence[int]) -> tuple[Prefix, int]:
        salt, before = handle
        held = 0
        for n, slot in enumerate(slots):
            prefix = (salt, before + tuple(tokens[: n + 1]))
            if prefix in self.entries:
                held += 1
            else:
                self.entries[prefix] = Entry(slot)
            self.entries[prefix].locks += 1
        return (salt, before + tuple(tokens)), held

    def unlock(self, handle: Prefix) -> None:
        self.tick += 1
        for entry in self._path(handle):
            entry.locks -= 1
            entry.used = self.tick

    def held(self, owner: str | None = None) -> set[Prefix]:
        """What pins hold, those of one owner or all."""
        kept = [prefix for name, prefix, _ in self.pins if owner in (None, name)]
        return {(salt, tokens[: n + 1]) for salt, tokens in kept for n in range(len(tokens))}

    @property
    def n_pinned(self) -> int:
        return len(self.held())

    def pin(self, tokens: Sequence[int], salt: str, owner: str, ttl_s: float) -> bool:
        limit = int(self.capacity * (OWNER_SHARE if owner else TOTAL_SHARE))
        prefix, now = (salt, tuple(tokens)), self.clock()
        if not 0 < len(tokens) <= limit or self.match(tokens, salt)[0] < len(tokens):
            return False
        before = max((end for name, kept, end in self.pins if (name, kept) == (owner, prefix)), default=0.0)
        self.pins = [pin for pin in self.pins if pin[2] > now and pin[:2] != (owner, prefix)]
        self.pins.append((owner, prefix, max(before, now + ttl_s)))
        while len(self.held(owner)) > limit:
            self.pins.remove(next(pin for pin in self.pins if pin[0] == owner))
        while len(self.held()) > int(self.capacity * TOTAL_SHARE):
            del self.pins[0]
        return True

    def evict(self, n: int) -> list[int]:
        slots: list[int] = []
        self.pins = [pin for pin in self.pins if pin[2] > self.clock()]
        while len(slots) < n:
            inner = {(salt, tokens[:-1]) for salt, tokens in self.entries} | self.held()
            leaves = [key for key, entry in self.entries.items() if not entry.locks and key not in inner]
            if not leaves:
                free = [pin for pin in self.pins if not self.entries[pin[1]].locks]
                if not free:
                    break
                self.pins.remove(free[0])
                continue
            slots.append(self.entries.pop(min(leaves, key=lambda key: self.entries[key].used)).slot)
        return slots

    def audit(self, handles: Iterable[Prefix]) -> list[int]:
        expected = Counter((salt, tokens[: n + 1]) for salt, tokens in handles for n in range(len(tokens)))
        for key, entry in self.entries.items():
            assert entry.locks == expected[key]
        return [entry.slot for entry in self.entries.values()]
