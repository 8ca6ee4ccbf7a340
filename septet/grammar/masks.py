"""Many matchers at once: accept one token each, fill one mask each, on host threads inside the library.

Called by `engine/constraints.py` once per step. A mask is one bit per token, least significant first, in int32 words;
a set bit allows the token.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from septet.machine import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llguidance import LLMatcher

__all__ = ["Masks", "mask_threads", "mask_words", "single_bits"]

MAX_THREADS = 16
HEAD = 32  # words in which most masks that leave a choice show it: tokens of one byte come first in most vocabularies
POOL_FROM = 8  # rows


def mask_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32


def mask_threads() -> int:
    """How many threads make masks here."""
    cpus = usable_cpus()
    return max(1, min(MAX_THREADS, cpus - 2 if cpus > 8 else cpus // 2))


def single_bits(words: np.ndarray) -> np.ndarray:
    """words (n, W) int32 -> numbers of the rows that have exactly one bit set."""
    bits = words.view(np.uint32)
    rows = np.flatnonzero((bits[:, :HEAD] != 0).sum(1) < 2)
    if not len(rows):
        return rows
    bits = bits[rows]
    some = bits != 0
    first = some.argmax(1)
    top = bits[np.arange(len(rows)), first]
    alone = first + some[:, ::-1].argmax(1) == bits.shape[1] - 1  # the first word with a bit is the last
    return rows[alone & (top != 0) & (top & (top - np.uint32(1)) == 0)]


class Masks:
    """The library's thread pool, used from POOL_FROM rows on: below, waking a thread costs more than the mask.

    Not thread-safe; each call releases the interpreter.
    """

    def __init__(self, threads: int | None = None, pool_from: int = POOL_FROM) -> None:
        from llguidance import LLExecutor

        threads = mask_threads() if threads is None else threads
        self._executor = LLExecutor(threads) if threads > 1 else None
        self._pool_from = pool_from
        self._helper: ThreadPoolExecutor | None = None  # one thread, for `start`

    def fill(self, matchers: Sequence[LLMatcher], out: np.ndarray) -> None:
        """Mask of matchers[i] into out[i]; `out` (rows, words) int32, C-contiguous, at least as many rows."""
        if not out.flags["C_CONTIGUOUS"] or out.itemsize != 4 or len(out) < len(matchers):
            raise ValueError("out must be int32, C-contiguous, with a row for each matcher")
        if self._executor is None or len(matchers) < self._pool_from:
            for matcher, row in zip(matchers, out, strict=False):
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            return
        self._executor.unsafe_compute_mask_ptr(*self._job(matchers, out))

    def start(self, matchers: Sequence[LLMatcher], out: np.ndarray) -> Callable[[], None]:
        """`fill`, but many rows on a thread beside this one: -> what waits for them. Nobody else touches the matchers
        or `out` meanwhile."""
        if self._executor is None or len(matchers) < self._pool_from:
            self.fill(matchers, out)
            return _nothing
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "masks")
        executor, job, begun = self._executor, self._job(matchers, out), Event()

        def work() -> None:
            begun.set()
            executor.unsafe_compute_mask_ptr(*job)

        future = self._helper.submit(work)
        begun.wait()  # else the thread would first wait for the interpreter, for up to the 5 ms of its switch interval
        return future.result

    @staticmethod
    def _job(matchers: Sequence[LLMatcher], out: np.ndarray) -> tuple[list[tuple[LLMatcher, int]], int, int, int]:
        return [(matcher, i) for i, matcher in enumerate(matchers)], out.ctypes.data, 4 * out.shape[1], len(out)

    def accept(self, matchers: Sequence[LLMatcher], tokens: Sequence[int]) -> list[bool]:
        """Whether each matcher took its token; one that did not is in an error state for good."""
        if self._executor is None or len(matchers) < self._pool_from:
            return [matcher.consume_token(token) for matcher, token in zip(matchers, tokens, strict=True)]
        return self._executor.consume_token_par(list(zip(matchers, tokens, strict=True)))


def _nothing() -> None:
    """Nobody needs to wait."""
