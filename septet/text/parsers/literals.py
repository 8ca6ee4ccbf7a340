"""One Python literal out of a stream, as JSON text.

Used by the Python form of calls. The scanner finds where the literal ends (brackets, quotes, escapes) and bounds its
depth and length; `ast.literal_eval` reads it, which runs nothing. What JSON can't say is `Broken`.
"""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING

from septet.text.parsers.json_text import without_surrogates
from septet.text.parsers.reader import Broken

if TYPE_CHECKING:
    from septet.text.parsers.reader import Reader, Steps

__all__ = ["read_literal"]

MAX_DEPTH = 50
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_JSON_WORDS = {"true": "True", "false": "False", "null": "None"}
_PLAIN = re.compile(r"[^()\[\]{},'\"]+")
_ESCAPES = frozenset("\\'\"abfnrtvxuUN01234567\n\r")
_ESCAPED = {"\n": "n", "\r": "r"}  # a backslash before a line end: the line end is kept
_INSIDE = {"'": re.compile(r"[^'\\]+"), '"': re.compile(r'[^"\\]+')}
_WORD = re.compile(r"\b(?:true|false|null)\b")


def read_literal(reader: Reader) -> Steps[str]:
    """Up to the `,` or `)` that ends it, which stays."""
    parts: list[str] = []
    owed: list[str] = []
    while True:
        if not (yield from reader.more()):
            raise Broken("the text ends within a value")
        if plain := (yield from reader.run(_PLAIN)):
            parts.append(plain)
            continue
        char = yield from reader.peek()
        if not owed and char in ",)":
            return _as_json(parts)
        reader.take(1)
        if char in _INSIDE:
            parts.append((yield from _string(reader, char)))
            continue
        parts.append(char)
        if char in _CLOSERS:
            owed.append(_CLOSERS[char])
            if len(owed) > MAX_DEPTH:
                raise Broken(f"nested more than {MAX_DEPTH} deep")
        elif char != "," and (not owed or owed.pop() != char):
            raise Broken("brackets do not match")


def _string(reader: Reader, quote: str) -> Steps[str]:
    """A string from after its quote on; line ends within are escaped, so that it is a literal."""
    parts = [quote]
    while True:
        if not (yield from reader.more()):
            raise Broken("the text ends within a string")
        if text := reader.piece(_INSIDE[quote]):
            parts.append(text.replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0"))
            continue
        char = reader.take(1)
        parts.append(char)
        if char == quote:
            return "".join(parts)
        if not (yield from reader.more()):
            raise Broken("the text ends within a string")
        char = reader.take(1)
        parts.append(_ESCAPED.get(char, char) if char in _ESCAPES else "\\" + char)


def _as_json(parts: list[str]) -> str:
    """Pieces are split at quotes, so a word that JSON spells otherwise is never inside a string."""
    source = "".join(
        part if part[:1] in _INSIDE else _WORD.sub(lambda found: _JSON_WORDS[found[0]], part) for part in parts
    )
    try:
        value = ast.literal_eval(source.strip())
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if text.isascii() else without_surrogates(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Broken(f"{source[:40]!r} is no value") from None
