"""Token-level radix tree over KV slots: which prefixes are computed, and where (RadixAttention, arXiv 2312.07104).

Owns the tree's shape, its locks and the order of eviction; called by `kv/cache.py` alone. It knows token ids and slot
numbers as plain integers, and nothing of requests, models, policy or torch. The same contract is kept by a list scan
in tests/kv_oracle.py, which is this file's oracle.

    root("")  --[1 2 3]--> a --[4 5]--> b          an edge holds a run of tokens and the run of slots that hold their
              slots 7 8 9    |  slots 1 2          KV; the first token of an edge is its key among its siblings
                             +--[6]----> c
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.kv.pins import Pins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from septet.kv.pins import Pin

__all__ = ["Node", "RadixTree", "common_length"]


@dataclass(slots=True, eq=False)
class Node:
    """The end of one edge. Invariants: len(tokens) == len(slots); only a root's run is empty.

    `locks` counts the leases whose path runs through this edge, so a node is locked at least as often as each of its
    children, and everything below an unlocked node is unlocked.
    """

    parent: Node | None
    tokens: array[int]
    slots: array[int]
    locks: int = 0
    used: int = 0  # tick of the last unlock on this path
    children: dict[int, Node] = field(default_factory=dict)  # by the first token of the child's run
    salt: str = ""  # of a root: its key
    hits: int = 0  # leases that were opened on a path through this edge
    pins: dict[str, int] = field(default_factory=dict)  # owner -> pins whose path runs through this edge


def common_length(a: array[int], b: array[int], at: int = 0) -> int:
    """How many leading tokens of `a` equal b[at:]. Compares runs in C, then bisects: no loop per token."""
    high = min(len(a), len(b) - at)
    if a[:high] == b[at : at + high]:
        return high
    low = 0
    while high - low > 1:  # a[:low] agrees, a[:high] does not
        middle = (low + high) // 2
        if a[low:middle] == b[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low


class RadixTree:
    """Prefixes of every namespace (`salt`), each under a root of its own: no prefix is shared across salts.

    A `Node` is also the handle that callers keep: it names the whole path from its root, and a split never changes
    what a handle names, since a split puts the new node above. Handles are valid while locked or pinned. Eviction
    takes the least recently unlocked leaf, from the tail of its run; pinned ones only when nothing else is left.

    capacity: slots of the pool, which pins may hold a share of.
    """

    def __init__(self, capacity: int = 2**40, clock: Callable[[], float] = time.monotonic) -> None:
        self.n_slots = 0  # held by the tree
        self.n_locked = 0  # of these, on the path of some lease
        self._roots: dict[str, Node] = {}
        self._tick = 0
        self._n_nodes = 0  # without roots
        self._heap: list[tuple[int, int, Node]] = []  # (rank, push number, leaf), stale entries included
        self._pushes = 0
        self._pins = Pins(capacity)
        self._clock = clock

    # -- looking up ---------------------------------------------------------------------------------------------------
    def match(self, tokens: array[int], salt: str) -> tuple[int, int]:
        """How many leading tokens the tree holds, and how many of these some lease locks. Changes nothing."""
        node, at, locked = self._roots.get(salt), 0, 0
        while node is not None and at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            same = common_length(child.tokens, tokens, at)
            at += same
            locked = at if child.locks else locked
            node = child if same == len(child.tokens) else None
        return at, locked

    def find(self, tokens: array[int], salt: str) -> tuple[Node, list[int]]:
        """The handle of the longest held prefix of `tokens`, locked, and its slots. The caller unlocks it."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node(None, array("i"), array("i"), salt=salt)
        node, slots = self._descend(root, tokens, 0)
        self._lock(node, above=None)
        return node, slots

    def extend(self, node: Node, tokens: array[int], slots: Sequence[int]) -> tuple[Node, int]:
        """Hold `tokens` in `slots` below the locked handle `node`: the new handle, and how many were held already.

        The caller's lock moves down to the new handle. The tree keeps its own slots for the tokens it held already;
        it takes over the caller's slots for the rest.
        """
        end, held = self._descend(node, tokens, 0)
        known = len(held)
        self._lock(end, above=node)
        if known < len(tokens):
            end = self._append(end, tokens[known:], array("i", slots[known:]))
        return end, known

    # -- locks --------------------------------------------------------------------------------------------------------
    def _lock(self, node: Node, above: Node | None) -> None:
        """Lock the path from `node` up to its root, or up to `above`, which itself is left alone."""
        step: Node | None = node
        while step is not above and step is not None:
            if step.locks == 0:
                self.n_locked += len(step.slots)
            step.locks += 1
            step.hits += above is None
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Give one lock of the path back. What nobody locks any more may be evicted from now on, most recent last."""
        self._tick += 1
        step: Node | None = node
        while step is not None:
            step.locks -= 1
            step.used = self._tick
            if step.locks == 0:
                self.n_locked -= len(step.slots)
            step = step.parent
        self._offer(node)

    # -- pins ---------------------------------------------------------------------------------------------------------
    @property
    def n_pinned(self) -> int:
        return self._pins.n_slots

    def pin(self, tokens: array[int], salt: str, owner: str, ttl_s: float) -> bool:
        """Hold a prefix for `ttl_s` from now, behind all that is not pinned in the order of eviction.

        False: it is not held whole, or longer than pins may be. Older pins give way where a share would be passed, the
        owner's own first.
        """
        known = 0 < len(tokens) <= self._pins.limit(owner) and self.match(tokens, salt)[0] == len(tokens)
        if not known:
            return False
        now = self._clock()
        self._end_pins(now)
        self._pins.add(self._descend(self._roots[salt], tokens, 0)[0], owner, now + ttl_s)
        while (surplus := self._pins.surplus(owner)) is not None:
            self._unpin(surplus)
        return True

    def _end_pins(self, now: float) -> None:
        for pin in self._pins.ended(now):
            self._unpin(pin)

    def _unpin(self, pin: Pin) -> None:
        self._offer(self._pins.drop(pin))

    # -- giving back --------------------------------------------------------------------------------------------------
    def evict(self, n: int) -> list[int]:
        """Forget up to `n` tokens, least recently used first, and return their slots. Locked paths stay.

        Pins give way, the oldest first, when nothing else is left.
        """
        slots: list[int] = []
        if self._pins:
            self._end_pins(self._clock())
        while len(slots) < n:
            leaf = self._oldest()
            if leaf is None:
                pin = self._pins.unlocked()
                if pin is None:
                    break
                self._unpin(pin)
                continue
            keep = max(0, len(leaf.slots) - (n - len(slots)))
            slots.extend(leaf.slots[keep:])
            if keep:
                del leaf.tokens[keep:], leaf.slots[keep:]
            else:
                heapq.heappop(self._heap)
                self._remove(leaf)
        self.n_slots -= len(slots)
        return slots

    def _oldest(self) -> Node | None:
        """The leaf to be evicted next, at the top of the heap."""
        while self._heap:
            used, _, leaf = self._heap[0]
            if used == leaf.used and _is_evictable(leaf):
                return leaf
            heapq.heappop(self._heap)
        return None

    def audit(self, handles: Iterable[Node]) -> list[int]:
        """Every slot the tree holds. AssertionError if locks, counts or edges disagree with `handles`. O(tree)."""
        expected: Counter[int] = Counter()
        for handle in handles:
            step: Node | None = handle
            while step is not None:
                expected[id(step)] += 1
                step = step.parent
        pinned: Counter[tuple[int, str]] = Counter()
        for pin in self._pins:
            step = pin.node
            while step is not None:
                pinned[id(step), pin.owner] += step.parent is not None
                step = step.parent
        slots: list[int] = []
        n_locked = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            assert node.locks == expected[id(node)], f"{node.locks} locks, {expected[id(node)]} leases on {node.slots}"
            assert len(node.tokens) == len(node.slots), f"{len(node.tokens)} tokens in {node.slots}"
            assert all(pinned.pop((id(node), o), 0) == n for o, n in node.pins.items()), f"pins lost on {node.slots}"
            for key, child in node.children.items():
                assert child.parent is node, f"a lost edge to {child.slots}"
                assert child.tokens[0] == key, f"edge {child.slots} filed under {key}"
            slots.extend(node.slots)
            n_locked += len(node.slots) if node.locks else 0
            stack.extend(node.children.values())
        assert not +pinned, f"{len(+pinned)} pins on nodes that are gone or do not count them"
        self._pins.audit()
        assert (len(slots), n_locked) == (self.n_slots, self.n_locked), "the tree's gauges are off"
        return slots

    # -- shape --------------------------------------------------------------------------------------------------------
    def _descend(self, node: Node, tokens: array[int], at: int) -> tuple[Node, list[int]]:
        """Follow tokens[at:] below `node` as far as held; splits the last edge if the match ends inside it."""
        slots: list[int] = []
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            same = common_length(child.tokens, tokens, at)
            if same < len(child.tokens):
                child = self._split(child, same)
                slots.extend(child.slots)
                return child, slots
            slots.extend(child.slots)
            node, at = child, at + same
        return node, slots

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node above `node` that holds the first `at` tokens of its run: parent -> upper -> node."""
        assert node.parent is not None
        upper = Node(node.parent, node.tokens[:at], node.slots[:at], node.locks, node.used, hits=node.hits)
        upper.pins = dict(node.pins)
        node.parent.children[upper.tokens[0]] = upper
        del node.tokens[:at], node.slots[:at]
        node.parent = upper
        upper.children[node.tokens[0]] = node
        self._n_nodes += 1
        return upper

    def _append(self, node: Node, tokens: array[int], slots: array[int]) -> Node:
        """Add a run below `node`, locked once. A leaf that only this caller locks simply grows: edges stay long."""
        self.n_slots += len(slots)
        self.n_locked += len(slots)
        if node.locks == 1 and not node.children and node.parent is not None and not node.pins:
            node.tokens.extend(tokens)
            node.slots.extend(slots)
            return node
        child = Node(node, tokens, slots, locks=1)
        node.children[tokens[0]] = child
        self._n_nodes += 1
        return child

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[0]]
        leaf.parent = None
        self._n_nodes -= 1
        self._offer(parent)

    # -- order of eviction --------------------------------------------------------------------------------------------
    def _offer(self, node: Node) -> None:
        """Enter an evictable leaf into the heap; drop an empty root. Entries that turn stale are skipped when met."""
        if node.parent is None and node.locks == 0 and not node.children:
            del self._roots[node.salt]
        if not _is_evictable(node):
            return
        self._pushes += 1
        heapq.heappush(self._heap, (node.used, self._pushes, node))
        if len(self._heap) > 2 * self._n_nodes + 64:
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].used and _is_evictable(entry[2])]
            heapq.heapify(self._heap)


def _is_evictable(node: Node) -> bool:
    return node.locks == 0 and not node.children and not node.pins and node.parent is not None
