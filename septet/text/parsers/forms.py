"""How calls are written: five forms, each reading one or more calls from where a dialect's trigger ended.

Used by the table in `dialects.py`. A form is data plus one generator `read(reader, calls)`; it raises `Broken` where
the text is no call. JSON objects, headers before JSON, XML-like tags, Python calls, and Gemma's own brackets.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from septet.text.parsers.json_text import Style, copy_value, escaped, quoted, read_string, without_surrogates
from septet.text.parsers.literals import read_literal
from septet.text.parsers.reader import Broken, Markers
from septet.text.parsers.tools import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.text.parsers.call import Calls
    from septet.text.parsers.reader import Reader, Steps

__all__ = ["BracketForm", "Form", "HeaderForm", "JsonForm", "PythonForm", "TagForm"]

MAX_NAME = 256
MAX_KEY = 256
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.\-]+")


class Form(Protocol):
    def read(self, reader: Reader, calls: Calls) -> Steps[None]: ...


def _arguments(reader: Reader, sink: Callable[[str], None]) -> Steps[None]:
    """A JSON object; also one that is written as a string, or null for none."""
    char = yield from reader.peek()
    if char == "{":
        yield from copy_value(reader, sink)
    elif char == '"':
        text = yield from read_string(reader)
        try:
            is_object = isinstance(json.loads(text or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise Broken("the arguments are no JSON object")
        sink(without_surrogates(text) or "{}")
    else:
        yield from reader.expect("null")


def _drop(text: str) -> None:
    pass


@dataclass(frozen=True)
class JsonForm:
    """{"name": ..., "arguments": {...}}, one, a list of them, or several between `separators` (Hermes, Llama 3)."""

    separators: tuple[str, ...] = ()

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.accept("[")):
            yield from self.read_list(reader, calls)
            return
        while True:
            yield from self._call(reader, calls)
            if not self.separators:
                return
            yield from reader.space()
            if not (yield from reader.accept(*self.separators)):
                return
            yield from reader.space()

    def read_list(self, reader: Reader, calls: Calls) -> Steps[None]:
        """From behind the opening bracket."""
        while True:
            yield from reader.space()
            yield from self._call(reader, calls)
            yield from reader.space()
            if (yield from reader.expect(",", "]")) == "]":
                return

    def _call(self, reader: Reader, calls: Calls) -> Steps[None]:
        held: list[str] = []
        yield from self._members(reader, calls, held, nested=False)
        if not calls.open:
            raise Broken("a call has no name")
        calls.end()

    def _members(self, reader: Reader, calls: Calls, held: list[str], nested: bool) -> Steps[None]:
        """The members of one object, in any order; arguments that come before the name wait in `held`."""
        yield from reader.expect("{")
        seen = bool(held)
        while True:
            yield from reader.space()
            key = yield from read_string(reader)
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            char = yield from reader.peek()
            if key in _NAMES and char == '"':
                calls.begin((yield from read_string(reader)))
                calls.arguments("".join(held))
            elif key == "function" and not nested:
                yield from self._members(reader, calls, held, nested=True)
            elif key in _ARGUMENTS and not seen:
                seen = True
                yield from _arguments(reader, calls.arguments if calls.open else held.append)
            elif calls.known_only and key not in ("type", "id"):
                raise Broken(f"a call has no member {key[:40]!r}")
            else:
                yield from copy_value(reader, _drop)
            yield from reader.space()
            if (yield from reader.expect(",", "}")) == "}":
                return


@dataclass(frozen=True)
class HeaderForm:
    """name SEPARATOR {...}: the name in a header, then the arguments (Mistral, DeepSeek, Kimi).

    `name`: a pattern whose group 1 is the name in the header. `fence`: arguments may stand in a Markdown fence, after
    the name on a line of its own. `or_json`: the older way, a JSON list, may stand here instead.
    """

    separators: tuple[str, ...]
    name: str = r"\s*(\S+)\s*"
    fence: bool = False
    or_json: bool = False

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.space()
        if self.or_json and (yield from reader.peek()) in ("[", "{"):
            yield from JsonForm().read(reader, calls)
            return
        header, _ = yield from reader.upto(Markers(self.separators), MAX_NAME)
        if self.fence and header.strip() == "function":
            header, _ = yield from reader.upto(Markers(("\n",)), MAX_NAME)
        found = re.fullmatch(self.name, header)
        if not found:
            raise Broken("the header holds no name")
        calls.begin(found[1])
        yield from reader.space()
        fenced = self.fence and (yield from reader.accept("```json"))
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise Broken("the arguments are no JSON object")
        yield from copy_value(reader, calls.arguments)
        if fenced:
            yield from reader.space()
            yield from reader.expect("```")
        calls.end()


@dataclass(frozen=True)
class TagForm:
    """Parameters in tags, values as plain text that the schema gives a type (Qwen3-Coder, GLM, MiniMax).

    name_open NAME name_close, then pairs key_open KEY key_close value_open VALUE value_close, then end.
    """

    name_open: str
    name_close: str
    key_open: str
    key_close: str
    value_open: str
    value_close: str
    end: str

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.space()
        if self.name_open:
            yield from reader.expect(self.name_open)
        if self.name_close:
            name, _ = yield from reader.upto(Markers((self.name_close,)), MAX_NAME)
        else:
            name = yield from reader.run(_IDENTIFIER)
        tool = calls.begin(name.strip())
        opened = "{"
        while True:
            yield from reader.space()
            if (yield from reader.expect(self.key_open, self.end)) == self.end:
                break
            key, _ = yield from reader.upto(Markers((self.key_close,)), MAX_KEY)
            if self.value_open:
                yield from reader.space()
                yield from reader.expect(self.value_open)
            calls.arguments(f"{opened}{quoted(key.strip())}: ")
            opened = ", "
            yield from self._value(reader, calls, kind_of(tool, key.strip()))
        calls.arguments("}" if opened == ", " else "{}")
        calls.end()

    def _value(self, reader: Reader, calls: Calls, kind: str) -> Steps[None]:
        """A string is told as it comes, without the line ends around it; anything else once it is whole."""
        close = Markers((self.value_close,))
        yield from reader.accept("\n")
        if kind != "string":
            parts: list[str] = []
            marker = yield from reader.until(close, parts.append)
            if marker:
                calls.arguments(_typed("".join(parts).removesuffix("\n"), kind))
        else:
            held = ""

            def sink(text: str) -> None:
                nonlocal held
                text = held + text
                held = "\n" if text.endswith("\n") else ""
                calls.arguments(escaped(text.removesuffix("\n")))

            calls.arguments('"')
            marker = yield from reader.until(close, sink)
            calls.arguments('"')
        if not marker:
            raise Broken("the text ends within a value")


def _typed(text: str, kind: str) -> str:
    """A value as JSON: itself where it is JSON, otherwise a string."""
    if kind == "boolean" and text.strip() in ("True", "False"):
        return text.strip().lower()

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return quoted(text)
    return text.strip()


@dataclass(frozen=True)
class PythonForm:
    """[f(a=1), g(b="x")]: calls as Python writes them, with keyword arguments only (Llama 3.2 and 4, LFM2).

    A list of JSON objects is read as well: LFM2 writes either.
    """

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.space()
        listed = yield from reader.accept("[")
        yield from reader.space()
        if listed and (yield from reader.peek()) == "{":
            yield from JsonForm().read_list(reader, calls)
            return
        while True:
            yield from reader.space()
            name = yield from reader.run(_IDENTIFIER)
            if (yield from reader.accept("(")) != "(":
                raise Broken("expected a call")
            calls.begin(name)
            yield from self._keywords(reader, calls)
            calls.end()
            if not listed:
                return
            yield from reader.space()
            if (yield from reader.expect(",", "]")) == "]":
                return

    def _keywords(self, reader: Reader, calls: Calls) -> Steps[None]:
        seen: set[str] = set()
        yield from reader.space()
        if (yield from reader.accept(")")):
            return
        while True:
            yield from reader.space()
            key = yield from reader.run(_IDENTIFIER)
            yield from reader.space()
            yield from reader.expect("=")
            if not key.isidentifier() or key in seen:
                raise Broken(f"{key[:40]!r} is no new keyword")
            calls.arguments(f"{', ' if seen else '{'}{quoted(key)}: ")
            seen.add(key)
            calls.arguments((yield from read_literal(reader)))
            yield from reader.space()
            if (yield from reader.expect(",", ")")) == ")":
                calls.arguments("}")
                return


@dataclass(frozen=True)
class BracketForm:
    """call:name{key:value}: JSON with bare keys and strings between markers of its own (FunctionGemma, Gemma 4)."""

    quotes: tuple[str, ...]

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.space()
        yield from reader.expect("call:")
        yield from reader.space()
        calls.begin((yield from reader.run(_IDENTIFIER)))
        yield from reader.space()
        if (yield from reader.peek()) != "{":
            raise Broken("the arguments are missing")
        yield from copy_value(reader, calls.arguments, Style(self.quotes, bare_keys=True))
        calls.end()
