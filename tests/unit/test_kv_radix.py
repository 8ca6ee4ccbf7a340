"""The radix tree against a list scan: the same answers to random finds, extensions, unlocks and evictions."""

from __future__ import annotations

import time
from array import array
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.kv.pins import MAX_OWNER_PINS, MAX_PINS
from septet.kv.radix import RadixTree, common_length
from tests.kv_oracle import ListIndex

TOKENS = st.lists(st.integers(0, 1), max_size=3) | st.lists(st.integers(0, 2), max_size=12)
SALTS = st.sampled_from(["", "a"])
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("find"), TOKENS, SALTS),
        st.tuples(st.just("extend"), st.integers(0, 7), TOKENS),
        st.tuples(st.just("unlock"), st.integers(0, 7)),
        st.tuples(st.just("evict"), st.integers(0, 10)),
        st.tuples(st.just("pin"), TOKENS, SALTS, st.sampled_from(["", "alice", "bob"]), st.sampled_from([5.0, 60.0])),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 10.0])),
    ),
    max_size=40,
)


def ids(tokens: list[int] | range) -> array[int]:
    return array("i", tokens)


@settings(max_examples=400, deadline=None)
@given(OPS)
def test_tree_answers_as_a_list_scan(ops: list[tuple]) -> None:
    now = 0.0
    tree, scan, fresh = RadixTree(24, lambda: now), ListIndex(24, lambda: now), count(1)
    handles: list[tuple] = []  # (tree's, scan's)
    for op, *args in ops:
        match op, args:
            case "find", (tokens, salt):
                assert tree.match(ids(tokens), salt) == scan.match(tokens, salt)
                (node, slots), (prefix, expected) = tree.find(ids(tokens), salt), scan.find(tokens, salt)
                assert slots == expected
                handles.append((node, prefix))
            case "extend", (which, tokens) if handles:
                node, prefix = handles.pop(which % len(handles))
                slots = [next(fresh) for _ in tokens]
                (node, held), (prefix, expected) = (
                    tree.extend(node, ids(tokens), slots),
                    scan.extend(prefix, tokens, slots),
                )
                assert held == expected
                handles.append((node, prefix))
            case "unlock", (which,) if handles:
                node, prefix = handles.pop(which % len(handles))
                tree.unlock(node)
                scan.unlock(prefix)
            case "evict", (n,):
                assert sorted(tree.evict(n)) == sorted(scan.evict(n))
            case "pin", (tokens, salt, owner, ttl_s):
                assert tree.pin(ids(tokens), salt, owner, ttl_s) == scan.pin(tokens, salt, owner, ttl_s)
            case "wait", (seconds,):
                now += seconds
        assert tree.n_pinned == scan.n_pinned
        assert (tree.n_slots, tree.n_locked) == (scan.n_slots, scan.n_locked)
        held = tree.audit(node for node, _ in handles)
        assert sorted(held) == sorted(scan.audit(prefix for _, prefix in handles))


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=30), st.integers(0, 12))
def test_common_length_counts_equal_leading_tokens(a: list[int], b: list[int], at: int) -> None:
    at = min(at, len(b))
    expected = next((i for i, (x, y) in enumerate(zip(a, b[at:], strict=False)) if x != y), min(len(a), len(b) - at))
    assert common_length(ids(a), ids(b), at) == expected


def test_an_empty_namespace_leaves_nothing_behind() -> None:
    tree = RadixTree()
    for i in range(10):
        node, _ = tree.find(ids([1, 2]), f"salt {i}")
        node, _ = tree.extend(node, ids([1, 2]), [2 * i + 1, 2 * i + 2])
        tree.unlock(node)
    assert len(tree.evict(100)) == 20
    node, _ = tree.find(ids([1]), "never extended")
    tree.unlock(node)
    assert tree._roots == {}


def test_a_growing_leaf_stays_one_edge() -> None:
    tree = RadixTree()
    node, _ = tree.find(ids([]), "")
    for i in range(1, 101):
        node, _ = tree.extend(node, ids([i]), [i])
    assert tree._n_nodes == 1
    assert tree.match(ids(range(1, 101)), "") == (100, 100)


def test_a_path_that_two_leases_end_on_does_not_grow() -> None:
    tree = RadixTree()
    one, _ = tree.find(ids([1, 2]), "")
    one, _ = tree.extend(one, ids([1, 2]), [1, 2])
    two, slots = tree.find(ids([1, 2]), "")
    assert slots == [1, 2]
    tree.extend(one, ids([3]), [3])
    tree.extend(two, ids([4]), [4])
    assert tree.match(ids([1, 2, 3, 4]), "")[0] == 3
    assert tree.match(ids([1, 2, 4]), "")[0] == 3


def test_stale_heap_entries_are_bounded() -> None:
    tree = RadixTree()
    node, _ = tree.find(ids([1]), "")
    node, _ = tree.extend(node, ids([1, 2, 3]), [1, 2, 3])
    tree.unlock(node)
    for _ in range(1000):
        node, _ = tree.find(ids([1, 2, 3]), "")
        tree.unlock(node)
    assert len(tree._heap) <= 2 * tree._n_nodes + 65
    assert sorted(tree.evict(3)) == [1, 2, 3]


def test_matching_compares_runs_and_not_tokens() -> None:
    tree, n = RadixTree(), 400_000
    tokens = ids(range(n))
    node, _ = tree.find(tokens, "")
    tree.extend(node, tokens, range(1, n + 1))
    tokens[-2] = 0
    times = []
    for _ in range(5):
        start = time.thread_time()
        assert tree.match(tokens, "")[0] == n - 2
        times.append(time.thread_time() - start)
    assert min(times) < 0.010, "a loop over 400,000 tokens takes longer than this"


def test_audit_finds_a_lock_too_many() -> None:
    tree = RadixTree()
    node, _ = tree.find(ids([1]), "")
    node, _ = tree.extend(node, ids([1, 2]), [1, 2])
    with pytest.raises(AssertionError, match="1 locks, 0 leases"):
        tree.audit([])


def computed(tree: RadixTree, tokens: list[int], first_slot: int) -> None:
    """Hold `tokens`, unlocked, the newest."""
    node, _ = tree.find(ids([]), "")
    node, _ = tree.extend(node, ids(tokens), range(first_slot, first_slot + len(tokens)))
    tree.unlock(node)


def test_a_pin_outlives_younger_prefixes_until_its_time_is_over() -> None:
    now = 0.0
    tree = RadixTree(100, lambda: now)
    computed(tree, [1, 2, 3, 4], 1)
    assert tree.pin(ids([1, 2, 3]), "", "", 300.0)
    assert not tree.pin(ids([1, 2, 9]), "", "", 300.0), "what is not there can't be held"
    for i in range(10):
        now += 29.0
        computed(tree, [50 + i, 7, 7, 7], 10)
        tree.evict(4)
        assert tree.match(ids([1, 2, 3, 4]), "")[0] == 3
    now = 300.0
    computed(tree, [99, 7, 7, 7], 10)
    tree.evict(3)
    assert tree.match(ids([1, 2, 3]), "")[0] == 0
    assert tree.match(ids([99, 7, 7, 7]), "")[0] == 4
    assert tree.n_pinned == 0


def test_a_pin_asked_for_again_lasts_longer_and_is_the_newest() -> None:
    now = 0.0
    tree = RadixTree(100, lambda: now)
    for i in range(3):
        computed(tree, [i, 7, 7], 1 + 3 * i)
        assert tree.pin(ids([i, 7, 7]), "", "", 300.0)
    now = 200.0
    assert tree.pin(ids([0, 7, 7]), "", "", 300.0)
    now = 400.0
    assert tree.n_pinned == 9, "told when somebody asks for room"
    assert sorted(tree.evict(6)) == [4, 5, 6, 7, 8, 9]
    assert tree.n_pinned == 3


def test_pins_give_way_when_nothing_else_is_left_the_oldest_first() -> None:
    tree = RadixTree(100)
    for i in range(3):
        computed(tree, [i, 7, 7], 1 + 3 * i)
        assert tree.pin(ids([i, 7, 7]), "", "", 300.0)
    node, _ = tree.find(ids([0, 7, 7]), "")
    assert sorted(tree.evict(4)) == [4, 5, 6, 9], "not the oldest: a lease locks it, so its pin would free nothing"
    tree.audit([node])
    assert tree.n_pinned == 3
    assert tree.match(ids([2, 7, 7]), "")[0] == 2, "only as much as was needed"


def test_pins_keep_to_their_shares() -> None:
    tree = RadixTree(100)
    for i in range(8):
        computed(tree, [i] * 10, 1 + 10 * i)
    assert not tree.pin(ids([0] * 26), "", "alice", 300.0)
    for i in (0, 1, 2):  # 25 of 100 slots are one owner's
        assert tree.pin(ids([i] * 10), "", "alice", 300.0)
    assert tree.n_pinned == 20, "her first gave way to her third"
    for owner, i in (("bob", 3), ("bob", 4), ("eve", 5), ("eve", 6)):
        assert tree.pin(ids([i] * 10), "", owner, 300.0)
    assert tree.n_pinned == 50, "of all of them together half the pool"
    tree.evict(30)
    assert [tree.match(ids([i] * 10), "")[0] for i in range(8)] == [0, 0, 10, 10, 10, 10, 10, 0]
    tree.audit([])


def test_a_pinned_leaf_does_not_grow_with_its_next_lease() -> None:
    tree = RadixTree(100)
    computed(tree, [1, 2], 1)
    assert tree.pin(ids([1, 2]), "", "", 300.0)
    node, _ = tree.find(ids([1, 2]), "")
    node, _ = tree.extend(node, ids([3, 4]), [3, 4])
    tree.unlock(node)
    assert tree.n_pinned == 2
    assert sorted(tree.evict(2)) == [3, 4]


def test_pins_are_bounded_in_number() -> None:
    tree = RadixTree(2**20)
    computed(tree, list(range(2 * MAX_OWNER_PINS)), 1)
    for n in range(1, 2 * MAX_OWNER_PINS):
        assert tree.pin(ids(range(n)), "", "alice", 300.0)
    assert len(tree._pins) == MAX_OWNER_PINS
    for i in range(MAX_PINS + 10):
        computed(tree, [7, i], 10**6 + 2 * i)
        assert tree.pin(ids([7, i]), "", f"owner {i}", 300.0)
    assert len(tree._pins) == MAX_PINS
    tree.audit([])
