"""A step model from measured steps: five constants of one machine, model and kernels, kept as JSON.

Called by `septet.bench.simulated`, which measures, and by `septet simulate --calibration`, which reads. A step takes
(a + b rows) bend(rows) + c prompt tokens + d context + e pairs (`Work`'s terms): least squares of the relative errors
with no constant below 0, and then what measured decode steps are off at so many rows, drawn through. Knows neither
engines nor clocks: what was measured, and how, is its caller's business.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from septet.advisor.estimate import Work

__all__ = ["Calibration", "bends", "fit", "load", "solve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A `StepModel`, with the limits of the engine that it was measured on. Seconds."""

    model: str
    machine: str
    step: float  # of any step: launches, host, the caller's share
    row: float  # more for each decoding row
    prompt_token: float
    context_token: float  # that a decoding row reads
    pair: float  # (prompt token, position it attends to)
    kv_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    overlap: bool = False  # step N + 1 is planned while N runs
    bends: tuple[tuple[float, float], ...] = ()  # (rows, factor of step + row), rows ascending: kernels work in tiles

    def step_s(self, work: Work) -> float:
        decode = self.step + self.row * work.rows
        if self.bends and work.rows:
            decode *= self._bend(work.rows)
        return decode + self.prompt_token * work.prefill + self.context_token * work.context + self.pair * work.pairs

    def _bend(self, rows: float) -> float:
        """Straight between the measured ones, level beyond them."""
        left = self.bends[0]
        for right in self.bends:
            if rows <= right[0]:
                share = (rows - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 0.0
                return left[1] + max(share, 0.0) * (right[1] - left[1])
            left = right
        return left[1]

    def refuse_other(self, model: str) -> None:
        """InvalidRequest for a model that this was not measured with."""
        if model != self.model:
            raise InvalidRequest(f"the calibration is of {self.model!r}, not of {model!r}", param="model")

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path) -> Calibration:
    """InvalidRequest names the file and the field that is missing or wrong."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path.name} is no calibration: {error}", param="calibration") from None
    known = {f.name: f.type for f in fields(Calibration) if f.name not in ("bends", "overlap")}
    bent, overlap = (given.pop("bends", []), given.pop("overlap", False)) if isinstance(given, dict) else ([], False)
    if not isinstance(given, dict) or set(given) != set(known):
        wrong = sorted(set(known) ^ set(given)) if isinstance(given, dict) else ["no JSON object"]
        raise InvalidRequest(
            f"{path.name} is no calibration, missing or unknown: {', '.join(wrong)[:200]}", param="calibration"
        )
    for name, kind in known.items():
        value, least = given[name], 1 if kind == "int" else 0
        if kind == "str":
            good = isinstance(value, str)
        else:
            good = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
            good = good and math.isfinite(value) and value >= least
        if not good:
            raise InvalidRequest(f"{path.name}: {name} can't be {json.dumps(value)[:40]}", param="calibration")
    if not _good_bends(bent):
        raise InvalidRequest(
            f"{path.name}: bends are pairs of numbers above 0, the first ones ascending, not {json.dumps(bent)[:60]}",
            param="calibration",
        )
    if not isinstance(overlap, bool):
        raise InvalidRequest(
            f"{path.name}: overlap is true or false, not {json.dumps(overlap)[:40]}", param="calibration"
        )
    found = Calibration(**given, overlap=overlap, bends=tuple((float(n), float(factor)) for n, factor in bent))
    if found.step + found.row <= 0:
        raise InvalidRequest(f"{path.name}: a decode step takes no time", param="calibration")
    return found


def _good_bends(given: object) -> bool:
    pairs = given if isinstance(given, list) and len(given) <= 100 else [None]
    good = all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e9 for x in pair)
        for pair in pairs
    )
    return good and all(a[0] < b[0] for a, b in itertools.pairwise(pairs))


def bends(made: Calibration, samples: Sequence[tuple[Work, float]]) -> Calibration:
    """What the fit leaves of decode steps at each number of rows: of the shortest context of each, and where there is a
    longer one, a token of context costs what lies between them."""
    by_rows: dict[float, list[tuple[float, float]]] = {}
    for work, seconds in samples:
        if work.rows and not work.prefill:
            by_rows.setdefault(work.rows, []).append((work.context, seconds))
    spans = [(max(runs)[0] - min(runs)[0], max(runs)[1] - min(runs)[1]) for runs in by_rows.values() if len(runs) > 1]
    if spans:
        slope = sum(more * s for more, s in spans) / sum(more * more for more, _ in spans)
        made = replace(made, context_token=max(0.0, slope))
    found = []
    for rows, runs in sorted(by_rows.items()):
        context, seconds = min(runs)
        straight, rest = made.step + made.row * rows, seconds - made.context_token * context
        if straight > 0 and rest > 0:
            found.append((rows, rest / straight))
    return replace(made, bends=tuple(found))


def fit(samples: Sequence[tuple[Work, float]]) -> list[float]:
    """(work, measured seconds) -> the five constants in the order of `Calibration`, none below 0.

    Every set of constants that may differ from 0 is tried: there are 32, and so the answer is exact.
    """
    if not samples or any(not (math.isfinite(s) and s > 0) for _, s in samples):
        raise InvalidRequest("a calibration needs steps that took more than 0 s", param="samples")
    rows = [[x / s for x in (1.0, w.rows, w.prefill, w.context, w.pairs)] for w, s in samples]
    best: tuple[float, list[float]] | None = None
    for size in range(1, 6):
        for used in itertools.combinations(range(5), size):
            some = _least_squares([[row[i] for i in used] for row in rows])
            if some is None or min(some) < 0:
                continue
            found = [0.0] * 5
            for i, value in zip(used, some, strict=True):
                found[i] = value
            off = sum((sum(x * c for x, c in zip(row, found, strict=True)) - 1) ** 2 for row in rows)
            if best is None or off < best[0] - 1e-15:
                best = off, found
    if best is None:
        raise InvalidRequest("no constants from 0 on explain these steps", param="samples")
    return best[1]


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """Of rows @ x = 1, columns scaled to length 1 first."""
    n = len(rows[0])
    scale = [math.sqrt(sum(row[i] ** 2 for row in rows)) for i in range(n)]
    if min(scale) == 0:
        return None
    scaled = [[x / s for x, s in zip(row, scale, strict=True)] for row in rows]
    normal = [[sum(row[i] * row[j] for row in scaled) for j in range(n)] for i in range(n)]
    found = solve(normal, [sum(row[i] for row in scaled) for i in range(n)])
    return None if found is None else [x / s for x, s in zip(found, scale, strict=True)]


def solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gauss with partial pivoting; None of a singular matrix."""
    n = len(right)
    work = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(work[i][k]))
        if abs(work[pivot][k]) < 1e-10:
            return None
        work[k], work[pivot] = work[pivot], work[k]
        for i in range(k + 1, n):
            factor = work[i][k] / work[k][k]
            work[i] = [a - factor * b for a, b in zip(work[i], work[k], strict=True)]
    found = [0.0] * n
    for k in reversed(range(n)):
        found[k] = (work[k][n] - sum(work[k][i] * found[i] for i in range(k + 1, n))) / work[k][k]
    return found
