"""The KV pool as leases: who owns each slot, what is computed, what may be reused (one token per slot, no rounding).

Owns the free list and the leases; called by `engine/scheduler.py`, one call at a time. It knows token ids and slot
numbers, and nothing of requests, models, policy or torch. Every slot 1 .. n_slots - 1 is, at any time, in exactly one
of three places: the free list, one lease (private), or the prefix index. Slot 0 is padding and belongs to nobody.

    lease.slots   [ cached prefix | committed tokens | granted, not yet committed ]     position p lives in slots[p]
                  '- in the index, locked ----------'  '- private ---------------'
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from septet.kv.radix import RadixTree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["KVCache", "Lease", "PrefixIndex"]

EVICT_AT_ONCE = 256  # slots, or this share of a smaller pool: a full pool would else evict for every single token


class PrefixIndex(Protocol):
    """Which token prefixes are held, and in which slots. A handle names a locked path; see `kv/radix.py`."""

    n_slots: int  # held
    n_locked: int  # of these, locked: the rest can be evicted

    @property
    def n_pinned(self) -> int: ...

    def match(self, tokens: array[int], salt: str) -> tuple[int, int]: ...

    def find(self, tokens: array[int], salt: str) -> tuple[Any, list[int]]: ...

    def extend(self, handle: Any, tokens: array[int], slots: Sequence[int]) -> tuple[Any, int]: ...

    def unlock(self, handle: Any) -> None: ...

    def pin(self, tokens: array[int], salt: str, owner: str, ttl_s: float) -> bool: ...

    def evict(self, n: int) -> list[int]: ...

    def audit(self, handles: Iterable[Any]) -> list[int]: ...


@dataclass(slots=True, eq=False)
class Lease:
    """One sequence's hold on the pool. Read `slots`, `n_cached`, `n_committed`; change it through `KVCache` alone."""

    slots: list[int]  # position -> slot
    n_cached: int  # positions that the prefix index gave at `open`
    n_committed: int  # positions whose KV is known to be computed
    handle: Any  # of the index: the path of the committed tokens
    duplicates: list[int] = field(default_factory=list)  # committed here, but the index holds the same tokens elsewhere

    @property
    def n_private(self) -> int:
        """Slots that it brought into use: about what its end gives back."""
        return len(self.slots) - self.n_cached


class KVCache:
    """`open`, `grow`, `commit`, `rewind`, `close`, `audit`: each costs O(tokens touched).

    n_slots: slots of the pool's tensors, the padding slot 0 included, so n_slots - 1 tokens fit.
    """

    def __init__(self, n_slots: int, enable_prefix: bool = True, index: PrefixIndex | None = None) -> None:
        if n_slots < 2:
            raise ValueError(f"n_slots must be at least 2 (slot 0 is padding), not {n_slots}")
        self.capacity = n_slots - 1
        self.enable_prefix = enable_prefix
        self.granted = 0  # sum of len(lease.slots) over open leases: a shared slot counts once for each
        self.version = 0  # changes whenever an answer of `probe` may have changed
        self._index: PrefixIndex = RadixTree(self.capacity) if index is None else index
        self._at_once = max(1, min(EVICT_AT_ONCE, self.capacity // EVICT_AT_ONCE))
        self._free = list(range(n_slots - 1, 0, -1))  # a stack, lowest slot on top: fresh grants are ascending runs
        self._leases: dict[int, Lease] = {}  # by id(lease)

    # -- gauges, in slots: free + cached + leased == capacity ---------------------------------------------------------
    @property
    def free(self) -> int:
        """Held by nobody."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Held by the prefix index alone: evicted when needed."""
        return self._index.n_slots - self._index.n_locked

    @property
    def pinned(self) -> int:
        """Held by pins, cached or leased besides."""
        return self._index.n_pinned

    @property
    def available(self) -> int:
        """What `grow` could grant now."""
        return len(self._free) + self._index.n_slots - self._index.n_locked

    @property
    def leased(self) -> int:
        """Held for open leases, a shared slot counted once."""
        return self.capacity - self.available

    # -- leases -------------------------------------------------------------------------------------------------------
    def probe(self, tokens: array[int], salt: str = "") -> tuple[int, int]:
        """What `n_cached` would be if `tokens` were opened now, and how many of these slots are leased. No change."""
        if not self.enable_prefix:
            return 0, 0
        return self._index.match(tokens[:-1], salt)

    def open(self, tokens: array[int], salt: str = "", reuse: bool = True) -> Lease:
        """A lease on the longest cached prefix of `tokens`, the last token left out so that one is always computed.

        With reuse False the lease starts empty (the caller needs every position computed), but still shares what it
        computes.
        """
        known = tokens[:-1] if reuse and self.enable_prefix else array("i")
        handle, slots = self._index.find(known, salt)
        lease = Lease(slots, len(slots), len(slots), handle)
        self.granted += len(slots)
        self.version += 1
        self._leases[id(lease)] = lease
        return lease

    def grow(self, lease: Lease, n: int) -> tuple[int, ...] | None:
        """Slots for the next `n` positions, evicting cached prefixes if need be. None: not enough, nothing changed."""
        free = self._free
        if len(free) < n and not self._make_room(n):
            return None
        self.granted += n
        if n == 1:
            slot = free.pop()
            lease.slots.append(slot)
            return (slot,)
        taken = free[len(free) - n :]
        del free[len(free) - n :]
        taken.sort()
        lease.slots.extend(taken)
        return tuple(taken)

    def grow_each(self, leases: list[Lease], each: int = 1) -> list[int] | None:
        """Slots for the next `each` positions of every lease, in turn. None: not enough for all, nothing changed."""
        free, n = self._free, len(leases) * each
        if len(free) < n and not self._make_room(n):
            return None
        at = len(free) - n
        taken = free[at:]
        del free[at:]
        taken.reverse()
        if each == 1:
            for lease, slot in zip(leases, taken, strict=True):
                lease.slots.append(slot)
        else:
            for i, lease in enumerate(leases):
                lease.slots += taken[i * each : (i + 1) * each]
        self.granted += n
        return taken

    def commit(self, lease: Lease, tokens: array[int]) -> None:
        """The KV of the next `tokens` after the committed ones is computed: others may share it from now on.

        If another lease committed the same tokens first, the index keeps that one's slots. Ours can't be exchanged,
        since an executor's row reads them, so they stay private duplicates until `close`; tokens after them are
        shared as usual (KV depends on the tokens before it, not on the slots that hold them).
        """
        start, stop = lease.n_committed, lease.n_committed + len(tokens)
        if stop > len(lease.slots):
            raise ValueError(f"commit of positions {start} .. {stop - 1}, but only {len(lease.slots)} slots are leased")
        lease.n_committed = stop
        if not self.enable_prefix:
            lease.duplicates.extend(lease.slots[start:stop])
        elif len(tokens):
            slots = lease.slots[start:stop]
            lease.handle, held = self._index.extend(lease.handle, tokens, slots)
            lease.duplicates.extend(slots[:held])
            self.version += 1

    def pin(self, tokens: array[int], salt: str, owner: str, ttl_s: float) -> bool:
        """Evict these committed tokens only when nothing else is left, for `ttl_s`. Shares and limits: `kv/pins.py`.

        False: they are not cached whole (any more), or more than the owner may pin.
        """
        return self.enable_prefix and self._index.pin(tokens, salt, owner, ttl_s)

    def rewind(self, lease: Lease, length: int) -> None:
        """Give back the slots of positions `length` and up, which must not be committed."""
        if not lease.n_committed <= length <= len(lease.slots):
            raise ValueError(f"rewind to {length}: must lie in {lease.n_committed} .. {len(lease.slots)}")
        self.granted -= len(lease.slots) - length
        self._give_back(lease.slots[length:])
        del lease.slots[length:]

    def close(self, lease: Lease) -> None:
        """End the lease: committed tokens stay cached until evicted, all other slots are free at once."""
        if self._leases.pop(id(lease), None) is None:
            raise ValueError("this lease is closed already, or of another cache")
        self.granted -= len(lease.slots)
        self.version += 1
        self._give_back(lease.slots[lease.n_committed :])
        self._give_back(lease.duplicates)
        self._index.unlock(lease.handle)

    def audit(self) -> None:
        """AssertionError, with the difference, unless each slot has one owner and all locks add up. O(pool)."""
        leases = self._leases.values()
        held = self._index.audit([lease.handle for lease in leases])
        private = [slot for lease in leases for slot in (*lease.duplicates, *lease.slots[lease.n_committed :])]
        owned = sorted([*self._free, *held, *private])
        if owned != list(range(1, self.capacity + 1)):
            lost = sorted(set(range(1, self.capacity + 1)) - set(owned))[:8]
            twice = sorted({slot for slot, after in itertools.pairwise(owned) if slot == after})[:8]
            raise AssertionError(
                f"{len(self._free)} free + {len(held)} held + {len(private)} private slots of {self.capacity}; "
                f"without an owner: {lost}, with two: {twice}"
            )
        granted = sum(len(lease.slots) for lease in leases)
        assert granted == self.granted, f"leases hold {granted} positions, the gauge says {self.granted}"

    # -- slots --------------------------------------------------------------------------------------------------------
    def _make_room(self, n: int) -> bool:
        """Evicts whole lots: what is left then does not depend on how the slots are asked for. For a pin no more than
        is needed."""
        if self.available < n:
            return False
        missing = n - len(self._free)
        lots = -(-missing // self._at_once) * self._at_once
        self._give_back(self._index.evict(min(lots, max(missing, self.cached - self._index.n_pinned))))
        self.version += 1
        return True

    def _give_back(self, slots: list[int]) -> None:
        slots.reverse()  # the stack's top is its end: what came as an ascending run is granted as one again
        self._free.extend(slots)
