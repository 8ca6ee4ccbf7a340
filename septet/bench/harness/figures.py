"""Runs to figures: medians with intervals. Used by `results.py`; knows nothing but numbers.

Each run counts alike, however many requests it has. Below BOOTSTRAP_FROM runs an interval is the lowest to the highest
of the runs' own values, since resampling so few covers far less than it promises; from there on it is a 95 % bootstrap
in two stages, as the data come: runs, then requests within each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

__all__ = ["BETTER", "BOOTSTRAP_FROM", "UNITS", "Figure", "figure", "figures"]

Figure = dict[str, float | None]  # "median", "low", "high", "n" (values), "runs"; low and high None: one run can't tell

BETTER = {  # which way is better; a figure not named here is not compared
    "output_tokens_s": 1, "total_tokens_s": 1, "requests_s": 1, "goodput_s": 1, "valid_share": 1,
    "ttft_ms": -1, "ttft_p95_ms": -1, "tpot_ms": -1, "tpot_p95_ms": -1, "e2e_ms": -1,
    "memory_mib": -1, "gpu_memory_mib": -1, "joules_per_token": -1, "failed_share": -1,
}  # fmt: skip
UNITS = {
    "output_tokens_s": "tokens/s", "total_tokens_s": "tokens/s in and out", "requests_s": "requests/s",
    "goodput_s": "requests/s within targets", "valid_share": "of ended answers valid", "ttft_ms": "ms to first token",
    "ttft_p95_ms": "ms to first token, p95", "tpot_ms": "ms per token", "tpot_p95_ms": "ms per token, p95",
    "e2e_ms": "ms per answer", "memory_mib": "MiB of the process tree, peak",
    "gpu_memory_mib": "MiB of GPUs, peak",
    "joules_per_token": "J per output token", "failed_share": "of requests failed",
    "prompt_tokens": "tokens in, median", "answer_tokens": "tokens out, median",
}  # fmt: skip
PEAKS = ("memory_mib", "gpu_memory_mib")  # of a process that stays up: the highest counts, not the median
RESAMPLES, MOST_DRAWN, LEVEL, BOOTSTRAP_FROM = 1000, 10_000_000, 0.95, 6


def figures(runs: list[dict[str, Any]]) -> dict[str, Figure]:
    """All figures of one point that its runs allow."""
    found: dict[str, Figure] = {}
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        groups = [run[name] for run in runs if run[name]]
        if groups:
            found[name] = figure(groups, 50)
            if name != "e2e_ms" and sum(map(len, groups)) >= 20:
                found[f"{name[:4]}_p95_ms"] = figure(groups, 95)
    for name in ("output_tokens_s", "total_tokens_s", "requests_s", "goodput_s", "joules_per_token", *PEAKS,
                 "valid_share", "prompt_tokens", "answer_tokens"):  # fmt: skip
        values = [run[name] for run in runs if run.get(name) is not None]
        if values:
            found[name] = figure([[value] for value in values], 100 if name in PEAKS else 50)
    asked = sum(run["requests"] for run in runs)
    if any(run["failed"] for run in runs):
        shares = figure([[run["failed"] / run["requests"]] for run in runs], 50)
        found["failed_share"] = {**shares, "median": sum(run["failed"] for run in runs) / asked, "n": asked}
    return found


def figure(groups: list[list[float]], percent: float) -> Figure:
    import numpy as np

    rows = [np.asarray(group, dtype=float) for group in groups]
    told = _percentile(rows, percent)
    result: Figure = {"median": told, "low": None, "high": None, "n": sum(map(len, rows)), "runs": len(rows)}
    if len(rows) >= BOOTSTRAP_FROM and percent < 100:
        result["low"], result["high"] = _bootstrap(rows, percent)
    elif len(rows) > 1:
        own = [told, *(float(np.percentile(row, percent)) for row in rows)]
        result["low"], result["high"] = min(own), max(own)
    return result


def _percentile(rows: list[ndarray], percent: float) -> float:
    """Of all values, those of a run with the weight of one run together."""
    import numpy as np

    every = np.concatenate(rows)
    if len({len(row) for row in rows}) == 1:
        return float(np.percentile(every, percent))
    order = np.argsort(every)
    weights = np.concatenate([np.full(len(row), 1 / len(row)) for row in rows])[order]
    at = (np.cumsum(weights) - weights / 2) / len(rows) * 100
    return float(np.interp(percent, at, every[order]))


def _bootstrap(rows: list[ndarray], percent: float) -> tuple[float, float]:
    import numpy as np

    rng, most = np.random.default_rng(0), max(map(len, rows))
    table = np.stack([np.resize(row, most) for row in rows])  # beyond a row's own length: never drawn
    lengths = np.asarray([len(row) for row in rows])
    times = int(min(RESAMPLES, max(100, MOST_DRAWN // table.size)))
    picked = rng.integers(0, len(rows), (times, len(rows)))
    within = (rng.random((times, len(rows), most)) * lengths[picked][..., None]).astype(int)
    drawn = np.percentile(table[picked[..., None], within].reshape(times, -1), percent, axis=1)
    edge = (1 - LEVEL) / 2 * 100
    low, high = (float(v) for v in np.percentile(drawn, (edge, 100 - edge)))
    return low, high
