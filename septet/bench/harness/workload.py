"""What a workload is: a TOML file of the package (or of the user), read and checked; and how it is made smaller.

Used by `prompts.py` (which makes its requests) and by the command. Knows no engine and no HTTP.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from septet.advisor.arrivals import read_trace
from septet.errors import InvalidRequest

__all__ = ["Point", "Workload", "load", "names"]

HERE = Path(__file__).parent / "workloads"
KINDS = ("closed", "agents", "open", "trace")
SHAPES = ("poisson", "bursts", "ramp")
MOST_REQUESTS, MOST_TOKENS, MOST_STREAMS = 100_000, 1_000_000, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    title: str
    about: str
    kind: str  # "closed": clients that ask again when answered; "agents"; "open": an arrival process; "trace"
    streams: tuple[int, ...] = (1,)  # each is a point of the report
    requests: int = 1
    prompt: int = 128  # tokens, about
    output: int = 128  # tokens
    spread: bool = False  # lengths drawn around these, not fixed
    prefix: int = 0  # tokens that all prompts of a group begin with
    groups: int = 1
    turns: int = 1
    schema: dict[str, Any] | None = None
    rates: tuple[float, ...] = ()  # requests a second; each is a point of the report
    shape: str = "poisson"
    trace: Path | None = None
    stretch: float = 1.0  # of a trace's times
    share: float = 1.0  # of a trace's requests and lengths
    ttft_ms: float | None = None  # what counts as served well
    tpot_ms: float | None = None

    def points(self) -> list[Point]:
        if self.kind == "open":
            return [Point(f"{rate:g}/s", rate, 1, rate) for rate in self.rates]
        if self.kind == "trace":
            return [Point("trace", 1, 1, 0.0)]
        return [Point(f"{n} at once", n, n, 0.0) for n in self.streams]

    @property
    def longest(self) -> int:
        """Tokens that the longest conversation may hold, about."""
        if self.trace is not None:
            return max(a.prompt + a.output for a in read_trace(self.trace))
        return self.prefix + self.turns * (self.prompt + self.output) * (4 if self.spread else 1)

    def data(self) -> dict[str, Any]:
        """What was run, for the results: a trace by its name and content."""
        told = asdict(self)
        if self.trace is not None:
            told["trace"] = {"name": self.trace.name, "sha256": hashlib.sha256(self.trace.read_bytes()).hexdigest()}
        return told

    def scaled(self, by: float) -> Workload:
        """Fewer and shorter requests, fewer streams, slower arrivals; never none."""
        if not (math.isfinite(by) and 0 < by <= 1):
            raise InvalidRequest(f"scale must be above 0 and at most 1, not {by:g}", param="scale")
        if by == 1:
            return self

        def less(n: int) -> int:
            return max(1, round(n * by)) if n else 0

        return replace(
            self,
            streams=tuple(dict.fromkeys(less(n) for n in self.streams)),
            requests=less(self.requests),
            prompt=less(self.prompt),
            output=self.output if self.schema else max(2, less(self.output)),
            prefix=less(self.prefix),
            rates=tuple(rate * by for rate in self.rates),
            stretch=self.stretch / by,
            share=self.share * by,
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One row of the report: a workload at one number of streams or one rate."""

    label: str
    x: float
    streams: int
    rate: float


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load(name: str) -> Workload:
    """By name, or the path of a TOML file of the same form. InvalidRequest names the file and the field."""
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise InvalidRequest(f"no workload {name!r}; there are {', '.join(names())}, or give the path of a .toml file")
    try:
        given = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path.name} is no TOML: {error}") from None
    return _checked(given, path)


def _checked(given: dict[str, Any], path: Path) -> Workload:
    def wrong(what: str) -> InvalidRequest:
        return InvalidRequest(f"workload {path.name}: {what}")

    known = {f.name: f for f in fields(Workload)}
    for name, value in given.items():
        if name not in known or name == "name":
            raise wrong(f"no field {name!r}; there are {', '.join(sorted(set(known) - {'name'}))}")
        if problem := _problem(name, value):
            raise wrong(f"{name} {problem}")
    for name in ("title", "about", "kind"):
        if name not in given:
            raise wrong(f"{name} is missing")
    if given["kind"] == "open" and not given.get("rates"):
        raise wrong("an open workload needs rates")
    if given["kind"] == "trace" and "trace" not in given:
        raise wrong("a trace workload needs trace, the name of a file beside it")
    if dead := sorted(set(given) - USED[given["kind"]] - {"title", "about", "kind"}):
        raise wrong(f"a workload of kind {given['kind']!r} does not use {', '.join(dead)}")
    if given.get("schema") == {}:
        raise wrong("schema is empty; leave it out where answers are free")
    if "trace" in given:
        given["trace"] = path.parent / given["trace"]
    for name in ("streams", "rates"):
        if name in given:
            given[name] = tuple(given[name])
    return Workload(name=path.stem, **given)


COUNTS = {
    "requests": MOST_REQUESTS,
    "prompt": MOST_TOKENS,
    "output": MOST_TOKENS,
    "groups": MOST_REQUESTS,
    "turns": 100,
}
LENGTHS = {"requests", "prompt", "output", "spread", "prefix", "groups", "schema", "ttft_ms", "tpot_ms"}
USED = {  # by kind; any other field is a mistake
    "closed": LENGTHS | {"streams"},
    "agents": LENGTHS | {"streams", "turns"},
    "open": LENGTHS | {"rates", "shape"},
    "trace": {"trace", "stretch", "share", "ttft_ms", "tpot_ms"},
}
ONE_OF = {"kind": KINDS, "shape": SHAPES}


def _problem(name: str, value: Any) -> str:
    """What is wrong with a field; nothing: ''."""
    if name in ONE_OF:
        return "" if value in ONE_OF[name] else f"is {value!r}; it is one of {', '.join(ONE_OF[name])}"
    if name in COUNTS or name == "prefix":
        most = COUNTS.get(name, MOST_TOKENS)
        return (
            ""
            if _whole(value, 0 if name == "prefix" else 1, most)
            else f"is {value!r}; a number up to {most} is needed"
        )
    if name == "streams":
        good = isinstance(value, list) and value and all(_whole(n, 1, MOST_STREAMS) for n in value)
        return "" if good else f"is {value!r}; a list of numbers from 1 to {MOST_STREAMS} is needed"
    if name == "rates":
        good = isinstance(value, list) and value and all(_positive(rate) for rate in value)
        return "" if good else f"is {value!r}; a list of numbers above 0 is needed"
    if name in ("ttft_ms", "tpot_ms", "stretch", "share"):
        return "" if _positive(value) else f"is {value!r}; a number above 0 is needed"
    wanted = {"spread": bool, "schema": dict}.get(name, str)
    return "" if isinstance(value, wanted) else f"is {value!r}; {wanted.__name__} is needed"


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
