"""The report as one HTML page that needs nothing else: charts, every figure, what is published beside it.

Writes report.html and report.md beside results.json; called by the command. Charts are drawn by `charts.py`.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from septet.bench.harness.charts import Bar, Dot, bars, legend, lines
from septet.bench.harness.figures import UNITS
from septet.bench.harness.markdown import about, cost, engines, markdown, number, table, with_interval
from septet.bench.harness.published import amount, reference

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["html", "write_reports"]


def write_reports(document: dict[str, Any], out: Path) -> None:
    (out / "report.md").write_text(markdown(document))
    (out / "report.html").write_text(html(document))


def html(document: dict[str, Any]) -> str:
    names = [t["name"] for t in document["targets"] if any(p["target"] == t["name"] for p in document["points"])]
    style = files("septet.bench.harness").joinpath("report.css").read_text()
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>septet bench</title>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{style}</style></head><body><main><h1>septet bench</h1>",
        '<p class="warn">PARTIAL: not all that was asked for could be measured.</p>' if document["partial"] else "",
        "".join(f"<p>{escape(line)}</p>" for line in about(document)),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in document["notes"]) + "</ul>",
        _engines(document),
        legend(names),
        *_charts(document, names),
        *_tables(document),
        _published(),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _charts(document: dict[str, Any], names: list[str]) -> list[str]:
    order = list(dict.fromkeys((p["workload"], p["label"]) for p in document["points"]))
    points = sorted(document["points"], key=lambda p: order.index((p["workload"], p["label"])))
    found = []

    def card(title: str, note: str, drawn: str) -> None:
        found.append(f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{drawn}</section>")

    swept = [p for p in points if p["kind"] == "closed" and {"tpot_ms", "output_tokens_s"} <= set(p["figures"])]
    if swept:
        sizes = {
            w: len({p["x"] for p in swept if p["workload"] == w}) for w in dict.fromkeys(p["workload"] for p in swept)
        }
        widest = max(sizes, key=lambda w: sizes[w])
        sweep = [p for p in swept if p["workload"] == widest]
        series = {n: [_dot(p, "tpot_ms") for p in sweep if p["target"] == n] for n in names}
        told = f"{sweep[0]['title']}: a dot is a number of streams; up and to the left is better."
        card("Throughput against latency", told,
             lines(series, "throughput against latency", UNITS["tpot_ms"], UNITS["output_tokens_s"]))  # fmt: skip
    for workload in dict.fromkeys(p["workload"] for p in swept):
        mine = [p for p in swept if p["workload"] == workload]
        if len({p["x"] for p in mine}) > 1:
            series = {n: [_dot(p) for p in mine if p["target"] == n] for n in names}
            card(f"By batch size: {mine[0]['title']}", "Output tokens a second of all streams.",
                 lines(series, "per batch size", "requests at once", UNITS["output_tokens_s"], log_x=True))  # fmt: skip
    for figure, title, note in (
        ("output_tokens_s", "Output tokens a second, by workload", "More is better."),
        ("ttft_ms", "Time to first token, by workload", "Less is better; ms."),
        ("goodput_s", "Goodput", "Requests a second answered within the workload's TTFT and TPOT."),
        ("memory_mib", "Memory", "Peak MiB of the engine's processes since they started; what they share counts once."),
        ("gpu_memory_mib", "GPU memory", "Peak MiB above what was in use before the engine."),
        ("joules_per_token", "Energy", "Joules of the GPUs per output token."),
    ):
        rows = [_bar(p, names, figure) for p in points if figure in p["figures"]]
        if rows:
            card(title, note, bars(rows, title))
    costs = [(p, usd) for p in points if (usd := cost(document, p)) is not None]
    if costs:
        rows = [Bar(_where(p), names.index(p["target"]), p["target"], usd, f"${number(usd)}") for p, usd in costs]
        card("Cost of a million output tokens", "At each workload's own rate.", bars(rows, "cost per million tokens"))
    shares = [p for p in points if p["share_of_limit"]]
    if shares:
        rows = [
            Bar(_where(p), names.index(p["target"]), p["target"], p["share_of_limit"], f"{p['share_of_limit']:.0%}")
            for p in shares
        ]
        card("Share of the physical limit", "Of the tokens a second that the machine allows (see above).",
             bars(rows, "share of the physical limit"))  # fmt: skip
    return found


def _where(point: dict[str, Any]) -> str:
    return f"{point['workload']}, {point['label']}"


def _bar(point: dict[str, Any], names: list[str], figure: str) -> Bar:
    f, name = point["figures"][figure], point["target"]
    return Bar(_where(point), names.index(name), name, f["median"], with_interval(f), f["low"], f["high"])


def _dot(point: dict[str, Any], x: str | None = None) -> Dot:
    y = point["figures"]["output_tokens_s"]
    at = point["figures"][x]["median"] if x else point["x"]
    return Dot(at, y["median"], f"{_where(point)}: {with_interval(y)} tokens/s", y["low"], y["high"])


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _engines(document: dict[str, Any]) -> str:
    return "<h2>Engines</h2>" + _table(*engines(document))


def _tables(document: dict[str, Any]) -> list[str]:
    titles = {p["workload"]: p["title"] for p in document["points"]}
    return [
        f"<h2>{escape(title)} ({escape(workload)})</h2>" + _table(*table(document, workload))
        for workload, title in titles.items()
    ]


def _published() -> str:
    """A series of its own, never in the charts above: other machines, other versions, not measured here."""
    known = reference()
    rows = [
        [e["engine"], e["model"], e["hardware"], e["workload"], amount(e), e["source"], " ".join(e["flags"])]
        for e in known["entries"]
    ]  # fmt: skip
    head = ["engine", "model", "hardware", "workload", "published", "source", "doubts"]
    return (
        f"<details><summary>Published figures ({escape(known['date'])}), for reference: not measured here</summary>"
        f"<p>{escape(known['about'])} Its sources: {escape(known['sources'])}.</p>{_table(head, rows)}</details>"
    )
