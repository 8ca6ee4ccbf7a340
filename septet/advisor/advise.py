"""Which engine for which workload: rankings that are data (`rules.json`), added up, with what they rest on.

Called by `septet advise` and `tree.py`. Nothing here knows an engine's name: all statements, their sources and the
weights are in the file. An engine that can't be had on the hardware, or that the use rules out, is out, with the
reason; every engine is either ranked or out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from septet.advisor.hardware import Hardware, all_hardware, hardware
from septet.advisor.rules import DIMENSIONS, choices, engines, lines, rules, status
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from septet.advisor.fit import Fit
    from septet.advisor.rules import Line, Status

__all__ = ["DIMENSIONS", "Advice", "Counted", "Question", "Ranked", "Told", "advise", "choices", "first", "known_names"]

TOP = 3  # engines of a ranking that a warning is about


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """hardware: a class (h100, nvidia, amd, ...), or a machine of `septet plan`, which is put into its class."""

    hardware: str
    use: str
    priority: str
    model: str = ""
    users: int | None = None
    machine: str = ""  # of `septet plan`'s table; "" where it has none of this class

    def __post_init__(self) -> None:
        group, machine = _placed(self.hardware)
        object.__setattr__(self, "hardware", group)
        object.__setattr__(self, "machine", machine)
        for name in DIMENSIONS[1:]:
            given, known = getattr(self, name), choices(name)
            if given not in known:
                raise InvalidRequest(f"{name} must be one of {', '.join(known)}, not {given!r}", param=name)
        if self.users is not None and self.users < 1:
            raise InvalidRequest(f"users must be at least 1, not {self.users}", param="users")
        if not self.model.isprintable():
            raise InvalidRequest("model: a name or a path has no control characters", param="model")


@dataclass(frozen=True, slots=True)
class Told:
    """A statement that is not about a place: a warning, a caution."""

    says: str
    known: str
    source: str = ""
    seen: str = ""  # the machine


@dataclass(frozen=True, slots=True)
class Counted:
    """A line of a ranking as it counts for this question."""

    dimension: str
    place: int  # among the engines that can be had here
    points: float
    told: Told
    less: tuple[str, ...]  # why it counts less than its place


@dataclass(frozen=True, slots=True)
class Ranked:
    engine: str
    title: str
    place: int
    tied: bool
    points: float
    lines: tuple[Counted, ...]
    cautions: tuple[Told, ...]


@dataclass(frozen=True, slots=True)
class Out:
    engine: str
    title: str
    why: str


@dataclass(frozen=True, slots=True)
class Advice:
    question: Question
    ranking: tuple[Ranked, ...]
    out: tuple[Out, ...]
    silent: tuple[str, ...]  # answers that count for nothing here
    contradictions: tuple[Told, ...]
    warnings: tuple[Told, ...]
    fit: tuple[str, ...]
    corrections: tuple[dict[str, Any], ...]
    changes: tuple[str, ...]  # what another answer to one question would change
    profile: dict[str, Any]  # Septet's own: command ("" if there is none), before, why
    plan: str  # the command that counts devices; "" where it has no figures

    def data(self) -> dict[str, Any]:
        return asdict(self)


def known_names() -> str:
    """Of --hardware, for a message."""
    return f"{', '.join(choices('hardware'))}, or a machine: {', '.join(h.name for h in all_hardware())}"


def advise(question: Question) -> Advice:
    from septet.advisor.fit import Fit, check_fit
    from septet.advisor.profile import plan_command, profile

    ranking, out, silent = _rank(question)
    own_out = next((each.why for each in out if each.engine == rules()["own"]), "")
    fit = check_fit(question.model, question.users, _machine(question)) if question.machine else Fit()
    contradictions, warnings = _warnings(question, ranking, fit)
    return Advice(
        question=question,
        ranking=ranking,
        out=out,
        silent=silent,
        contradictions=contradictions,
        warnings=warnings,
        fit=fit.notes,
        corrections=tuple(
            {name: c[name] for name in ("about", "published", "now", "source")}
            for c in rules()["corrections"]
            if question.hardware in c.get("for", [question.hardware])
        ),
        changes=_changes(question, ranking),
        profile=profile(question, fit, own_out),
        plan=plan_command(question, fit),
    )


def first(ranking: tuple[Ranked, ...]) -> tuple[str, ...]:
    """Titles of those that come first."""
    return tuple(ranked.title for ranked in ranking if ranked.place == 1)


def rank(question: Question) -> tuple[Ranked, ...]:
    """The ranking alone."""
    return _rank(question)[0]


def _placed(name: str) -> tuple[str, str]:
    """(class, machine) of a name."""
    classes = rules()["dimensions"]["hardware"]
    if name in classes:
        return name, classes[name]["card"]
    try:
        machine = hardware(name)
    except InvalidRequest:
        raise InvalidRequest(f"hardware must be one of {known_names()}; not {name!r}", param="hardware") from None
    return rules()["kinds"][machine.kind], machine.name


def _machine(question: Question) -> Hardware:
    return hardware(question.machine)


# -- the ranking ------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2048)  # "what would change" asks for the neighbours of each question
def _rank(question: Question) -> tuple[tuple[Ranked, ...], tuple[Out, ...], tuple[str, ...]]:
    barred = {name: why for name in engines() if (why := _barred(name, question))}
    counted: dict[str, list[Counted]] = defaultdict(list)
    silent = []
    for dimension in DIMENSIONS:
        listed = lines(dimension, getattr(question, dimension), question.hardware)
        kept = [line for line in listed if line.engine not in barred]
        places = {place: i for i, place in enumerate(sorted({line.place for line in kept}), 1)}
        for line in kept:
            counted[line.engine].append(_count(dimension, places[line.place], line, question))
        if not kept:
            title = choices(dimension)[getattr(question, dimension)]
            silent.append(f"{dimension} {title!r} counts for nothing: no engine that it ranks can be had here")
    points = {name: round(sum(c.points for c in found), 6) for name, found in counted.items()}
    order = sorted(points, key=lambda name: (-points[name], engines()[name]["title"].lower()))
    ranking = tuple(
        Ranked(
            engine=name,
            title=engines()[name]["title"],
            place=1 + sum(p > points[name] for p in points.values()),
            tied=sum(p == points[name] for p in points.values()) > 1,
            points=points[name],
            lines=tuple(counted[name]),
            cautions=_cautions(name, question),
        )
        for name in order
    )
    out = {name: barred.get(name, "it runs there, but nothing ranks it for these answers") for name in engines()}
    return (
        ranking,
        tuple(Out(n, engines()[n]["title"], why) for n, why in out.items() if n not in points),
        tuple(silent),
    )


def _barred(name: str, question: Question) -> str:
    """Why an engine can't be had for this question; "" if it can."""
    engine, here = engines()[name], status(name, question.hardware)
    where, use = choices("hardware")[question.hardware], choices("use")[question.use]
    needs = rules()["dimensions"]["use"][question.use].get("needs", {})
    if not here.here:
        return _absent(here, where)
    if "archived" in engine:
        return str(engine["archived"])
    if "hardware" in needs and not (there := status(name, needs["hardware"])).here:
        return _absent(there, use)
    if engine["ease"] not in needs.get("ease", [engine["ease"]]):
        return f"{engine['ease']} to run, which {use} rules out"
    return ""


def _absent(found: Status, where: str) -> str:
    return f"{'not tested' if found.kind == 'untested' else 'does not run'} on {where}: {found.note}"


def _count(dimension: str, place: int, line: Line, question: Question) -> Counted:
    less, factors = [], rules()["points"]["factors"]
    if line.on and question.hardware not in line.on:
        less.append("elsewhere")
    if (kind := status(line.engine, question.hardware).kind) in factors:
        less.append(kind)
    if line.rounds == 1:
        less.append("once")
    if question.users is not None and question.users > engines()[line.engine].get("users", [question.users])[0]:
        less.append("users")
    asked = (rules()["dimensions"][name][getattr(question, name)] for name in DIMENSIONS)
    if any(line.engine in answer.get("against", ()) for answer in asked):
        less.append("against")
    points = rules()["points"]["weights"][dimension] / place
    for name in less:
        points *= factors[name][0]
    seen = line.on.get(question.hardware) or ", ".join(line.on.values())
    return Counted(dimension, place, points, Told(line.says, line.known, line.source, seen),
                   tuple(factors[name][1] for name in less))  # fmt: skip


def _cautions(name: str, question: Question) -> tuple[Told, ...]:
    found = [
        Told(c["says"], c["known"], c["source"], ", ".join(c.get("on", {}).values()))
        for c in engines()[name]["cautions"]
        if question.hardware in c.get("for", [question.hardware]) and question.use in c.get("use", [question.use])
    ]
    here, factors = status(name, question.hardware), rules()["points"]["factors"]
    if here.kind in factors:
        known = "corrected" if here.source else "rule of thumb"
        found.append(Told(f"{factors[here.kind][1]}: {here.note}", known, here.source))
    most, why = engines()[name].get("users", [None, ""])
    if most is not None and question.users is not None and question.users > most:
        found.append(Told(f"not for {question.users:,} users: {why}; up to about {most}", "rule of thumb"))
    return tuple(found)


# -- what else is to be said ------------------------------------------------------------------------------------------
def _warnings(question: Question, ranking: tuple[Ranked, ...], fit: Fit) -> tuple[tuple[Told, ...], tuple[Told, ...]]:
    """(what contradicts itself or can't be, what to mind)."""
    top = {r.engine for r in ranking if r.place <= TOP}
    contradictions = [Told(says, "arithmetic", "septet plan") for says in fit.impossible]
    warnings: list[Told] = []
    for entry in rules()["warnings"]:
        if any(_applies(when, question, top) for when in entry["when"]):
            told = Told(entry["says"], entry["known"], entry["source"])
            (contradictions if entry["contradiction"] else warnings).append(told)
    users, crowds, use = question.users, rules()["crowds"], choices("use")[question.use]
    if users is not None and users > crowds["most"].get(question.use, users):
        contradictions.append(Told(f"{use} with {users:,} users is no longer {use}", "rule of thumb"))
    if users is not None and users < crowds["least"].get(question.use, users):
        contradictions.append(Told(f"{users:,} user{'s' * (users > 1)} are not {use}", "rule of thumb"))
    if users is not None and ranking and all(users > engines()[r.engine].get("users", [users])[0] for r in ranking):
        contradictions.append(Told(f"no engine that can be had here is for {users:,} users", "rule of thumb"))
    return tuple(contradictions), tuple(warnings)


def _applies(when: dict[str, list[str]], question: Question, top: set[str]) -> bool:
    answers = {name: [getattr(question, name)] for name in DIMENSIONS}
    return all(set(wanted) <= top if name == "ranked" else answers[name][0] in wanted for name, wanted in when.items())


def _changes(question: Question, ranking: tuple[Ranked, ...]) -> tuple[str, ...]:
    """For each question, the other answers that put another engine first."""
    found, now = [], first(ranking)
    for name in DIMENSIONS:
        others: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for answer in choices(name):
            asked = {each: getattr(question, each) for each in DIMENSIONS} | {name: answer}
            then = first(rank(Question(**asked, users=question.users)))
            if then != now:
                others[then].append(answer)
        found += [f"{name}: {', '.join(answers)} -> {' or '.join(then)}" for then, answers in others.items()]
        if not others:
            found.append(f"{name}: no other answer changes who comes first")
    return tuple(found)
