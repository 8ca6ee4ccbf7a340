"""Text that arrives in pieces, read as if it were whole: the ground under every parser of model output.

Parsers are generators that `yield` when they need more text. Each primitive decides only what no later text can change,
so the result never depends on how the text was cut. Lookahead is bounded by the longest marker; time is linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

__all__ = ["Broken", "Markers", "Reader", "Steps"]

T = TypeVar("T")
Steps = Generator[None, None, T]
_SPACE = re.compile(r"\s+")


class Broken(Exception):
    """What is being read is no tool call. The text is not lost: the reader has recorded it."""


class Markers:
    """A set of marker strings to look for. None may contain another, so the leftmost match is the only one."""

    def __init__(self, markers: tuple[str, ...]) -> None:
        for one in markers:
            if not one or any(one in other for other in markers if other != one):
                raise ValueError(f"marker {one!r} is empty or part of another")
        self.markers = markers
        self._whole = re.compile("|".join(map(re.escape, markers)) or "(?!)")
        self._prefixes = frozenset(one[:n] for one in markers for n in range(1, len(one)))
        self._longest = max(map(len, self._prefixes), default=0)

    def find(self, text: str, at: int) -> tuple[int, str]:
        """(start, marker) of the first one in text[at:]; else (where one may have begun or the end, "")."""
        if found := self._whole.search(text, at):
            return found.start(), found[0]
        for start in range(max(at, len(text) - self._longest), len(text)):
            if text[start:] in self._prefixes:
                return start, ""
        return len(text), ""


class Reader:
    """`limit`: characters that one recording (one call) may have."""

    def __init__(self, limit: int) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._limit = limit
        self._recorded: list[str] | None = None
        self._n_recorded = 0

    # -- the writing side
    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    # -- recording of a call's text
    def record(self, before: str = "") -> None:
        """From now on keep what is taken, after `before`. `Broken` where it becomes too long."""
        self._recorded, self._n_recorded = [before], len(before)

    def recorded(self) -> str:
        """What was kept; ends the recording."""
        text, self._recorded = "".join(self._recorded or ()), None
        return text

    # -- primitives
    def take(self, n: int) -> str:
        """The next n characters, which are there. `Broken`, and nothing taken, where the recording has no room."""
        if self._recorded is not None and n > self._room():
            raise Broken(f"the call has more than {self._limit} characters")
        text = self._text[self._at : self._at + n]
        self._at += n
        if self._recorded is not None:
            self._recorded.append(text)
            self._n_recorded += n
        return text

    def _some(self, n: int) -> str:
        """At least one and at most n characters: where a recording ends must not depend on how text was cut."""
        return self.take(n if self._recorded is None else min(n, max(self._room(), 1)))

    def _room(self) -> int:
        return self._limit - self._n_recorded

    def more(self) -> Steps[bool]:
        """Wait for at least one character; False at the end of the text."""
        while self._at >= len(self._text):
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character, "" at the end of the text."""
        return self._text[self._at] if (yield from self.more()) else ""

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """The longest run of characters of a class (`pattern` is `[...]+`), "" if there is none."""
        parts: list[str] = []
        while (yield from self.more()) and (found := pattern.match(self._text, self._at)):
            parts.append(self._some(found.end() - found.start()))
        return "".join(parts)

    def piece(self, pattern: re.Pattern[str]) -> str:
        """As much of such a run as is here now; "" if the next character is not of it (or not here yet)."""
        found = pattern.match(self._text, self._at)
        return self._some(found.end() - found.start()) if found else ""

    def space(self) -> Steps[str]:
        return self.run(_SPACE)

    def accept(self, *literals: str) -> Steps[str]:
        """Take the first of `literals` that stands here; "" if none does."""
        for literal in literals:
            while len(self._text) - self._at < len(literal) and literal.startswith(self._text[self._at :]):
                if self._ended:
                    break
                yield
            if self._text.startswith(literal, self._at):
                self.take(len(literal))
                return literal
        return ""

    def take_cut(self, literals: tuple[str, ...]) -> None:
        """Where the text has ended within one of `literals`, take what is there of it."""
        rest = self._text[self._at :]
        if self._ended and rest and any(literal.startswith(rest) for literal in literals):
            self._at = len(self._text)

    def expect(self, *literals: str) -> Steps[str]:
        """`accept`, or `Broken`."""
        found = yield from self.accept(*literals)
        if not found:
            raise Broken(f"expected {' or '.join(map(repr, literals))}")
        return found

    def until(self, markers: Markers, sink: Callable[[str], None]) -> Steps[str]:
        """Give text to `sink` up to the first marker, take it and return it; "" if the text ends first."""
        while True:
            start, marker = markers.find(self._text, self._at)
            if self._ended and not marker:
                start = len(self._text)
            while start > self._at:
                sink(self._some(start - self._at))
            if marker:
                self.take(len(marker))
                return marker
            if self._ended:
                return ""
            yield

    def upto(self, markers: Markers, limit: int) -> Steps[tuple[str, str]]:
        """(text, marker): the text before the first marker. `Broken` if there is none within `limit` characters."""
        parts: list[str] = []
        length = 0

        def sink(text: str) -> None:
            nonlocal length
            parts.append(text)
            length += len(text)
            if length > limit:
                raise Broken(f"no {' or '.join(markers.markers)} within {limit} characters")

        marker = yield from self.until(markers, sink)
        if not marker:
            raise Broken(f"the text ends before {' or '.join(markers.markers)}")
        return "".join(parts), marker
