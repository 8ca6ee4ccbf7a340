"""Figures that others published: a dated reference series with its doubts, and what Septet measured nearest to each.

Used by the report and by `septet bench published`. The data is `published.json`; nothing here is a measurement, and no
chart of measurements holds any of it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["amount", "nearest", "reference"]


@cache
def reference() -> dict[str, Any]:
    """{"title", "date", "about", "sources", "entries": [{..., "source", "flags": [doubts in words]}]}"""
    known = json.loads(files("septet.bench.harness").joinpath("published.json").read_text())
    for entry in known["entries"]:
        table = entry["source"]
        entry["source"] = f"{known['title']}, {known['date']}: {table}"
        entry["flags"] = [f"[{d['kind']}] {d['why']}" for d in known["doubts"] if entry["id"] in d["entries"]]
    return known  # type: ignore[no-any-return]


def amount(entry: dict[str, Any]) -> str:
    """ "about 3 to 5 %"."""
    if entry["value"] is None:
        return str(entry["unit"])
    top = f" to {entry['to']:,}" if "to" in entry else ""
    return f"{entry.get('bound', '')} {entry['value']:,}{top} {entry['unit']}".strip()


def nearest(results: Path) -> dict[str, str]:
    """Entry -> what Septet measured on the workload nearest to it, with what differs. Of the JSON files in `results`
    that `septet.bench.gpu_workloads` wrote; none: {}."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("benchmark") == "gpu_workloads" and found.get("target") == "septet":
            measured.setdefault(found["shape"], []).append(found)
    said = {}
    pairs = json.loads(files("septet.bench.harness").joinpath("published.json").read_text())["nearest"]
    for entry, match in pairs.items():
        runs = [run for run in measured.get(match["shape"], []) if match["figure"] in run["figures"]]
        if runs:
            values = sorted({_rate(match["figure"], run["figures"][match["figure"]]) for run in runs})
            dates = sorted({str(run.get("date", "undated"))[:10] for run in runs})
            card = runs[0].get("machine", {}).get("gpu", "a GPU")
            what = f"{' and '.join(values)} in {len(runs)} run{'s' * (len(runs) > 1)}"
            said[entry] = f"{what} ({match['differs']}; {card}, {' and '.join(dates)})"
    return said


def _rate(name: str, value: float) -> str:
    if name.endswith("tpot_ms"):
        return f"{1000 / value:,.0f} tokens/s"
    return f"{value:,.0f} ms" if name.endswith("_ms") else f"{value:,.0f} tokens/s"
