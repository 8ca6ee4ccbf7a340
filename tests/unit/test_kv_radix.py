"""The radix tree against a list scan: the same answers to random finds, extensions, unlocks and evictions."""

from __future__ import annotations

import time
from array import array
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    ),
    max_size=40,
)


def ids(tokens: list[int] | range) -> array[int]:
    return array("i", tokens)


@settings(max_examples=400, deadline=None)
@given(OPS)
def test_tree_answers_as_a_list_scan(ops: list[tuple]) -> None:
    tree, scan, fresh = RadixTree(), ListIndex(), count(1)
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
