"""Grammars by content: compiled off the engine's loop, within bounds of time and memory, kept in a bounded cache.

Owned by the engine (`engine/grammars.py`). `request` answers at once with a future. Equal constraints share one
compilation; what was refused is remembered too, so that a flood of the same costs nothing. Threads only wait and call
native code: the first compilation runs in a process that can be killed (`trial.py`), the second here, where it has been
seen to end.

All copies of one matcher share its lexer, behind a lock: masks of sixty-four of them are made one after the other, on
however many threads. So a grammar that many answers follow at once is compiled several times, into lanes; answers are
spread over them, and threads take a lane each.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.translate import forcing
from septet.grammar.trial import TrialProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from llguidance import LLMatcher, LLTokenizer

    from septet.grammar.vocabulary import Vocabulary
    from septet.structured import Structured

__all__ = ["Compiler", "Grammar", "Lane"]


@dataclass(slots=True)
class Lane:
    """Matchers that share a lexer. `number`: of all lanes of this process."""

    number: int
    fresh: LLMatcher
    users: int = 0  # answers

    def matcher(self) -> LLMatcher:
        return self.fresh.deep_copy()


@dataclass(slots=True)
class Grammar:
    """A compiled constraint. `enter` and `leave` once for each answer, in the loop's thread."""

    lanes: list[Lane]
    compile: Callable[[], LLMatcher]
    widening: Future[Grammar] | None = field(default=None, repr=False)

    def enter(self) -> Lane:
        lane = min(self.lanes, key=lambda lane: lane.users)
        lane.users += 1
        return lane

    def leave(self, lane: Lane) -> None:
        lane.users -= 1

    def matcher(self) -> LLMatcher:
        """Beside all answers: for a look."""
        return self.lanes[0].matcher()

    def narrow(self) -> None:
        """Forget the lanes that nobody uses, but for one."""
        if self.widening is None or self.widening.done():
            self.lanes[:] = [lane for lane in self.lanes if lane.users] or self.lanes[:1]


class Compiler:
    """For one vocabulary. All methods are for one thread, the engine loop's."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int,
        *,
        deadline_s: float = limits.COMPILE_DEADLINE_S,
        max_lanes: int = 1,
    ) -> None:
        self.max_lanes = max_lanes  # of one grammar: more than threads that make masks are of no use
        self._numbers = itertools.count()
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._known: OrderedDict[Structured, Future[Grammar]] = OrderedDict()
        self._spec_bytes = 0
        self._pool = ThreadPoolExecutor(limits.WORKERS, "grammar")
        self._trials: queue.LifoQueue[TrialProcess] = queue.LifoQueue()  # the one that was used last has started
        for _ in range(limits.WORKERS):
            self._trials.put(TrialProcess(vocabulary.without_encoder(), vocab_size, deadline_s))
        self._tokenizer: tuple[LLTokenizer, bool] | None = None
        self._making = threading.Lock()

    def request(self, structured: Structured, users: Callable[[], int] = lambda: 1) -> Future[Grammar]:
        """The grammar, now or later; its exception is an InvalidRequest that names what is wrong. `users`: answers that
        follow it or wait for it by now, this one included; called from other threads, too."""
        known = self._known.get(structured)
        if known is not None and not (known.done() and _failed_by_chance(known)):
            self._known.move_to_end(structured)
            return self._wide_enough(known, users)
        future = self._known[structured] = self._pool.submit(self._compile, structured, users)
        self._spec_bytes += len(structured.spec)
        self._evict()
        return future

    def close(self) -> None:
        """Ends the processes; what is in the making fails."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        while not self._trials.empty():
            self._trials.get().close()

    def __len__(self) -> int:
        return len(self._known)

    def _evict(self) -> None:
        """Oldest first, never what is in the making."""
        for key in list(self._known):
            if len(self._known) <= limits.CACHE_ENTRIES and self._spec_bytes <= limits.CACHE_SPEC_BYTES:
                return
            if self._known[key].done():
                del self._known[key]
                self._spec_bytes -= len(key.spec)

    def _wide_enough(self, known: Future[Grammar], users: Callable[[], int]) -> Future[Grammar]:
        """The same grammar, once it has as many lanes as that many answers are worth."""
        if self.max_lanes == 1 or not _made(known):
            return known
        grammar = known.result()
        if grammar.widening is not None and not grammar.widening.done():
            return grammar.widening
        if len(grammar.lanes) >= min(users(), self.max_lanes):
            return known
        self._narrow()
        grammar.widening = self._pool.submit(self._widen, grammar, users)
        return grammar.widening

    def _narrow(self) -> None:
        """Keep the lanes of all grammars within bounds, those of the latest last."""
        ready = [known.result() for known in self._known.values() if _made(known)]
        n_lanes = sum(len(grammar.lanes) for grammar in ready)
        for grammar in ready:
            if n_lanes < limits.LANES:
                return
            n_lanes -= len(grammar.lanes)
            grammar.narrow()
            n_lanes += len(grammar.lanes)

    def _widen(self, grammar: Grammar, users: Callable[[], int]) -> Grammar:
        """In a thread of the pool; nobody waits long for this."""
        end = time.monotonic() + limits.WIDEN_S
        while len(grammar.lanes) < min(users(), self.max_lanes) and time.monotonic() < end:
            grammar.lanes.append(Lane(next(self._numbers), grammar.compile()))
        return grammar

    def _compile(self, structured: Structured, users: Callable[[], int]) -> Grammar:
        """In a thread of the pool."""
        from llguidance import LLMatcher

        trial = self._trials.get()
        try:
            text = trial.run(structured)
        finally:
            self._trials.put(trial)
        tokenizer, canonical = self._shared_tokenizer()
        text = forcing(text) if canonical else text

        def compiled() -> LLMatcher:
            return LLMatcher(tokenizer, text, limits=limits.parser_limits(), log_level=0)

        first = compiled()
        if first.is_error():
            raise InvalidRequest(f"{structured.kind}: {first.get_error()[:500]}", param="structured")
        return self._widen(Grammar([Lane(next(self._numbers), first)], compiled), users)

    def _shared_tokenizer(self) -> tuple[LLTokenizer, bool]:
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary.tokenizer(self._vocab_size)
            return self._tokenizer


def _made(future: Future[Grammar]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _failed_by_chance(future: Future[Grammar]) -> bool:
    """Failed for another reason than the grammar itself: worth another try."""
    error = None if future.cancelled() else future.exception()
    return future.cancelled() or (error is not None and not isinstance(error, InvalidRequest))
