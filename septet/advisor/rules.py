"""What `rules.json` holds, typed: engines, lines of rankings, warnings, corrections, profiles.

Used by `advise.py` and `tree.py`. Knows no engine's name and adds nothing up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["DIMENSIONS", "Line", "Status", "choices", "engines", "lines", "on_class", "rules", "status"]

DIMENSIONS = ("hardware", "use", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A statement about an engine: its place in one ranking, and what that rests on."""

    engine: str
    place: int
    says: str
    known: str
    source: str
    on: dict[str, str] = field(default_factory=dict)  # class of hardware -> the machine it was seen on; empty: not said
    rounds: int = 0  # of the measurement; 0: not said


@dataclass(frozen=True, slots=True)
class Status:
    """Of an engine on a class of hardware. Ranked are those that run there, restricted, or untested but expected to."""

    kind: str  # runs | limited | assumed | untested | no
    note: str
    source: str = ""

    @property
    def here(self) -> bool:
        return self.kind in ("runs", "limited", "assumed")


@cache
def rules() -> dict[str, Any]:
    return json.loads(files("septet.advisor").joinpath("rules.json").read_text())  # type: ignore[no-any-return]


def choices(dimension: str) -> dict[str, str]:
    """name -> title of the answers to one question."""
    return {name: entry["title"] for name, entry in rules()["dimensions"][dimension].items()}


def engines() -> dict[str, dict[str, Any]]:
    return rules()["engines"]  # type: ignore[no-any-return]


def status(engine: str, hardware: str) -> Status:
    return Status(*engines()[engine]["hardware"][hardware])


@cache
def lines(dimension: str, answer: str, hardware: str) -> tuple[Line, ...]:
    """The ranking of this answer that is meant for this class of hardware, best first."""
    orders = rules()["dimensions"][dimension][answer]["orders"]
    return tuple(Line(**line) for line in on_class(orders, hardware)["lines"])


def on_class(variants: list[dict[str, Any]], hardware: str) -> dict[str, Any]:
    """The first that is meant for this class; one without "for" is meant for all."""
    return next(entry for entry in variants if hardware in entry.get("for", [hardware]))
