"""Grammars by content: compiled off the engine's loop, within bounds of time and memory, kept in a bounded cache.

Owned by the engine (`engine/grammars.py`). `request` answers at once with a future. Equal constraints share one
compilation; what was refused is remembered too, so that a flood of the same costs nothing. Threads only wait and call
native code: the first compilation runs in a process that can be killed (`trial.py`), the second here, where it has been
seen to end.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.translate import forcing
from septet.grammar.trial import TrialProcess

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from septet.grammar.vocabulary import Vocabulary
    from septet.structured import Structured

__all__ = ["Compiler", "Grammar"]


class Grammar:
    """A compiled constraint. `matcher()` starts a new answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._fresh = matcher

    def matcher(self) -> LLMatcher:
        return self._fresh.deep_copy()


class Compiler:
    """For one vocabulary. All methods are for one thread, the engine loop's."""

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, *, deadline_s: float = limits.COMPILE_DEADLINE_S
    ) -> None:
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

    def request(self, structured: Structured) -> Future[Grammar]:
        """The grammar, now or later; its exception is an InvalidRequest that names what is wrong."""
        known = self._known.get(structured)
        if known is not None and not (known.done() and _failed_by_chance(known)):
            self._known.move_to_end(structured)
            return known
        future = self._known[structured] = self._pool.submit(self._compile, structured)
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

    def _compile(self, structured: Structured) -> Grammar:
        """In a thread of the pool."""
        from llguidance import LLMatcher

        trial = self._trials.get()
        try:
            text = trial.run(structured)
        finally:
            self._trials.put(trial)
        tokenizer, canonical = self._shared_tokenizer()
        text = forcing(text) if canonical else text
        matcher = LLMatcher(tokenizer, text, limits=limits.parser_limits(), log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"{structured.kind}: {matcher.get_error()[:500]}", param="structured")
        return Grammar(matcher)

    def _shared_tokenizer(self) -> tuple[LLTokenizer, bool]:
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary.tokenizer(self._vocab_size)
            return self._tokenizer


def _failed_by_chance(future: Future[Grammar]) -> bool:
    """Failed for another reason than the grammar itself: worth another try."""
    error = None if future.cancelled() else future.exception()
    return future.cancelled() or (error is not None and not isinstance(error, InvalidRequest))
