"""Constrained rate against free rate of the same engine: `python -m septet.bench.structured [MODEL]`.

Both sides make the same number of tokens per stream (the schema never ends before `--tokens`), with prompts computed
beforehand by a warm-up. Prints tokens per second of both and their ratio at each number of streams; rounds alternate,
the best of each side counts, so that a busy machine hurts both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from septet.request import SamplingParams
from septet.structured import Structured

if TYPE_CHECKING:
    from septet.session.session import Session

__all__ = ["main"]

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["admin", "editor", "viewer"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "role", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 10_000}  # longer than any answer here
PROMPT = "List people who work here as a JSON array of records, as many as you can."


async def rate(session: Session, streams: int, tokens: int, structured: Structured | None) -> float:
    """Tokens per second of all streams together, first token to last."""
    first, last, made = float("inf"), 0.0, 0

    async def one(seed: int) -> None:
        nonlocal first, last, made
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, structured=structured)
        async for event in session.chat([{"role": "user", "content": PROMPT}], params):
            now = time.perf_counter()
            first, last = min(first, now), max(last, now)
            made += len(getattr(event, "token_ids", ()))

    await asyncio.gather(*(one(seed) for seed in range(streams)))
    if made < streams * tokens:
        raise RuntimeError(f"{made} tokens where {streams * tokens} were asked for: the rates can't be compared")
    return (made - streams) / (last - first)


def _line(row: dict[str, Any]) -> str:
    rates = f"free {row['free']:8.1f}, constrained {row['constrained']:8.1f} tokens/s"
    return f"{row['streams']:4d} streams: {rates}, ratio {row['ratio']:.3f}"


async def run(model: str, counts: list[int], tokens: int, rounds: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    from septet.session.start import start_session

    session = await start_session(model, **options)
    bound = Structured.json_schema(SCHEMA)
    results = []
    try:
        for side in (None, bound):
            await rate(session, 1, 8, side)
        for streams in counts:
            best = {None: 0.0, bound: 0.0}
            for _ in range(rounds):
                for side in best:
                    best[side] = max(best[side], await rate(session, streams, tokens, side))
            row: dict[str, Any] = {"streams": streams, "free": best[None], "constrained": best[bound]}
            row["ratio"] = row["constrained"] / row["free"]
            results.append(row)
            print(_line(row), flush=True)
    finally:
        await session.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams, with commas")
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="the figures as JSON in the last line")
    asked = parser.parse_args()
    counts = [int(part) for part in asked.streams.split(",")]
    options = {"kernels": asked.kernels, "device": asked.device, "max_num_seqs": max(counts)}
    results = asyncio.run(run(asked.model, counts, asked.tokens, asked.rounds, options))
    if asked.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
