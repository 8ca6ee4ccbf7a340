"""Results as text: a few lines for the terminal, and a Markdown page. Used by the command and by `report.py`."""

from __future__ import annotations

from typing import Any

from septet.bench.harness.figures import UNITS

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
    return text if figure["low"] is None else f"{text} ({number(figure['low'])} to {number(figure['high'])})"


def plain_lines(document: dict[str, Any]) -> list[str]:
    lines = []
    for p in document["points"]:
        f = p["figures"]
        parts = [f"{number(f[name]['median'])} {UNITS[name]}" for name in COLUMNS if name in f]
        share = f", {p['share_of_limit']:.0%} of the memory's limit" if p["share_of_limit"] else ""
        mark = " PARTIAL" if p["partial"] else ""
        lines.append(f"{p['target']:16} {p['workload']:10} {p['label']:12} {', '.join(parts)}{share}{mark}")
    return lines


def cost(document: dict[str, Any], point: dict[str, Any]) -> float | None:
    """USD per million output tokens at this point's rate."""
    rate, price = point["figures"].get("output_tokens_s"), document.get("price")
    return price["usd_per_hour"] / 3600 / rate["median"] * 1e6 if price and rate and rate["median"] else None


def started(target: dict[str, Any]) -> str:
    """Seconds of each start."""
    return ", ".join(f"{s:.1f}" for s in target["start_s"])


def about(document: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    m = document["machine"]
    machine = m.get("gpu") or f"{', '.join(m['cpu'])}, {m['allowed_cores']} cores"
    price = document.get("price")
    limit = document.get("limit")
    return [
        f"Measured on {document['date']} on {machine}, commit {document['commit']}: `{document['command']}`.",
        f"{document['rounds']} rounds, engines in turn; medians with 95 % bootstrap intervals"
        + (f"; workloads scaled by {document['scale']:g}." if document["scale"] != 1 else "."),
        f"A machine's hour at ${price['usd_per_hour']:g} ({price['by']})."
        if price
        else "No price was given (--price), so there is no cost.",
        f"Limit: {limit['weights_bytes'] / 1e6:,.0f} MB of weights ({limit['model']}) read at "
        f"{limit['read_gb_s']:g} GB/s, {limit['by']}, plus keys and values; the same for every engine."
        if limit
        else "No physical limit is known for this model and machine.",
    ]


def markdown(document: dict[str, Any]) -> str:
    lines = ["# septet bench", ""]
    if document["partial"]:
        lines += ["**PARTIAL: not all that was asked for could be measured.**", ""]
    lines += [f"{line}  " for line in about(document)]
    lines += ["", *(f"- {note}" for note in document["notes"])]
    lines += ["", "## Engines", "", "| engine | model | state | start, s |", "|---|---|---|---|"]
    for t in document["targets"]:
        model = t["model"] or t.get("served_model", "")
        lines.append(f"| {t['name']} | {model} | {t['status']} {t['why']} | {started(t)} |")
    for workload in dict.fromkeys(p["workload"] for p in document["points"]):
        points = [p for p in document["points"] if p["workload"] == workload]
        shown = [name for name in UNITS if any(name in p["figures"] for p in points)]
        lines += ["", f"## {points[0]['title']} ({workload})", ""]
        lines += ["| engine | point | " + " | ".join(UNITS[n] for n in shown) + " | $ per 1M out | of the limit |"]
        lines += ["|" + "---|" * (len(shown) + 4)]
        for p in points:
            usd, share = cost(document, p), p["share_of_limit"]
            cells = [p["target"], p["label"] + (" (partial)" if p["partial"] else "")]
            cells += [with_interval(p["figures"].get(name)) for name in shown]
            cells += [number(usd), f"{share:.0%}" if share else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
