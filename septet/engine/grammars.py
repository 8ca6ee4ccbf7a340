"""Requests that wait for their grammar, and the grammars of those that run.

Owned and called by `engine/loop.py`; `constraints.py` takes its matchers here. A constrained request enters the
scheduler only when its grammar is ready: it holds no row, no slot and nobody up before, and one whose grammar is
refused ends alone. Knows no torch; the compiler comes in with the first constrained request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from septet.grammar.compiler import Compiler, Grammar, Lane
    from septet.grammar.vocabulary import Vocabulary
    from septet.request import Request
    from septet.structured import Structured

__all__ = ["GrammarReady", "Grammars"]


@dataclass(frozen=True, slots=True)
class GrammarReady:
    """Put into the loop's own inbox by a compiler's thread: look at this request again. Never on the wire."""

    request: str


class Grammars:
    """`teach` once; then for each constrained request `wait`, `ready` when told, `release` when it has ended.

    `notify` (set by the loop) is called from other threads.
    """

    def __init__(self, vocab_size: int, max_waiting: int = 4096) -> None:
        self.vocab_size = vocab_size
        self.max_waiting = max_waiting
        self.max_lanes = 0  # of one grammar; 0 = as many as threads make masks
        self.notify: Callable[[Any], None] = lambda message: None
        self._compiler: Compiler | None = None
        self._waiting: dict[str, tuple[Request, Future[Grammar]]] = {}
        self._held: dict[str, tuple[Structured, Grammar, Lane]] = {}
        self._users: Counter[Structured] = Counter()  # that wait for it or hold it

    def teach(self, vocabulary: Vocabulary) -> None:
        """What the tokens stand for; the first word counts."""
        from septet.grammar.compiler import Compiler
        from septet.grammar.masks import mask_threads

        if self._compiler is None and len(vocabulary) and vocabulary.eos:
            self._compiler = Compiler(vocabulary, self.vocab_size, max_lanes=self.max_lanes or mask_threads())

    def wait(self, request: Request) -> None:
        """Take in a constrained request; GrammarReady follows. InvalidRequest or Overloaded: it can't wait here."""
        structured = request.params.structured
        assert structured is not None
        if self._compiler is None:
            raise InvalidRequest("this engine was not given a vocabulary for grammars", param="structured")
        if request.id in self._waiting or request.id in self._held:
            raise InvalidRequest(f"a request with id {request.id!r} is under way", param="id")
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait for their grammars already: try again later")
        users = self._users
        users[structured] += 1
        future = self._compiler.request(structured, lambda: users[structured])
        self._waiting[request.id] = (request, future)
        notify, ready = self.notify, GrammarReady(request.id)
        future.add_done_callback(lambda _: notify(ready))

    def ready(self, id: str) -> Request | None:
        """The request whose grammar is there, to be submitted; None if it has gone. Raises what compiling raised."""
        entry = self._waiting.get(id)
        if entry is None:
            return None
        request, future = entry
        structured = request.params.structured
        assert structured is not None
        if future.cancelled() or future.exception() is not None:
            self.leave(id)
        grammar = future.result()
        del self._waiting[id]
        self._held[id] = (structured, grammar, grammar.enter())
        return request

    def leave(self, id: str) -> bool:
        """Forget a waiting request; whether there was one."""
        entry = self._waiting.pop(id, None)
        if entry is not None and entry[0].params.structured is not None:
            self._used(entry[0].params.structured)
        return entry is not None

    def leave_all(self) -> list[str]:
        ids = list(self._waiting)
        for id in ids:
            self.leave(id)
        return ids

    def release(self, id: str) -> None:
        """The request has ended."""
        held = self._held.pop(id, None)
        if held is not None:
            structured, grammar, lane = held
            grammar.leave(lane)
            self._used(structured)

    def lane(self, id: str) -> Lane:
        """Whose matchers this request's answer is to follow."""
        return self._held[id][2]

    def _used(self, structured: Structured) -> None:
        self._users[structured] -= 1
        if not self._users[structured]:
            del self._users[structured]

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def held(self) -> int:
        return len(self._held)

    def close(self) -> None:
        if self._compiler is not None:
            self._compiler.close()
