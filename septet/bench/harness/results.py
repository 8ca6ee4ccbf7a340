"""The document of a measurement as it grows: what is written as JSON (`document.py` reads it back).

Made by `measure.py`. Written after each run, so that what was measured before a
failure is kept; `partial` says that something is missing, `notes` what.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.bench.harness.document import FORMAT
from septet.bench.harness.figures import figures

if TYPE_CHECKING:
    from pathlib import Path

    from septet.bench.harness.drive import Run
    from septet.bench.harness.workload import Point, Workload

__all__ = ["Results", "run_of"]

BUSY, LAG_MS, LAG_SHARE = 0.8, 5.0, 0.1  # of this client, beyond which what was measured is partly itself


@dataclass
class Results:
    head: dict[str, Any]  # command, commit, date, machine, ...
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)  # as they were run, by name
    points: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    _figures: dict[tuple[Any, int], dict[str, Any]] = field(default_factory=dict)  # by point and number of runs

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def add(self, target: str, work: Workload, point: Point, run: dict[str, Any], limit: float | None) -> None:
        key = (target, work.name, point.label)
        entry = self.points.setdefault(key, {
            "target": target, "workload": work.name, "title": work.title, "label": point.label, "kind": work.kind,
            "x": point.x, "limit_tokens_s": limit, "partial": False, "runs": [],
        })  # fmt: skip
        entry["runs"].append(run)
        entry["partial"] |= bool(run["lost"]) or run["interrupted"]

    def document(self) -> dict[str, Any]:
        points, notes = [], list(self.notes)
        for key, entry in self.points.items():
            known = (key, len(entry["runs"]))
            if known not in self._figures:
                self._figures[known] = figures(entry["runs"])
            found = self._figures[known]
            share = None
            if entry["limit_tokens_s"] and "output_tokens_s" in found:
                share = (found["output_tokens_s"]["median"] or 0.0) / entry["limit_tokens_s"]
            client = _client(entry, found)
            if client["bound"]:
                late = max(client["lag_ms"], client["late_ms"])
                notes.append(f"{', '.join(key)}: this client was busy {client['busy']:.0%} of the time and up to "
                             f"{late:.1f} ms late: rates are a lower bound, TTFT holds its backlog")  # fmt: skip
            points.append({**entry, "figures": found, "share_of_limit": share, "client": client})
        partial = not self.finished or any(t["status"] not in ("measured", "missing") for t in self.targets.values())
        return {"format": FORMAT, **self.head, "partial": partial, "notes": notes, "workloads": self.workloads,
                "targets": list(self.targets.values()), "points": points}  # fmt: skip

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        made = path.with_suffix(".part")
        made.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(made, path)


def _client(entry: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """How busy and how late this client was in the worst run, and whether that may be what was measured."""
    told = {name: max(run["client"][name] for run in entry["runs"]) for name in ("busy", "lag_ms", "late_ms")}
    slow = max(LAG_MS, LAG_SHARE * found["ttft_ms"]["median"]) if "ttft_ms" in found else LAG_MS
    return {**told, "bound": told["busy"] > BUSY or max(told["lag_ms"], told["late_ms"]) > slow}


def run_of(run: Run, work: Workload, number: int) -> dict[str, Any]:
    """One run's part of the document."""
    good = [s for s in run.samples if s.ok]
    tokens, wall = sum(s.tokens for s in good), run.wall_s if good else 0.0
    rates: dict[str, float | None] = {
        "output_tokens_s": None,
        "total_tokens_s": None,
        "requests_s": None,
        "goodput_s": None,
    }
    judged = work.ttft_ms is not None or work.tpot_ms is not None
    if wall > 0:
        rates = {"output_tokens_s": tokens / wall, "requests_s": len(good) / wall,
                 "total_tokens_s": (tokens + sum(s.prompt_tokens for s in good)) / wall,
                 "goodput_s": sum(_in_time(s, work) for s in good) / wall if judged else None}  # fmt: skip
    ended = [s for s in good if s.ended == "stop"] if work.schema is not None else []
    return {
        "round": number,
        "wall_s": run.wall_s,
        "requests": run.expected,
        "failed": run.expected - len(good),
        "error": next((s.error for s in run.samples if s.error), ""),
        "lost": run.lost,
        "interrupted": run.interrupted,
        "output_tokens": tokens,
        "prompt_tokens": statistics.median([s.prompt_tokens for s in good if s.prompt_tokens] or [0]) or None,
        "answer_tokens": statistics.median([s.tokens for s in good]) if good else None,
        "counted_by_server": all(s.counted for s in good),
        "short": sum(s.tokens < s.asked for s in good) if work.schema is None else 0,
        "valid_share": sum(_valid(s.text, work.schema) for s in ended) / len(ended) if ended else None,
        "client": {
            "busy": round(run.busy, 3),
            "lag_ms": round(_p95(run.lags) * 1e3, 2),
            "late_ms": round(max((s.late for s in run.samples), default=0.0) * 1e3, 2),
        },
        **rates,
        "ttft_ms": [round(s.ttft_ms, 3) for s in good],
        "tpot_ms": [round(s.tpot_ms, 4) for s in good if s.tpot_ms is not None],
        "e2e_ms": [round(s.e2e_ms, 3) for s in good],
    }


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))] if values else 0.0


def _in_time(sample: Any, work: Workload) -> bool:
    soon = work.ttft_ms is None or sample.ttft_ms <= work.ttft_ms
    return soon and (work.tpot_ms is None or (sample.tpot_ms or 0.0) <= work.tpot_ms)


def _valid(text: str, schema: dict[str, Any] | None) -> bool:
    """Of the schema's top level: required names, no others, their types and enums. Enough to tell a free answer."""
    kinds: dict[str, Any] = {"string": str, "integer": int, "array": list, "object": dict, "number": (int, float)}
    try:
        value = json.loads(text)
    except ValueError:
        return False
    properties = (schema or {}).get("properties", {})
    if not isinstance(value, dict) or not set((schema or {}).get("required", ())) <= set(value) <= set(properties):
        return False
    return all(
        isinstance(value[name], kinds.get(form.get("type"), object)) and value[name] in form.get("enum", [value[name]])
        for name, form in properties.items()
        if name in value
    )
