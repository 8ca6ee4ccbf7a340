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
    measured: dict[str, tuple[dict[str, float], str]] = {}
    for path in sorted(results.glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("benchmark") == "gpu_workloads" and found.get("target") == "septet":
            date, card = str(found.get("date", "undated"))[:10], found.get("machine", {}).get("gpu", "a GPU")
            measured[found["shape"]] = (found["figures"], f"{card}, {date}, commit {found.get('commit')}")
    said = {}
    for entry, match in json.loads(files("septet.bench.harness").joinpath("published.json").read_text())[
        "nearest"
    ].items():
        figures, where = measured.get(match["shape"], ({}, ""))
        value = figures.get(match["figure"])
        if value is not None:
            said[entry] = f"{_rate(match['figure'], value)} ({match['differs']}; {where})"
    return said


def _rate(name: str, value: float) -> str:
    if name.endswith("tpot_ms"):
        return f"{1000 / value:,.0f} tokens/s"
    return f"{value:,.0f} ms" if name.endswith("_ms") else f"{value:,.0f} tokens/s"
