"""The requests of a workload: the same texts and lengths for every engine, from a seed; other ones in every round.

Used by `drive.py`. A prompt is made of common English words, one token each in most vocabularies; what an engine
counts itself stands in the report.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.advisor.arrivals import Arrival, Lengths, poisson, read_trace

if TYPE_CHECKING:
    from septet.bench.harness.workload import Point, Workload

__all__ = ["Ask", "asks", "warm_up", "words"]

WORDS = """
river sea mountain road house garden window table paper music winter summer morning evening market city village
bridge train ship captain doctor teacher child mother father friend letter story question answer reason idea plan
number color water fire stone tree flower bird horse dog field forest island storm cloud rain snow light shadow
voice song dance game school church library office kitchen door wall floor street corner station hotel money gold
silver iron glass wood bread fruit apple tea coffee sugar salt knife machine engine wheel wire phone camera film
book page word line point world earth moon star sun sky wind heat power speed force weight price value trade law
""".split()  # noqa: SIM905
BURST, WARM_TOKENS = 4.0, 4
_TASK = "Describe a person as JSON with name, age, city and tags. Notes:"


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's conversation: `turns` messages of the user, each sent with all that was said before."""

    at: float  # seconds from the start; 0 for clients that wait for each other
    turns: tuple[str, ...]
    output: int  # tokens of each answer
    fields: dict[str, Any] = field(default_factory=dict)  # of the body


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=max(1, n)))


def asks(work: Workload, point: Point, seed: int, round_number: int) -> list[Ask]:
    """In the order in which they are to be sent."""
    rng = random.Random(f"{seed}/{work.name}/{point.label}/{round_number}")
    arrivals = _arrivals(work, point, rng)
    shared: dict[int, str] = {}
    for a in arrivals:
        if a.prefix and a.prefix_id not in shared:
            shared[a.prefix_id] = words(rng, a.prefix)
    fields, found = _fields(work), []
    for a in arrivals:
        turns = tuple(_question(rng, a.prompt - a.prefix, work) for _ in range(work.turns))
        if a.prefix:  # in the user's words: not every template knows a system's
            turns = (f"{shared[a.prefix_id]}\n{turns[0]}", *turns[1:])
        found.append(Ask(a.at, turns, a.output, fields))
    return found


def warm_up(work: Workload, point: Point) -> list[Ask]:
    """Small requests of the same form and number, which are not measured: what an engine makes ready once (a grammar,
    a batch size) is then ready."""
    return [Ask(0.0, (f"{_TASK} {i}" if work.schema else f"Hello {i}",), WARM_TOKENS, _fields(work))
            for i in range(point.streams)]  # fmt: skip


def _fields(work: Workload) -> dict[str, Any]:
    if work.schema is None:
        return {}
    form = {"name": "record", "schema": work.schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def _replayed(trace: list[Arrival], share: float) -> list[Arrival]:
    if share == 1:
        return trace

    def less(n: int) -> int:
        return max(1, round(n * share)) if n else 0

    shorter = (Arrival(a.at, less(a.prompt), less(a.output), a.prefix_id, less(a.prefix)) for a in trace)
    return list(shorter)[: less(len(trace))]


def _question(rng: random.Random, n: int, work: Workload) -> str:
    said = words(rng, n)
    return f"{_TASK} {said}" if work.schema else said


def _arrivals(work: Workload, point: Point, rng: random.Random) -> list[Arrival]:
    if work.kind == "trace":
        assert work.trace is not None
        return _replayed(read_trace(work.trace, scale=work.stretch), work.share)
    lengths = Lengths(
        prompt=work.prompt, output=work.output, prefix=work.prefix, groups=work.groups, spread=work.spread
    )
    if work.kind != "open":
        return [lengths.draw(rng, 0.0) for _ in range(max(work.requests, point.streams))]
    burst = BURST if work.shape == "bursts" else 1.0
    drawn = list(poisson(work.requests, point.rate, lengths, rng.randrange(1 << 30), burst))
    if work.shape != "ramp":
        return drawn
    # A rate that grows evenly from 0: the time of the n-th request is as the square root of n.
    whole = drawn[-1].at or 1.0
    return [Arrival((a.at * whole) ** 0.5, a.prompt, a.output, a.prefix_id, a.prefix) for a in drawn]
