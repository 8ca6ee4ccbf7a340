"""Runs to figures: medians with bootstrap intervals. Used by `results.py`; knows nothing but numbers.

An interval is resampled in two stages, as the data come: runs, then requests within each; each run counts alike.
"""

from __future__ import annotations

from typing import Any

__all__ = ["BETTER", "UNITS", "figure", "figures"]

BETTER = {  # which way is better; a figure not named here is not compared
    "output_tokens_s": 1, "total_tokens_s": 1, "requests_s": 1, "goodput_s": 1, "valid_share": 1,
    "ttft_ms": -1, "ttft_p95_ms": -1, "tpot_ms": -1, "tpot_p95_ms": -1, "e2e_ms": -1,
    "memory_mib": -1, "gpu_memory_mib": -1, "joules_per_token": -1, "failed_share": -1,
}  # fmt: skip
UNITS = {
    "output_tokens_s": "tokens/s", "total_tokens_s": "tokens/s in and out", "requests_s": "requests/s",
    "goodput_s": "requests/s within targets", "valid_share": "of ended answers valid", "ttft_ms": "ms to first token",
    "ttft_p95_ms": "ms to first token, p95", "tpot_ms": "ms per token", "tpot_p95_ms": "ms per token, p95",
    "e2e_ms": "ms per answer", "memory_mib": "MiB of the process tree, peak", "gpu_memory_mib": "MiB of GPUs, peak",
    "joules_per_token": "J per output token", "failed_share": "of requests failed",
    "prompt_tokens": "tokens in, median", "answer_tokens": "tokens out, median",
}  # fmt: skip
RESAMPLES, MOST_DRAWN, LEVEL = 1000, 10_000_000, 0.95


def figures(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """All figures of one point that its runs allow: {"median", "low", "high", "n"} each; low and high None where one
    value can't tell."""
    found: dict[str, dict[str, float | None]] = {}
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        groups = [run[name] for run in runs if run[name]]
        if groups:
            found[name] = figure(groups, 50)
            if name != "e2e_ms" and sum(map(len, groups)) >= 20:
                found[f"{name[:4]}_p95_ms"] = figure(groups, 95)
    for name in ("output_tokens_s", "total_tokens_s", "requests_s", "goodput_s", "joules_per_token", "memory_mib",
                 "gpu_memory_mib", "valid_share", "prompt_tokens", "answer_tokens"):  # fmt: skip
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            found[name] = figure([[value] for value in values], 50)
    asked = sum(run["requests"] for run in runs)
    if failed := sum(run["failed"] for run in runs):
        found["failed_share"] = {"median": failed / asked, "low": None, "high": None, "n": asked}
    return found


def figure(groups: list[list[float]], percent: float) -> dict[str, float | None]:
    import numpy as np

    rows = [np.asarray(group, dtype=float) for group in groups]
    every = np.concatenate(rows)
    result: dict[str, float | None] = {
        "median": float(np.percentile(every, percent)), "low": None, "high": None, "n": len(every)
    }  # fmt: skip
    if len(every) < 2:
        return result
    rng, most = np.random.default_rng(0), max(map(len, rows))
    table = np.stack([np.resize(row, most) for row in rows])  # beyond a row's own length: never drawn
    lengths = np.asarray([len(row) for row in rows])
    times = int(min(RESAMPLES, max(100, MOST_DRAWN // table.size)))
    picked = rng.integers(0, len(rows), (times, len(rows)))
    within = (rng.random((times, len(rows), most)) * lengths[picked][..., None]).astype(int)
    drawn = np.percentile(table[picked[..., None], within].reshape(times, -1), percent, axis=1)
    edge = (1 - LEVEL) / 2 * 100
    result["low"], result["high"] = (float(v) for v in np.percentile(drawn, (edge, 100 - edge)))
    return result
