"""The incremental machine: a model's text in pieces in, reasoning, content and tool calls out.

One per choice, made by the session from a dialect of the table. However the text is cut, the events are those of the
whole text; time is linear; a call that breaks, is cut or has more than `limit` characters brings its text back as it
was written. White space around calls and thoughts is formatting and is left out. Knows no tokens and no API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.text.parsers.call import Calls
from septet.text.parsers.events import CallBroken, CallStart, Content, ParserEvent, Reasoning, merged
from septet.text.parsers.harmony import read_harmony
from septet.text.parsers.reader import Broken, Markers, Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from septet.text.parsers.dialects import Dialect, ReasoningDialect
    from septet.text.parsers.reader import Steps
    from septet.text.parsers.tools import Tool

__all__ = ["MAX_CALL_CHARS", "OutputParser", "parse"]

MAX_CALL_CHARS = 2**20


class _Trim:
    """Text without the white space at its two ends, told as it comes; `flush` is for an end that belongs to it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._held: list[str] = []
        self.leading = False  # white space now would be at the start: leave it out

    def write(self, text: str) -> None:
        if self.leading:
            text = text.lstrip()
            if not text:
                return
            self.leading = False
        bare = text.rstrip()
        if bare:
            self.flush()
            self._tell(bare)
        if len(bare) < len(text):
            self._held.append(text[len(bare) :])

    def flush(self) -> None:
        if self._held:
            self._tell("".join(self._held))
            self._held.clear()

    def drop(self) -> str:
        """What was held back is formatting, and so is white space that follows."""
        held = "".join(self._held)
        self._held.clear()
        self.leading = True
        return held


class OutputParser:
    """`thinking`: the prompt has opened the thoughts already. Without `dialect` no calls, without `thoughts` no
    reasoning is looked for; then text is content as it stands.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        thoughts: ReasoningDialect | None = None,
        tools: Iterable[Tool] = (),
        *,
        thinking: bool = False,
        limit: int = MAX_CALL_CHARS,
    ) -> None:
        self.reader = Reader(limit)
        self._events: list[ParserEvent] = []
        self.calls = Calls({tool.name: tool for tool in tools}, self._emit, self.reader.record)
        self.wants_calls = dialect is not None
        self.thinking = thinking or (thoughts is not None and thoughts.assumed)
        self._dialect = dialect
        self._thoughts = thoughts
        self._content = _Trim(lambda text: self._events.append(Content(text)))
        self._reasoning = _Trim(lambda text: self._events.append(Reasoning(text)))
        self._reasoning.leading = True
        self._steps = self._run()
        self._ended = False
        self._before = ""  # white space before the open call

    def push(self, text: str) -> list[ParserEvent]:
        """Events that this text makes certain."""
        self.reader.feed(text)
        self._advance()
        return self._taken()

    def finish(self) -> list[ParserEvent]:
        """The text has ended: what was still open. Idempotent."""
        self.reader.end()
        self._advance()
        if not self.calls.n_ended:
            self._content.flush()
        return self._taken()

    def _advance(self) -> None:
        if not self._ended:
            self._ended = next(self._steps, self) is self

    def _taken(self) -> list[ParserEvent]:
        events, self._events = self._events, []
        return merged(events)

    # -- what dialect code tells
    def content(self, text: str) -> None:
        self._content.write(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.write(text)

    def new_message(self) -> None:
        """What follows is another message: white space before it does not count."""
        self._content.drop()

    def broken(self, why: str) -> None:
        """What was being read is no call: give its text back."""
        text = self.reader.recorded()
        self._content.leading = False
        if self.calls.open:
            self.calls.open = False
            self._events.append(CallBroken(self._before + text, why))
        else:
            self._content.write(text)

    def _emit(self, event: ParserEvent) -> None:
        if isinstance(event, CallStart):
            self._before = self._content.drop()
        self._events.append(event)

    # -- the machine
    def _run(self) -> Steps[None]:
        if (self._dialect and self._dialect.harmony) or (self._thoughts and self._thoughts.harmony):
            yield from read_harmony(self)
            return
        marker = yield from self._think()
        if not marker and self._dialect and self._dialect.bare:
            yield from self._bare(self._dialect)
        triggers = self._dialect.triggers if self._dialect else ()
        noise = (*(self._dialect.noise if self._dialect else ()), *(self._thoughts.noise if self._thoughts else ()))
        markers = Markers((*triggers, *noise))
        while True:
            marker = marker or (yield from self.reader.until(markers, self.content))
            if not marker:
                return
            if marker in triggers and self._dialect:
                yield from self._call(self._dialect, marker)
            marker = ""

    def _think(self) -> Steps[str]:
        """Thoughts at the start of the answer, if any; returns the trigger of a call that ended them."""
        thoughts = self._thoughts
        if thoughts is None:
            return ""
        before = yield from self.reader.space()
        opened = yield from self.reader.accept(thoughts.open)
        if not opened and not self.thinking:
            self.content(before)
            return ""
        triggers: tuple[str, ...] = ()
        ends: tuple[str, ...] = (thoughts.close,)
        if self._dialect and thoughts.ends_at_call:
            triggers = self._dialect.triggers
            ends += (*triggers, *self._dialect.noise)
        self.thinking = True
        marker = yield from self.reader.until(Markers(ends), self.reasoning)
        self.thinking = False
        self._content.drop()
        return marker if marker in triggers else ""

    def _bare(self, dialect: Dialect) -> Steps[None]:
        """A call without a trigger: only if it names a tool that we know."""
        before = yield from self.reader.space()
        self.content(before)
        char = yield from self.reader.peek()
        if char and char in dialect.bare:
            self.calls.known_only = True
            yield from self._call(dialect, "")
            self.calls.known_only = False

    def _call(self, dialect: Dialect, trigger: str) -> Steps[None]:
        self.reader.record(trigger)
        try:
            yield from dialect.form.read(self.reader, self.calls)
        except Broken as why:
            self.broken(str(why))
            return
        self.reader.recorded()
        while dialect.close:
            yield from self.reader.space()
            if not (yield from self.reader.accept(*dialect.close)):
                self.reader.take_cut(dialect.close)
                return


def parse(parser: OutputParser, text: str) -> list[ParserEvent]:
    """The events of a whole text."""
    return merged(parser.push(text) + parser.finish())
