"""What a model's output turns out to be: reasoning, content, and tool calls told piece by piece.

Made by `machine.OutputParser`, read by the session. Order is the order of the text. Nothing told is taken back: a call
that breaks after its start says so with `CallBroken`, which brings its text.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CallArguments", "CallBroken", "CallEnd", "CallStart", "Content", "ParserEvent", "Reasoning", "merged"]


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of `name` begins; its arguments follow before anything else."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the open call's arguments. All pieces up to `CallEnd` are one JSON object."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The open call is complete: its arguments are one valid JSON object."""


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The open call is none after all (malformed, cut, too long). `text`: what the model wrote, markers included."""

    text: str
    why: str


ParserEvent = Content | Reasoning | CallStart | CallArguments | CallEnd | CallBroken


def merged(events: list[ParserEvent]) -> list[ParserEvent]:
    """`events` with neighbouring pieces of the same kind joined, in linear time."""
    result: list[ParserEvent] = []
    pieces: list[str] = []
    for i, event in enumerate(events):
        if not isinstance(event, Content | Reasoning | CallArguments):
            result.append(event)
            continue
        pieces.append(event.text)
        if i + 1 == len(events) or type(events[i + 1]) is not type(event):
            result.append(type(event)("".join(pieces)))
            pieces = []
    return result
