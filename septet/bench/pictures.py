"""The README's pictures, drawn from results that the repository holds: Septet's ratio to a peer on each workload.

    python -m septet.bench.pictures [--results benchmarks/results] [--out docs/figures]

A bar is a ratio: beyond the line at 1 Septet is the faster one. A test holds the files in docs/figures to what this
writes, so that a picture can't be older than its figures. Knows JSON of `gpu_workloads` and `cpu_table` only.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Row", "cpu_rows", "draw", "gpu_rows", "main"]

GPU_WORKLOADS = {
    "w1_ttft128_ms": "first token, prompt of 128",
    "w1_tpot_ms": "one stream",
    "w2_b32_tok_s": "32 streams",
    "w2_b64_tok_s": "64 streams",
    "w2_b128_tok_s": "128 streams",
    "w2_b256_tok_s": "256 streams",
    "w3_out_tok_s": "mixed lengths",
    "w4_shared4k_x10_ms": "shared prefix of 4,096",
    "w5_agents_out_tok_s": "agents, 5 turns",
    "w7_prefill_tok_s": "prefill, 8 x 4,096",
    "start_to_first_token_s": "start to first token",
}
CPU_WORKLOADS = {"tg128": "one stream", "pp512": "prefill of 512", "b8": "8 streams", "b32": "32 streams",
                 "cold_s": "start to first token"}  # fmt: skip
SMALLER_IS_BETTER = ("_ms", "_s")
LARGER_IS_BETTER = ("_tok_s",)
WIDTH, LABEL, VALUE, ROW, GAP, TOP = 760, 190, 50, 15, 9, 62
MOST = 4.0  # longer bars are cut, and their value says so
STYLE = """
text{font:12px system-ui,sans-serif;fill:#24292f}.t{font-weight:600;font-size:14px}.n{fill:#57606a}
.a{fill:#2f6fde}.b{fill:#8a63d2}.line{stroke:#57606a;stroke-dasharray:3 3}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.n{fill:#9198a1}.a{fill:#5b9bff}.b{fill:#b394f0}.line{stroke:#9198a1}}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """ratios: one for each series, None where a side has no figure; above 1 Septet is faster."""

    name: str
    ratios: tuple[float | None, ...]


def _ratio(key: str, ours: list[float], theirs: list[float]) -> float | None:
    if not ours or not theirs:
        return None
    times = median(ours) / median(theirs)
    smaller = key.endswith(SMALLER_IS_BETTER) and not key.endswith(LARGER_IS_BETTER)
    return 1 / times if smaller else times


def gpu_rows(results: Path) -> list[Row]:
    """Both sides of one run of `gpu_table`."""
    sides = [
        tuple(json.loads((results / "h100" / "one-run" / f"{side}-{shape}.json").read_text())["figures"]
              for side in ("septet", "vllm"))
        for shape in ("1b", "8b")
    ]  # fmt: skip
    rows = []
    for key, name in GPU_WORKLOADS.items():
        ratios = [_ratio(key, [ours[key]], [theirs[key]]) for ours, theirs in sides]
        rows.append(Row(name, tuple(ratios)))
    return rows


def cpu_rows(results: Path, files: list[str]) -> list[Row]:
    """Septet against llama.cpp on each of `files` ("model quantisation"): medians over the table's rounds."""
    found: dict[str, Any] = {}
    for table in ("table-zen3.json", "table-q4_0-zen3.json"):  # the later has the later figures of its files
        found |= json.loads((results / "cpu" / table).read_text())["files"]
    sides: dict[str, dict[str, Any]] = {file: found[file]["sides"] for file in files}
    rows = []
    for key, name in CPU_WORKLOADS.items():
        pairs = [sides[file] for file in files]
        ratios = (_ratio(key, p.get("septet", {}).get(key, []), p.get("llama_cpp", {}).get(key, [])) for p in pairs)
        rows.append(Row(name, tuple(ratios)))
    return rows


def draw(title: str, note: str, series: tuple[str, ...], rows: list[Row]) -> str:
    """A stand-alone SVG in light and dark, without scripts."""
    unit = (WIDTH - LABEL - VALUE) / MOST
    parts, y = [], TOP
    for row in rows:
        parts.append(_text(LABEL - 8, y + ROW * len(row.ratios) / 2 + 4, row.name, "end"))
        for i, ratio in enumerate(row.ratios):
            if ratio is not None:
                width = min(ratio, MOST) * unit
                said = f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"
                parts.append(
                    f'<rect class="{"ab"[i]}" x="{LABEL}" y="{y + 1}" width="{width:.1f}" height="{ROW - 3}" rx="2"/>'
                )
                parts.append(_text(LABEL + (width if ratio > 1 else unit) + 5, y + 11, said, "start", "n"))
            y += ROW
        y += GAP
    line = f'<path class="line" d="M{LABEL + unit:.1f} {TOP - 6}V{y}"/>'
    keys = "".join(
        f'<rect class="{"ab"[i]}" x="{LABEL + 130 * i}" y="34" width="11" height="11" rx="2"/>'
        + _text(LABEL + 16 + 130 * i, 44, name, "start")
        for i, name in enumerate(series)
    )
    box = f'viewBox="0 0 {WIDTH} {y + 26}" role="img" aria-label="{escape(title)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    foot = _text(LABEL, y + 16, note, "start", "n")
    body = "".join((f"<style>{STYLE}</style>", _text(LABEL, 20, title, "start", "t"), keys, line, *parts, foot))
    return f"{head}{body}</svg>\n"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def pictures(results: Path) -> dict[str, str]:
    """File name -> SVG."""
    return {
        "h100.svg": draw(
            "One H100, bf16: times as fast as vLLM 0.24",
            "Dashed: as fast. Both sides in one run, on random weights.",
            ("1B shape", "8B shape"),
            gpu_rows(results),
        ),
        "cpu.svg": draw(
            "Two CPU cores (Zen 3): times as fast as llama.cpp 0.3.36",
            "Dashed: as fast. Both sides in one run, alternating.",
            ("SmolLM2 135M Q4_0", "Gemma 3 270M Q4_K_M"),
            cpu_rows(results, ["smollm2 Q4_0", "gemma3:270m Q4_K_M"]),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures(arguments.results).items():
        (arguments.out / name).write_text(svg)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
