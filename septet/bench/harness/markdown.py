"""Results as text: a few lines for the terminal, and a Markdown page. Used by the command and by `report.py`."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from septet.bench.harness.figures import BOOTSTRAP_FROM, UNITS

__all__ = ["markdown", "plain_lines", "with_interval"]

COLUMNS = ("output_tokens_s", "ttft_ms", "tpot_ms", "goodput_s", "memory_mib")


def number(value: float | None) -> str:
    if value is None:
        return ""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def with_interval(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    text = number(figure["median"])
    low, high = number(figure["low"]), number(figure["high"])
    return text if low == high in ("", text) else f"{text} ({low} to {high})"


def plain_lines(document: dict[str, Any]) -> list[str]:
    lines = []
    for p in document["points"]:
        f = p["figures"]
        parts = [f"{number(f[name]['median'])} {UNITS[name]}" for name in COLUMNS if name in f]
        share = f", {p['share_of_limit']:.0%} of the limit" if p["share_of_limit"] else ""
        mark = " PARTIAL" if p["partial"] else ""
        mark += " CLIENT-BOUND" if p["client"]["bound"] else ""
        lines.append(f"{p['target']:16} {p['workload']:10} {p['label']:12} {', '.join(parts)}{share}{mark}")
    return lines


def cost(document: dict[str, Any], point: dict[str, Any]) -> float | None:
    """USD per million output tokens at this point's rate."""
    rate, price = point["figures"].get("output_tokens_s"), document.get("price")
    return price["usd_per_hour"] / 3600 / rate["median"] * 1e6 if price and rate and rate["median"] else None


def started(target: dict[str, Any]) -> str:
    """Seconds of each start."""
    return ", ".join(f"{s:.1f}" for s in target["start_s"])


def label(point: dict[str, Any]) -> str:
    """Of a row: the point, and what makes its figures doubtful."""
    doubts = ["partial"] * point["partial"] + ["client-bound"] * bool(point["client"]["bound"])
    return point["label"] + (f" ({', '.join(doubts)})" if doubts else "")


def about(document: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    m = document["machine"]
    launched = any(t["command"] for t in document["targets"])
    machine = (launched and m.get("gpu")) or f"{', '.join(m['cpu'])}, {m['allowed_cores']} cores"
    where = f"Measured on {document['date']} on {machine}" if launched else (
        f"Asked on {document['date']} from {machine}; where the servers run is not known"
    )  # fmt: skip
    rounds, price = document["rounds"], document.get("price")
    interval = (
        "no intervals: one run can't tell" if rounds == 1
        else f"in brackets lowest to highest of the {rounds} runs (from {BOOTSTRAP_FROM} runs on: 95 % intervals)"
        if rounds < BOOTSTRAP_FROM else "in brackets 95 % bootstrap intervals over runs and their requests"
    )  # fmt: skip
    limits: dict[str, list[str]] = {}
    for name, limit in document["limits"].items():
        line = (
            f"{limit['weights_bytes'] / 1e6:,.0f} MB of weights ({limit['model']}) read at "
            f"{limit['read_gb_s']:g} GB/s, {limit['by']}, plus keys and values"
        ) + (f", and {limit['flops'] / 1e12:,.0f} TFLOP/s." if limit.get("flops") else "; computing is not in it.")
        limits.setdefault(line, []).append(name)
    return [
        f"{where}, commit {document['commit']}: `{document['command']}`.",
        f"{rounds} round{'s' * (rounds > 1)}, engines in turn; medians, each run counting alike; {interval}"
        + (f"; workloads scaled by {document['scale']:g}." if document["scale"] != 1 else "."),
        f"A machine's hour at ${price['usd_per_hour']:g} ({price['by']})."
        if price
        else "No price was given (--price), so there is no cost.",
        *(f"Limit of {', '.join(names)}: {line}" for line, names in limits.items()),
    ]


def columns(points: list[dict[str, Any]]) -> list[str]:
    return [name for name in UNITS if any(name in p["figures"] for p in points)]


def table(document: dict[str, Any], workload: str) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a workload's figures."""
    points = [p for p in document["points"] if p["workload"] == workload]
    shown = columns(points)
    costs = [cost(document, p) for p in points]
    shares = [p["share_of_limit"] for p in points]
    head = ["engine", "point", *(UNITS[n] for n in shown)]
    rows = [[p["target"], label(p), *(with_interval(p["figures"].get(n)) for n in shown)] for p in points]
    for name, cells in (("$ per 1M out", [number(usd) for usd in costs]),
                        ("of the limit", [f"{share:.0%}" if share else "" for share in shares])):  # fmt: skip
        if any(cells):
            head.append(name)
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return head, rows


def engines(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [t["name"], t["version"], t["served_model"] or t["model"], f"{t['status']} {t['why']}".strip(), started(t),
         " ".join(t["command"])]
        for t in document["targets"]
    ]  # fmt: skip
    head = ["engine", "version", "model", "state", "start, s", "command"]
    used = [i for i in range(len(head)) if i < 4 or any(row[i] for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


def markdown(document: dict[str, Any]) -> str:
    lines = ["# septet bench", ""]
    if document["partial"]:
        lines += ["**PARTIAL: not all that was asked for could be measured.**", ""]
    lines += [f"{_plain(line)}  " for line in about(document)]
    lines += ["", *(f"- {_plain(note)}" for note in document["notes"])]
    lines += ["", "## Engines", "", *_rows(*engines(document))]
    for workload in dict.fromkeys(p["workload"] for p in document["points"]):
        title = next(p["title"] for p in document["points"] if p["workload"] == workload)
        lines += ["", f"## {_plain(title)} ({_plain(workload)})", "", *_rows(*table(document, workload))]
    return "\n".join(lines) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(map(_plain, row)) + " |" for row in (head, ["---"] * len(head), *rows)]


def _plain(text: str) -> str:
    """What a server or a file called something can't become markup, a row or a link."""
    return re.sub(r"([|\\\[\]])", r"\\\1", escape(" ".join(text.split()), quote=False))
