"""The open call: takes a name and the text of its arguments from a form, keeps the promise that both are sound.

One per `OutputParser`. A form that finds something wrong raises `Broken`; the machine then brings the text back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.text.parsers.events import CallArguments, CallEnd, CallStart, ParserEvent
from septet.text.parsers.reader import Broken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from septet.text.parsers.tools import Tool

__all__ = ["Calls"]

MAX_NAME = 256


class Calls:
    """`emit` gets the events; `on_end` runs after each complete call (a new recording begins there)."""

    def __init__(
        self, tools: Mapping[str, Tool], emit: Callable[[ParserEvent], None], on_end: Callable[[], None]
    ) -> None:
        self._tools = tools
        self._emit = emit
        self._on_end = on_end
        self._empty = True
        self.open = False
        self.n_ended = 0
        self.known_only = False  # while nothing but the text's look says that it is a call

    def begin(self, name: str) -> Tool | None:
        """The call's name; returns the tool of that name, None if there is none."""
        if self.open:
            raise Broken("a call has two names")
        tool = self._tools.get(name)
        if not 0 < len(name) <= MAX_NAME or not name.isprintable() or (self.known_only and tool is None):
            raise Broken(f"{name[:40]!r} is no name of a tool")
        self.open, self._empty = True, True
        self._emit(CallStart(name))
        return tool

    def arguments(self, text: str) -> None:
        if text:
            self._empty = False
            self._emit(CallArguments(text))

    def end(self) -> None:
        """The call is complete. One without arguments has an empty object."""
        if self._empty:
            self._emit(CallArguments("{}"))
        self.open = False
        self.n_ended += 1
        self._emit(CallEnd())
        self._on_end()
