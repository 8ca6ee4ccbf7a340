"""One JSON value copied out of a stream while it is checked: what is given on is always the beginning of valid JSON.

Used by the forms of calls. RFC 8259, with two repairs that models need: control characters inside strings are escaped,
and a backslash before a character that needs none is kept as a backslash. Knows no dialect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from septet.text.parsers.reader import Broken, Markers, Reader

if TYPE_CHECKING:
    from septet.text.parsers.reader import Steps

__all__ = ["Style", "copy_value", "escaped", "quoted", "read_string", "without_surrogates"]

MAX_DEPTH = 100
MAX_SCALAR = 400  # characters of a number or bare key
Sink = Callable[[str], None]
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[A-Za-z0-9+.\-]+")
_KEY = re.compile(r"[^\s:{}\[\],\"']+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX = frozenset("0123456789abcdefABCDEF")


class Style:
    """How a dialect writes values: plain JSON, or bare keys and strings between markers of its own (Gemma)."""

    def __init__(self, quotes: tuple[str, ...] = (), bare_keys: bool = False) -> None:
        self.quotes = {quote: Markers((quote,)) for quote in quotes}
        self.bare_keys = bare_keys


PLAIN = Style()


def quoted(text: str) -> str:
    """`text` as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """`text` as it stands within a JSON string. Pieces may be escaped one by one."""
    return quoted(text)[1:-1]


def without_surrogates(text: str) -> str:
    """JSON text with lone surrogates escaped: they are no Unicode text and can't be sent."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def copy_value(reader: Reader, sink: Sink, style: Style = PLAIN) -> Steps[None]:
    """Read exactly one JSON value and give its text to `sink`. `Broken` where it is none."""
    stack: list[str] = []  # closing brackets owed
    while True:
        yield from _opening(reader, sink, stack, style)
        while True:  # a value has ended
            if not stack:
                return
            sink((yield from reader.space()))
            mark = yield from reader.expect(",", stack[-1])
            sink(mark)
            if mark == ",":
                break
            stack.pop()
        if stack[-1] == "}":
            yield from _key(reader, sink, style)


def _opening(reader: Reader, sink: Sink, stack: list[str], style: Style) -> Steps[None]:
    """Up to the end of the first scalar or empty container, opening containers on the way."""
    while True:
        sink((yield from reader.space()))
        char = yield from reader.peek()
        if char not in ("{", "["):
            yield from _scalar(reader, sink, char, style)
            return
        sink(reader.take(1))
        close = "}" if char == "{" else "]"
        sink((yield from reader.space()))
        if (yield from reader.accept(close)):
            sink(close)
            return
        stack.append(close)
        if len(stack) > MAX_DEPTH:
            raise Broken(f"nested more than {MAX_DEPTH} deep")
        if close == "}":
            yield from _key(reader, sink, style)


def _key(reader: Reader, sink: Sink, style: Style) -> Steps[None]:
    sink((yield from reader.space()))
    if style.bare_keys and (yield from reader.peek()) != '"':
        quote = yield from reader.accept(*style.quotes)
        if quote:
            sink('"')
            yield from _marked(reader, sink, style.quotes[quote])
        else:
            key = yield from reader.run(_KEY)
            if not 0 < len(key) <= MAX_SCALAR:
                raise Broken("a key is missing")
            sink(quoted(key))
    else:
        yield from _string(reader, sink)
    sink((yield from reader.space()))
    sink((yield from reader.expect(":")))


def _scalar(reader: Reader, sink: Sink, char: str, style: Style) -> Steps[None]:
    if char == '"':
        yield from _string(reader, sink)
        return
    if style.quotes and (quote := (yield from reader.accept(*style.quotes))):
        sink('"')
        yield from _marked(reader, sink, style.quotes[quote])
        return
    word = yield from reader.run(_SCALAR)
    if word not in ("true", "false", "null") and (len(word) > MAX_SCALAR or not _NUMBER.fullmatch(word)):
        raise Broken(f"{word[:40]!r} is no JSON value")
    sink(word)


def _marked(reader: Reader, sink: Sink, close: Markers) -> Steps[None]:
    """A string that ends at a marker; its opening quote has been told."""
    if not (yield from reader.until(close, lambda text: sink(escaped(text)))):
        raise Broken("the text ends within a string")
    sink('"')


def _string(reader: Reader, sink: Sink) -> Steps[None]:
    yield from reader.expect('"')
    sink('"')
    while True:
        if not (yield from reader.more()):
            raise Broken("the text ends within a string")
        if text := reader.piece(_PLAIN):
            sink(text)
            continue
        char = reader.take(1)
        if char == '"':
            sink(char)
            return
        sink((yield from _escape(reader)) if char == "\\" else escaped(char))


def _escape(reader: Reader) -> Steps[str]:
    """After a backslash."""
    char = yield from reader.peek()
    if char and char in '"\\/bfnrt':
        return "\\" + reader.take(1)
    if char != "u":
        return "\\\\"  # it stands for itself; the character follows as text
    digits = reader.take(1)
    for _ in range(4):
        if (yield from reader.peek()) not in _HEX:
            raise Broken("\\u needs four hexadecimal digits")
        digits += reader.take(1)
    return "\\" + digits


def read_string(reader: Reader) -> Steps[str]:
    """One JSON string, decoded."""
    parts: list[str] = []
    yield from _string(reader, parts.append)
    text: str = json.loads("".join(parts))
    return text
