"""Shapes of captured steps: which ones exist, and which one a plan fits into. Arithmetic over integers.

Used by `graphs.py` (capture and choice) and `sizing.py` (their memory). Standard library only.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_CHUNKS", "MAX_TOKENS", "MIN_SHARING", "Shape", "Shapes", "decode_sizes", "stand_in"]

MAX_TOKENS = 1024  # of a captured chunk; beyond, launching costs less than computing
MIN_SHARING = 8  # rows of a decode step: for fewer, reading a shared context once for all does not pay
MAX_CHUNKS = 128  # captured chunks that are kept
CHUNK_ROWS = (4, 16, 64, 128, 256)  # of mixed steps
FIRST_DECODES = (1, 2, 4, 8)  # captured before the engine says it is ready, beside the largest
FIRST_CHUNK = 128


class Shape(NamedTuple):
    """A step of fixed size. decode: one token a row, `rows` = `tokens`. Otherwise tokens are divided among rows freely,
    and the padding has a row of its own, not counted in `rows`. max_kv: longest context that it can read. shared: its
    rows have the beginning of their contexts in common (`Layout.shared`)."""

    decode: bool
    tokens: int
    rows: int
    max_kv: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of one engine. max_tokens: of a captured chunk, at most max_len."""

    max_rows: int
    max_len: int
    max_tokens: int

    @classmethod
    def of(cls, max_rows: int, max_len: int, step_tokens: int) -> Shapes:
        """For an engine with these limits. Padding takes positions of the scratch row, which is max_len long."""
        return cls(max_rows, max_len, max((n for n in _LENGTHS if n <= min(max_len, step_tokens)), default=0))

    def decode(self, n_rows: int) -> Shape:
        sizes = decode_sizes(self.max_rows)
        size = sizes[bisect_left(sizes, n_rows)]
        return Shape(True, size, size, self.max_len)

    def chunk(self, n_tokens: int, n_rows: int, context: int) -> Shape | None:
        """The smallest shape for so many tokens in so many rows; None: too many. `context`: the longest row's.

        A single row has two lengths of context, the tokens of the step itself (a fresh prompt) or any, since attention
        is split by what it might have to read. Mixed steps come in few sizes, so that all of them get captured: up to
        256 tokens a step costs what reading the weights costs.
        """
        if n_tokens > self.max_tokens or n_rows > CHUNK_ROWS[-1]:
            return None
        if n_rows == 1:
            tokens = next(n for n in _LENGTHS if n >= n_tokens)
            return Shape(False, tokens, 1, tokens if context <= tokens else self.max_len)
        tokens = min(next(n for n in _MIXED if n >= n_tokens), self.max_tokens)
        rows = min(next(r for r in CHUNK_ROWS if r >= n_rows), tokens, max(self.max_rows, n_rows))
        return Shape(False, tokens, rows, self.max_len)

    def first(self) -> list[Shape]:
        """What is captured before the first request. The largest ones come first: their memory serves all others."""
        sizes = sorted({self.max_rows, *(s for s in FIRST_DECODES if s < self.max_rows)}, reverse=True)
        most = min(CHUNK_ROWS[-1], self.max_rows, self.max_tokens)
        chunks = [self.chunk(self.max_tokens, most, self.max_len), self.chunk(FIRST_CHUNK, 1, 1)] if most else []
        return [*map(self.decode, sizes), *_some(chunks)]

    def usual(self) -> list[Shape]:
        """What is captured in pauses though nobody has asked yet: all decode sizes, mixed steps, single chunks."""
        decodes = [self.decode(size) for size in reversed(decode_sizes(self.max_rows))]
        most = min(self.max_rows, self.max_tokens)
        mixed = [self.chunk(n, min(rows, n, most), 1) for n in _MIXED for rows in CHUNK_ROWS if most > 1]
        single = [self.chunk(n, 1, context) for context in (1, self.max_len) for n in _LENGTHS]
        shared = [shape._replace(shared=True) for shape in decodes if shape.rows >= MIN_SHARING]
        return [*decodes, *_some([*mixed, *single]), *shared]

    @property
    def max_graphs(self) -> int:
        """Shapes that are ever captured, at most."""
        return 2 * len(decode_sizes(self.max_rows)) + (MAX_CHUNKS if self.max_tokens else 0)


@cache
def decode_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, multiples of 8 to 64, of 16 to 256, of 32 beyond; none over max_rows. Ascending."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)]
    return tuple(sorted({*(s for s in sizes if s < max_rows), max_rows}))


def stand_in(shape: Shape, captured: Iterable[Shape]) -> Shape | None:
    """The cheapest captured shape that can compute what `shape` can, if it does not waste too much."""
    fits = [c for c in captured if c.decode == shape.decode and c.shared <= shape.shared and _holds(c, shape)]
    return min(fits, key=lambda c: (c.tokens, c.rows, c.max_kv, not c.shared), default=None)


_MIXED = (32, 64, 128, 256, 384, 512, 640, 768, MAX_TOKENS)
_LENGTHS = (*range(16, 257, 16), *range(288, 513, 32), *range(576, MAX_TOKENS + 1, 64))  # from 128 on 12.5 % padding


def _holds(larger: Shape, shape: Shape) -> bool:
    if larger.tokens < shape.tokens or larger.rows < shape.rows or larger.max_kv < shape.max_kv:
        return False
    return shape.decode or larger.tokens <= max(256, 5 * shape.tokens // 4)


def _some(shapes: Iterable[Shape | None]) -> list[Shape]:
    """Each once, in order."""
    return list(dict.fromkeys(shape for shape in shapes if shape is not None))
