"""Which engine for which workload: rankings that are data (`rules.json`), added up, with what they rest on.

Called by `septet advise`. Nothing here knows an engine's name: all statements, their sources and the weights are in the
file. An engine that does not run on the hardware is out, whatever it scores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from septet.errors import InvalidRequest

__all__ = ["DIMENSIONS", "Advice", "Question", "Ranked", "advise", "choices"]

DIMENSIONS = ("hardware", "use", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    hardware: str
    use: str
    priority: str
    model: str = ""
    users: int = 1

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            given, known = getattr(self, name), choices(name)
            if given not in known:
                raise InvalidRequest(f"{name} must be one of {', '.join(known)}, not {given!r}", param=name)
        if self.users < 1:
            raise InvalidRequest(f"users must be at least 1, not {self.users}", param="users")


@dataclass(frozen=True, slots=True)
class Ranked:
    engine: str
    title: str
    points: float
    reasons: tuple[tuple[str, str, str], ...]  # (dimension's title, statement, how it is known)
    caution: str


@dataclass(frozen=True, slots=True)
class Advice:
    question: Question
    ranking: tuple[Ranked, ...]
    excluded: tuple[tuple[str, str], ...]  # (engine, why)
    warnings: tuple[str, ...]
    corrections: tuple[tuple[str, str, str], ...]  # (engine, as published, now)
    changes: tuple[str, ...]  # what another answer to one question would change
    profile: str  # Septet's command
    profile_why: str

    def data(self) -> dict[str, Any]:
        return asdict(self)


@cache
def rules() -> dict[str, Any]:
    return json.loads(files("septet.advisor").joinpath("rules.json").read_text())  # type: ignore[no-any-return]


def choices(dimension: str) -> dict[str, str]:
    """name -> title of the answers to one question."""
    return {name: entry["title"] for name, entry in rules()["dimensions"][dimension].items()}


def advise(question: Question) -> Advice:
    ranking, excluded = _rank(question)
    named = {r.engine for r in ranking} | {"figures"}
    profile = rules()["profiles"][question.use]
    model = question.model or "MODEL"
    return Advice(
        question=question,
        ranking=ranking,
        excluded=excluded,
        warnings=tuple(w["says"] for w in rules()["warnings"] if _applies(w["when"], question)),
        corrections=tuple(
            (c["about"], c["published"], c["now"]) for c in rules()["corrections"] if c["about"] in named
        ),
        changes=_changes(question, ranking[0].engine),
        profile=" ".join(["septet serve", model, *profile["flags"]]),
        profile_why=profile["why"],
    )


def _rank(question: Question) -> tuple[tuple[Ranked, ...], tuple[tuple[str, str], ...]]:
    points: dict[str, float] = {}
    reasons: dict[str, list[tuple[str, str, str]]] = {}
    for dimension in DIMENSIONS:
        entry = rules()["dimensions"][dimension][getattr(question, dimension)]
        for place, (engine, says, known) in enumerate(entry["ranking"], 1):
            points[engine] = points.get(engine, 0.0) + rules()["weights"][dimension] / place
            reasons.setdefault(engine, []).append((entry["title"], says, known))
    engines = rules()["engines"]
    out = [
        (name, f"does not run on {choices('hardware')[question.hardware]}")
        for name in points
        if question.hardware not in engines[name]["runs_on"]
    ]
    kept = [
        Ranked(name, engines[name]["title"], round(score, 3), tuple(reasons[name]), engines[name]["caution"])
        for name, score in points.items()
        if name not in dict(out)
    ]
    return tuple(sorted(kept, key=lambda r: (-r.points, r.engine))), tuple(sorted(out))


def _applies(when: dict[str, str], question: Question) -> bool:
    return all(getattr(question, name) == value for name, value in when.items())


def _changes(question: Question, first: str) -> tuple[str, ...]:
    """For each question, the other answers that put another engine first."""
    found = []
    given = {name: getattr(question, name) for name in DIMENSIONS}
    for name in DIMENSIONS:
        others: dict[str, list[str]] = {}
        for answer, title in choices(name).items():
            ranking, _ = _rank(Question(**{**given, name: answer}))
            if ranking and ranking[0].engine != first:
                others.setdefault(ranking[0].title, []).append(title)
        found += [f"{name}: {', '.join(titles)} -> {engine}" for engine, titles in others.items()]
    return tuple(found)
