"""Stop strings in a stream of text: what may be shown now, and whether generation ends here.

Called by the session, one per sequence. Holds back only what could still become a stop string. The stop that ends
first wins, and of those that end together the longest, so the answer does not depend on how text was cut into pieces.
Aho-Corasick (CACM 18, 1975): time is linear in the text, whatever the number of stop strings.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["StopMatcher"]


class StopMatcher:
    """`include`: a matched stop string is itself emitted. Stops must not be empty (`SamplingParams` sees to it)."""

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._include = include
        self._next: list[dict[str, int]] = [{}]  # node -> character -> node; node 0 is the root
        self._depth = [0]  # characters from the root
        self._stop: list[str | None] = [None]  # longest stop string that ends at this node
        for stop in stops:
            self._insert(stop)
        self._fail = self._links()
        self._node = 0
        self._held = ""  # the last characters seen, as many as the depth of `_node`
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """-> (text to emit, the stop string that matched or None). After a match nothing more is emitted."""
        if self.matched is not None:
            return "", self.matched
        if len(self._next) == 1:
            return text, None
        seen = self._held + text
        node = self._node
        for i, character in enumerate(text, start=len(self._held) + 1):
            node = self._step(node, character)
            if (stop := self._stop[node]) is not None:
                self.matched, self._held = stop, ""
                return seen[: i if self._include else i - len(stop)], stop
        self._node = node
        free = len(seen) - self._depth[node]
        self._held = seen[free:]
        return seen[:free], None

    def finish(self) -> str:
        """Generation ended without a stop string: what was held back."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(character, 0)

    def _insert(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string must not be empty")
        node = 0
        for character in stop:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._stop.append(None)
            node = self._next[node][character]
        self._stop[node] = stop

    def _links(self) -> list[int]:
        """node -> the node of its longest proper suffix; breadth first, so shallower links exist already."""
        self._fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], character)
                queue.append(child)
            if self._stop[node] is None:
                self._stop[node] = self._stop[self._fail[node]]
        return self._fail
