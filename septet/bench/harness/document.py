"""What results.json holds, and reading it: a file that is damaged or of another release is one clear line.

Used by the commands that compare and draw. `results.py` writes it. Only what is read is listed; more may be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FORMAT", "read"]

FORMAT = "septet-bench/2"
MAX_FILE = 256 << 20


class _Figure(msgspec.Struct):
    median: float
    low: float | None
    high: float | None
    n: int
    runs: int


class _Client(msgspec.Struct):
    busy: float
    lag_ms: float
    late_ms: float
    bound: bool


class _Point(msgspec.Struct):
    target: str
    workload: str
    title: str
    label: str
    kind: str
    x: float
    limit_tokens_s: float | None
    share_of_limit: float | None
    partial: bool
    figures: dict[str, _Figure]
    client: _Client
    runs: list[dict[str, Any]]


class _Target(msgspec.Struct):
    name: str
    title: str
    model: str
    status: str
    why: str
    start_s: list[float]
    served_model: str
    version: str
    command: list[str]


class _Price(msgspec.Struct):
    usd_per_hour: float
    by: str


class _Limit(msgspec.Struct):
    model: str
    read_gb_s: float
    by: str
    weights_bytes: float


class _Document(msgspec.Struct):
    command: str
    commit: str
    date: str
    machine: dict[str, Any]
    seed: int
    rounds: int
    scale: float
    price: _Price | None
    limits: dict[str, _Limit]
    partial: bool
    notes: list[str]
    workloads: dict[str, dict[str, Any]]
    targets: list[_Target]
    points: list[_Point]


def read(path: Path) -> dict[str, Any]:
    """InvalidRequest: no such document. Reads no more than 256 MiB."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise InvalidRequest(f"{path} has more than {MAX_FILE >> 20} MiB: no results of septet bench")
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"{path} can't be read as JSON: {error}") from None
    form = found.get("format") if isinstance(found, dict) else None
    if form != FORMAT:
        raise InvalidRequest(f"{path} holds no results of septet bench of this release: format {form!r}, not {FORMAT}")
    try:
        msgspec.convert(found, _Document)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{path} is damaged: {error}") from None
    return found  # type: ignore[no-any-return]
