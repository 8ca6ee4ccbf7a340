"""A bounded look at the pool for people who watch: which cells of it are free, leased or shared, and the tree's top.

Called by `engine/scope.py`, between two steps, while somebody watches. Reads the cache and the tree and changes
neither. Its cost is bounded by the constants here whatever the pool holds: slots are sampled, wide branches cut.
"""

from __future__ import annotations

import heapq
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

from septet.kv.radix import RadixTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.kv.cache import KVCache
    from septet.kv.radix import Node

__all__ = ["Branch", "PoolMap", "look"]

PER_CELL = 4  # free slots looked at
SAMPLES = 128  # leased slots looked at, about
MAX_LEASES = 64
NEWEST, OLDEST = 12, 4  # children looked at below one node
HEAD = 12  # token ids told of a branch


class PoolMap(NamedTuple):
    """Per cell of equally many slots: how many of them, about, are free, leased, and leased more than once."""

    cell_slots: int
    free: list[int]
    leased: list[int]
    shared: list[int]


class Branch(NamedTuple):
    """One node of the tree's top. `parent`: its index among those told, -1 below a root."""

    parent: int
    n_tokens: int
    locks: int  # leases that run through it
    hits: int  # requests that found it computed
    n_children: int
    head: tuple[int, ...]  # its first token ids


def look(cache: KVCache, n_cells: int, n_branches: int) -> tuple[PoolMap, list[Branch]]:
    """The pool's map and the tree's top, each branch after its parent, the most used and longest first."""
    nodes = _top(cache, n_branches)
    branches = [
        Branch(parent, len(node.tokens), node.locks, node.hits, len(node.children), tuple(node.tokens[:HEAD]))
        for parent, node in nodes
    ]
    return _pool_map(cache, n_cells, [node for _, node in nodes]), branches


def _pool_map(cache: KVCache, n_cells: int, nodes: list[Node]) -> PoolMap:
    """Where the pool's slots are. What is neither free nor leased is cached.

    Of each lease those slots are sampled that it brought into use; what it shares, where the tree's top holds it.
    """
    size = max(1, -(-cache.capacity // n_cells))
    n = -(-cache.capacity // size)
    free, leased, shared = [0] * n, [0] * n, [0] * n
    every = max(1, size // PER_CELL)  # the free list is made of long runs: cells that are all free come out full
    for slot in cache._free[::every]:
        free[(slot - 1) // size] += every
    every = max(1, cache.leased // SAMPLES)
    sample: list[int] = []
    for lease in islice(cache._leases.values(), MAX_LEASES):
        sample += lease.slots[lease.n_cached :: every]
    for slot in sample:
        leased[(slot - 1) // size] += every
    for node in nodes:
        if node.locks > 1:
            for slot in node.slots[::every]:
                shared[(slot - 1) // size] += every
    return PoolMap(size, free, leased, shared)


def _top(cache: KVCache, n: int) -> list[tuple[int, Node]]:
    """(index of the parent among these or -1, node) of up to `n` nodes."""
    tree = cache._index
    if not isinstance(tree, RadixTree):
        return []
    found: list[tuple[int, Node]] = []
    numbers = count()
    heap = [
        (-_weight(node), next(numbers), -1, node)
        for root in islice(reversed(tree._roots.values()), NEWEST)
        for node in _children(root)
    ]
    heapq.heapify(heap)
    while heap and len(found) < n:
        _, _, parent, node = heapq.heappop(heap)
        for child in _children(node):
            heapq.heappush(heap, (-_weight(child), next(numbers), len(found), child))
        found.append((parent, node))
    return found


def _weight(node: Node) -> int:
    """Tokens that the cache has saved here, and those that it holds."""
    return (node.hits + node.locks) * len(node.tokens) + len(node.tokens)


def _children(node: Node) -> Iterator[Node]:
    """The newest children and a few of the oldest: a split keeps the place of what it splits."""
    children = node.children
    if len(children) <= NEWEST + OLDEST:
        yield from children.values()
        return
    yield from islice(children.values(), OLDEST)
    yield from islice(reversed(children.values()), NEWEST)
