"""Two results beside each other: what became worse by more than a threshold. Used by `septet bench compare`.

A figure became worse (or better) where its median did by more than the threshold and the intervals of both lie apart;
a figure of single runs, which have none, can't tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from septet.bench.harness.figures import BETTER
from septet.bench.harness.markdown import number
from septet.errors import InvalidRequest

__all__ = ["Change", "compare"]

FEW_RUNS = 4  # of each, below which lowest-to-highest intervals lie apart by chance too often


@dataclass(frozen=True, slots=True)
class Change:
    where: str
    figure: str
    before: float
    after: float
    worse: float  # percent; below 0: better; infinite where it was 0
    apart: bool | None  # the intervals are; None: there are none

    def verdict(self, threshold: float) -> str:
        """ "worse", "better", "can't tell" or "" (no change that counts)."""
        if abs(self.worse) <= threshold:
            return ""
        if self.apart is None:
            return "can't tell"
        return ("worse" if self.worse > 0 else "better") if self.apart else ""

    def line(self) -> str:
        by = f"{abs(self.worse):.1f} % " if math.isfinite(self.worse) else ""
        word = "worse" if self.worse > 0 else "better" if self.worse < 0 else "the same"
        noted = {True: "", False: ", the intervals overlap", None: ", single runs"}[self.apart]
        return f"{self.figure} {number(self.before)} -> {number(self.after)} ({by}{word}{noted})"


def compare(
    before: dict[str, Any], after: dict[str, Any], wanted: tuple[str, ...] = ()
) -> tuple[list[Change], list[str], list[str]]:
    """(every change of a figure that has a better side, points that are gone, what else a reader must know).

    Targets match by name. InvalidRequest where two measurements have nothing in common. `wanted`: these figures only.
    """
    if unknown := sorted(set(wanted) - set(BETTER)):
        raise InvalidRequest(f"no figure {unknown[0]!r} to compare; there are {', '.join(BETTER)}")
    other = {name for name in before["workloads"] if _differs(name, before, after)}  # of one name, but not the same
    a, b = ({(p["target"], p["workload"], p["label"]): p for p in d["points"]} for d in (before, after))
    notes = _notes(before, after, [key for key in b if key not in a], sorted(other))
    both = [key for key in a if key in b and key[1] not in other]
    if not both:
        raise InvalidRequest("; ".join(["nothing to compare: no target has the same workload in both", *notes]))
    changes = []
    for key in both:
        where, old, new = ", ".join(key), dict(a[key]["figures"]), dict(b[key]["figures"])
        none: dict[str, Any] = {"median": 0.0, "low": 0.0, "high": 0.0}
        if "failed_share" in (*old, *new):  # where none failed it isn't there
            old.setdefault("failed_share", none)
            new.setdefault("failed_share", none)
        for name in (n for n in BETTER if n in old and (n in wanted or not wanted)):
            if name in new:
                changes.append(_change(where, name, old[name], new[name]))
            else:
                notes.append(f"{where}: {name} is not measured in the second")
    gone = [", ".join(key) for key in a if key not in b and key[1] not in other]
    return changes, gone, notes


def _change(where: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    was, now = old["median"], new["median"]
    change = (now - was) / abs(was) * 100 if was else math.copysign(math.inf, now) if now else 0.0
    apart = None
    if None not in (old["low"], old["high"], new["low"], new["high"]):
        apart = old["low"] > new["high"] or new["low"] > old["high"]
    return Change(where, name, was, now, -BETTER[name] * change, apart)


def _notes(
    before: dict[str, Any], after: dict[str, Any], new: list[tuple[str, str, str]], other: list[str]
) -> list[str]:
    notes = []
    for name in ("cpu", "gpu", "threads"):
        one, two = before["machine"].get(name), after["machine"].get(name)
        if one != two:
            notes.append(f"other machines: {name} {one} and {two}")
    for name in other:
        notes.append(f"workload {name} is not the same and not compared: {_differs(name, before, after)}")
    if before["seed"] != after["seed"]:
        notes.append(f"other prompts: seed {before['seed']} and {after['seed']}")
    if before["rounds"] != after["rounds"]:
        notes.append(f"{before['rounds']} and {after['rounds']} rounds")
    targets = {t["name"]: t for t in after["targets"]}
    for one in before["targets"]:
        two = targets.get(one["name"], one)
        for what in ("served_model", "version", "command"):
            if one[what] and two[what] and one[what] != two[what]:
                notes.append(
                    f"{one['name']}: another {what.replace('_', ' ')}: {_said(one[what])} and {_said(two[what])}"
                )
    runs = [p["figures"][f]["runs"] for d in (before, after) for p in d["points"] for f in p["figures"]]
    if 1 < (fewest := min(runs, default=0)) < FEW_RUNS:
        chance = math.comb(2 * fewest, fewest)
        notes.append(f"{fewest} runs lie apart by chance alone in one of {chance} figures; measure --rounds 6")
    notes += [f"the {which} results are partial" for which, d in (("first", before), ("second", after)) if d["partial"]]
    for which, d in (("first", before), ("second", after)):
        if bound := [f"{p['target']}, {p['workload']}, {p['label']}" for p in d["points"] if p["client"]["bound"]]:
            notes.append(f"the {which} was held up by its client: {'; '.join(bound)}")
    return notes + [f"only in the second: {', '.join(key)}" for key in new]


def _differs(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """What of a workload's definition does; '' where it is the same, or not in both."""
    one = before["workloads"][name]
    two = after["workloads"].get(name, one)
    fields = [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and k not in ("title", "about")]
    return "; ".join(f"{k} {one.get(k)} and {two.get(k)}" for k in fields)


def _said(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
