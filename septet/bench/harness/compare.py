"""Two results beside each other: what became worse by more than a threshold. Used by `septet bench compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from septet.bench.harness.figures import BETTER
from septet.bench.harness.markdown import number
from septet.errors import InvalidRequest

__all__ = ["Change", "compare"]


@dataclass(frozen=True, slots=True)
class Change:
    where: str
    figure: str
    before: float
    after: float | None  # None: no longer measured
    worse: float  # percent; below 0: better
    overlap: bool  # the intervals do

    def line(self) -> str:
        if self.after is None:
            return f"{self.where}: {self.figure} {number(self.before)} -> not measured"
        word = "worse" if self.worse > 0 else "better"
        noted = " (the intervals overlap)" if self.overlap else ""
        return (
            f"{self.where}: {self.figure} {number(self.before)} -> {number(self.after)}, "
            f"{abs(self.worse):.1f} % {word}{noted}"
        )


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """Every change of a figure that has a better side, and what else a reader must know.

    Targets match by name; InvalidRequest where two measurements have nothing in common or workloads of another size.
    """
    if before["scale"] != after["scale"]:
        raise InvalidRequest(f"the workloads differ: scaled by {before['scale']:g} and by {after['scale']:g}")
    a, b = ({(p["target"], p["workload"], p["label"]): p for p in d["points"]} for d in (before, after))
    if not set(a) & set(b):
        raise InvalidRequest("nothing to compare: no target has a workload in both")
    changes = []
    for key, point in a.items():
        where = ", ".join(key)
        other = b[key]["figures"] if key in b else {}
        for name, figure in point["figures"].items():
            if name in BETTER:
                changes.append(_change(where, name, figure, other.get(name)))
        if (new := other.get("failed_share")) and "failed_share" not in point["figures"]:
            changes.append(Change(where, "failed_share", 0.0, new["median"], 100.0, False))
    return changes, _notes(before, after, set(b) - set(a))


def _change(where: str, name: str, old: dict[str, Any], new: dict[str, Any] | None) -> Change:
    if new is None:
        if name == "failed_share":  # none fails any more
            return Change(where, name, old["median"], 0.0, -100.0, False)
        return Change(where, name, old["median"], None, 100.0, False)
    change = (new["median"] - old["median"]) / abs(old["median"]) * 100 if old["median"] else 0.0
    known = None not in (old["low"], old["high"], new["low"], new["high"])
    overlap = known and old["low"] <= new["high"] and new["low"] <= old["high"]
    return Change(where, name, old["median"], new["median"], -BETTER[name] * change, overlap)


def _notes(before: dict[str, Any], after: dict[str, Any], new: set[tuple[str, str, str]]) -> list[str]:
    notes = []
    for name in ("cpu", "gpu", "threads"):
        one, two = before["machine"].get(name), after["machine"].get(name)
        if one != two:
            notes.append(f"other machines: {name} {one} and {two}")
    notes += [f"the {which} results are partial" for which, d in (("first", before), ("second", after)) if d["partial"]]
    return notes + [f"only in the second: {', '.join(key)}" for key in sorted(new)]
