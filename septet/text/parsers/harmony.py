"""gpt-oss: an answer in channels, each message with a header (the harmony response format).

Called by the machine in place of its own loop. `analysis` is reasoning, a message to `functions.NAME` is a call, the
rest is content. Header and text: <|start|>assistant<|channel|>NAME to=WHOM <|constrain|>json<|message|>TEXT<|end|>.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from septet.text.parsers.json_text import copy_value
from septet.text.parsers.reader import Broken, Markers

if TYPE_CHECKING:
    from septet.text.parsers.machine import OutputParser
    from septet.text.parsers.reader import Steps

__all__ = ["read_harmony"]

MAX_HEADER = 512
_HEADER_END = Markers(("<|message|>",))
_MESSAGE_END = Markers(("<|start|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"))
_TO = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def read_harmony(parser: OutputParser) -> Steps[None]:
    """The whole answer. The prompt ends with <|start|>assistant, so text without a header is content."""
    marker = ""
    sink = parser.content
    while True:
        if marker not in ("<|start|>", "<|channel|>"):
            marker = yield from parser.reader.until(_MESSAGE_END, sink)
            sink = parser.content
        if not marker:
            return
        if marker in ("<|start|>", "<|channel|>"):
            parser.reader.record(marker)
            try:
                channel = yield from _header(parser, marker)
            except Broken as why:
                parser.broken(str(why))
                channel = None
            else:
                parser.reader.recorded()
            sink = parser.reasoning if channel == "analysis" else parser.content
            marker = ""


def _header(parser: OutputParser, marker: str) -> Steps[str]:
    """The channel of the message whose text follows. A call is read whole."""
    text, _ = yield from parser.reader.upto(_HEADER_END, MAX_HEADER)
    header = marker + text
    to, channel = _TO.search(header), _CHANNEL.search(header)
    parser.new_message()
    if to is not None and parser.wants_calls:
        parser.calls.begin(to[1])
        yield from parser.reader.space()
        if (yield from parser.reader.peek()) != "{":
            raise Broken("the arguments are no JSON object")
        yield from copy_value(parser.reader, parser.calls.arguments)
        parser.calls.end()
    return channel[1] if channel else ""
