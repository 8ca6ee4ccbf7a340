"""Leases against a dictionary of what each slot holds, with an audit after every operation; both prefix indexes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from septet.kv.cache import KVCache, Lease
from tests.kv_oracle import ListIndex

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def ids(tokens: list[int]) -> array[int]:
    return array("i", tokens)


@dataclass
class Held:
    """What the test knows of a lease: its tokens (granted positions and beyond) and how many are committed."""

    lease: Lease
    salt: str
    tokens: list[int]
    committed: int = 0
    written: list[int] = field(default_factory=list)


class Leases(RuleBasedStateMachine):
    """`content[slot]` is the (salt, prefix) whose last token's KV was written there, as a device would have it."""

    @initialize(n_slots=st.integers(2, 40), prefix=st.booleans(), scan=st.booleans())
    def start(self, n_slots: int, prefix: bool, scan: bool) -> None:
        self.cache = KVCache(n_slots, prefix, ListIndex() if scan else None)
        self.n_slots = n_slots
        self.content: dict[int, tuple] = {}
        self.held: list[Held] = []

    def pick(self, which: int) -> Held:
        return self.held[which % len(self.held)]

    @rule(tokens=TOKENS, salt=st.sampled_from(["", "a"]), reuse=st.booleans())
    def open(self, tokens: list[int], salt: str, reuse: bool) -> None:
        probe = self.cache.probe(ids(tokens), salt)[0]
        lease = self.cache.open(ids(tokens), salt, reuse)
        assert lease.n_cached == len(lease.slots) == (probe if reuse else 0)
        assert lease.n_cached < len(tokens)
        for position, slot in enumerate(lease.slots):
            assert self.content[slot] == (salt, tuple(tokens[: position + 1]))
        self.held.append(Held(lease, salt, tokens, lease.n_cached))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), n=st.integers(0, 12), more=st.lists(st.integers(0, 2), min_size=12, max_size=12))
    def grow(self, which: int, n: int, more: list[int]) -> None:
        held = self.pick(which)
        before, free = list(held.lease.slots), self.cache.available
        gauges = (self.cache.free, self.cache.cached)
        slots = self.cache.grow(held.lease, n)
        if slots is None:
            assert n > free
            assert held.lease.slots == before
            assert gauges == (self.cache.free, self.cache.cached)
            return
        assert n <= free
        assert held.lease.slots == before + list(slots)
        assert len(set(slots)) == len(slots) == n
        held.tokens = (held.tokens + more)[: max(len(held.tokens), len(held.lease.slots))]
        for position in range(len(before), len(before) + n):
            self.content[held.lease.slots[position]] = (held.salt, tuple(held.tokens[: position + 1]))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), n=st.integers(0, 12))
    def commit(self, which: int, n: int) -> None:
        held = self.pick(which)
        stop = min(held.committed + n, len(held.lease.slots))
        self.cache.commit(held.lease, ids(held.tokens[held.committed : stop]))
        held.committed = stop
        if self.cache.enable_prefix:
            assert self.cache.probe(ids([*held.tokens[:stop], 0]), held.salt)[0] >= stop

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), back=st.integers(0, 12))
    def rewind(self, which: int, back: int) -> None:
        held = self.pick(which)
        length = max(held.committed, len(held.lease.slots) - back)
        free = self.cache.free
        given = len(held.lease.slots) - length
        self.cache.rewind(held.lease, length)
        assert self.cache.free == free + given

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        held = self.held.pop(which % len(self.held))
        self.cache.close(held.lease)

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        cache.audit()
        assert cache.free + cache.cached + cache.leased == cache.capacity == self.n_slots - 1
        for held in self.held:  # nobody has written over a live lease
            for position, slot in enumerate(held.lease.slots):
                assert slot != 0
                assert self.content[slot] == (held.salt, tuple(held.tokens[: position + 1]))
        if not self.held:
            assert cache.leased == 0


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def computed(cache: KVCache, tokens: list[int], salt: str = "") -> Lease:
    lease = cache.open(ids(tokens), salt)
    assert cache.grow(lease, len(tokens) - lease.n_cached) is not None
    cache.commit(lease, ids(tokens[lease.n_cached :]))
    return lease


def test_committed_tokens_are_shared_before_the_lease_closes() -> None:
    cache = KVCache(21)
    first = computed(cache, [1, 2, 3, 4, 5])
    second = cache.open(ids([1, 2, 3, 9, 9]))
    assert second.slots == first.slots[:3]
    assert (cache.free, cache.cached, cache.leased) == (15, 0, 5)


def test_the_last_token_is_always_left_to_compute() -> None:
    cache = KVCache(21)
    cache.close(computed(cache, [1, 2, 3]))
    assert cache.open(ids([1, 2, 3])).n_cached == 2
    assert cache.open(ids([1, 2, 3, 4])).n_cached == 3


def test_salts_share_nothing() -> None:
    cache = KVCache(21)
    cache.close(computed(cache, [1, 2, 3], "alice"))
    assert cache.open(ids([1, 2, 3, 4]), "bob").n_cached == 0
    assert cache.open(ids([1, 2, 3, 4]), "alice").n_cached == 3


def test_what_two_leases_compute_at_once_is_kept_once() -> None:
    cache = KVCache(21)
    one, two = cache.open(ids([1, 2, 3, 4])), cache.open(ids([1, 2, 3, 5, 6]))
    cache.grow(one, 4), cache.grow(two, 5)
    cache.commit(one, ids([1, 2, 3, 4]))
    mine = list(two.slots)
    cache.commit(two, ids([1, 2, 3, 5, 6]))
    assert two.slots == mine, "a row on the device reads these"
    third = cache.open(ids([1, 2, 3, 5, 6, 7]))
    assert third.slots == one.slots[:3] + mine[3:]
    cache.audit()
    for lease in (one, two, third):
        cache.close(lease)
    assert (cache.free, cache.cached) == (14, 6)
    cache.audit()


def test_growing_evicts_the_least_recently_used() -> None:
    cache = KVCache(11)
    cache.close(computed(cache, [1, 1, 1, 1]))
    cache.close(computed(cache, [2, 2, 2, 2]))
    cache.close(cache.open(ids([1, 1, 1, 1, 1])))  # touch the first
    lease = cache.open(ids([3, 3, 3, 3, 3]))
    assert cache.grow(lease, 5) is not None
    assert cache.probe(ids([1, 1, 1, 1, 0])) == (4, 0)
    assert cache.probe(ids([2, 2, 2, 2, 0])) == (1, 0), "only as many as needed, from the end"


def test_fresh_slots_are_one_ascending_run_and_never_slot_0() -> None:
    cache = KVCache(101)
    lease = cache.open(ids([1] * 50))
    assert cache.grow(lease, 60) == tuple(range(1, 61))
    cache.close(lease)
    assert cache.grow(cache.open(ids([1])), 100) == tuple(range(1, 101))


def test_without_prefix_caching_nothing_stays() -> None:
    cache = KVCache(21, enable_prefix=False)
    cache.close(computed(cache, [1, 2, 3]))
    assert cache.free == 20
    assert cache.probe(ids([1, 2, 3, 4])) == (0, 0)


def test_misuse_is_refused() -> None:
    cache = KVCache(21)
    lease = computed(cache, [1, 2, 3])
    with pytest.raises(ValueError, match="only 3 slots are leased"):
        cache.commit(lease, ids([4]))
    with pytest.raises(ValueError, match=r"must lie in 3 \.\. 3"):
        cache.rewind(lease, 2)
    cache.close(lease)
    with pytest.raises(ValueError, match="closed already"):
        cache.close(lease)
    with pytest.raises(ValueError, match="at least 2"):
        KVCache(1)


def test_audit_names_lost_and_doubled_slots() -> None:
    cache = KVCache(11)
    lease = cache.open(ids([1, 2]))
    cache.grow(lease, 2)
    lease.slots[1] = lease.slots[0]
    with pytest.raises(AssertionError, match=r"without an owner: \[2\], with two: \[1\]"):
        cache.audit()
