"""Constrained rate against free rate of the same engine, side by side.

    python -m septet.bench.structured [MODEL]                     streams of one model; --peer-python adds llama.cpp's
    python -m septet.bench.structured --shape 1b49k --tokenizer FILE     W6: random weights, prompts of 128 tokens

Rounds alternate between the sides and medians count, so that a busy machine hurts both alike. `endless`: an array of
records that never ends, so both sides make the same tokens; with --shape also `record`: one record, as W6 asks, whose
answers end by themselves, so that the last of them run in a small batch. FILE: SmolLM2's tokenizer.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.bench.host import Neighbours, head, write_results
from septet.bench.shapes import SHAPES, write_shape
from septet.request import SamplingParams
from septet.structured import Structured

if TYPE_CHECKING:
    from septet.session.llm import LLM
    from septet.session.session import Session

__all__ = ["main"]

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 30},
                "city": {"type": "string", "maxLength": 20},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": RECORD, "minItems": 10_000}  # longer than any answer here
PROMPT = "List people who work here as a JSON array of records, as many as you can."
N_PROMPT = 128  # tokens of a prompt of W6


# -- streams of a real model ------------------------------------------------------------------------------------------
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


async def of_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    from septet.session.start import start_session

    options = {"kernels": args.kernels, "device": args.device, "max_num_seqs": max(args.streams)}
    session = await start_session(args.model, **options)
    bound = Structured.json_schema(ENDLESS)
    results = []
    try:
        for side in (None, bound):
            await rate(session, 1, 8, side)
        for streams in args.streams:
            rates: dict[Any, list[float]] = {None: [], bound: []}
            for number in range(args.rounds):
                for side, found in _turns(rates, number):
                    found.append(await rate(session, streams, args.tokens, side))
            results.append(_row(streams, "endless", rates[None], rates[bound]))
    finally:
        await session.close()
    return results


def peer(args: argparse.Namespace, streams: list[int]) -> list[dict[str, Any]]:
    """llama.cpp's rows, from its own environment and in its own process."""
    from septet.hub.pull import resolve

    script = Path(__file__).parent / "structured_llama_cpp.py"
    command = [args.peer_python, str(script), str(resolve(args.model).path), "--tokens", str(args.tokens)]
    command += ["--schema", json.dumps(RECORD), "--streams", ",".join(map(str, streams)), "--rounds", str(args.rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        _print(row)
    return rows


# -- W6: random weights -----------------------------------------------------------------------------------------------
def of_shape(args: argparse.Namespace) -> list[dict[str, Any]]:
    from septet import LLM

    results = []
    with tempfile.TemporaryDirectory() as root:
        directory = write_shape(args.shape, Path(root))
        (directory / "tokenizer.json").write_text(Path(args.tokenizer).read_text())
        llm = LLM(str(directory), load_format="dummy", dtype="bfloat16", device=args.device, kernels=args.kernels)
        schemas = {"endless": ENDLESS, "record": RECORD}
        bound = {name: Structured.json_schema(schema) for name, schema in schemas.items()}
        for side in (None, *bound.values()):
            _wave(llm, 2, 8, side)
        for streams in args.streams:
            for side in (None, *bound.values()):  # shapes of steps are captured as they are met
                _wave(llm, streams, args.tokens, side)
            rates: dict[str | None, list[float]] = {None: [], **{name: [] for name in bound}}
            for number in range(args.rounds):
                for name, found in _turns(rates, number):
                    found.append(_wave(llm, streams, args.tokens, bound[name] if name else None))
            results += [_row(streams, name, rates[None], rates[name]) for name in bound]
    return results


def _wave(llm: LLM, streams: int, tokens: int, structured: Structured | None) -> float:
    """Tokens per second of so many requests at once, prompts included."""
    rng = random.Random(0)
    vocab = 49152 - 10
    prompts: list[Any] = [
        {"prompt_token_ids": [rng.randrange(10, vocab) for _ in range(N_PROMPT)]} for _ in range(streams)
    ]
    params = SamplingParams(
        temperature=0.8, seed=1, max_tokens=tokens, ignore_eos=structured is None, structured=structured
    )
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - began)


# -- both -------------------------------------------------------------------------------------------------------------
def _turns(rates: dict[Any, list[float]], number: int) -> list[tuple[Any, list[float]]]:
    """The sides of one round: the first goes last in the next, so that no side has the same neighbour each time."""
    sides = list(rates.items())
    return sides if number % 2 == 0 else sides[::-1]


def _row(streams: int, schema: str, free: list[float], constrained: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": "septet", "streams": streams, "schema": schema}
    row |= {"free": statistics.median(free), "constrained": statistics.median(constrained)}
    row["ratio"] = row["constrained"] / row["free"]
    row["rounds"] = [[round(rate, 1) for rate in pair] for pair in zip(free, constrained, strict=True)]
    _print(row)
    return row


def _print(row: dict[str, Any]) -> None:
    rates = f"free {row['free']:9.1f}, constrained {row['constrained']:9.1f} tokens/s"
    print(f"{row['engine']:9} {row['streams']:4d} streams, {row['schema']:8} {rates}, {row['ratio']:.3f}", flush=True)


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="W6 with random weights of this shape")
    parser.add_argument("--tokenizer", help="with --shape: whose tokens, at most 49152 of them")
    parser.add_argument("--streams", type=_counts, help="numbers of streams, with commas (1,8,32; W6: 1,64)")
    parser.add_argument("--tokens", type=int, help="per stream (128; W6: 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer-python", help="the Python of llama-cpp-python's environment")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    if args.shape and not args.tokenizer:
        parser.error("--shape needs --tokenizer")
    args.streams = args.streams or ([1, 64] if args.shape else [1, 8, 32])
    args.tokens = args.tokens or (256 if args.shape else 128)
    about, others = head("structured"), Neighbours()
    results = of_shape(args) if args.shape else asyncio.run(of_model(args))
    if args.peer_python:
        results += peer(args, args.streams)
    if args.json:
        write_results(args.json, about, rows=results, others_cpu=round(others.share(), 3))


if __name__ == "__main__":
    main()
