"""Perplexity of a text through the engine, and through llama.cpp on the same file and the same token ids.

    python -m septet.bench.perplexity MODEL TEXT [--kernels native] [--window 512]
        [--peer-python PEER/bin/python] [--json PATH]

The text is cut into windows, each begins with the model's bos token if it has one, and every token after the first one
or two counts: exp of the mean negative log-probability. Called by hand, by the tests, and by the script that records
llama.cpp's values (tests/data/record_perplexity.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.bench.host import head, run_job, write_results
from septet.request import SamplingParams
from septet.session.events import PromptLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.session.session import Session

__all__ = ["WINDOW", "cut", "of_engine", "of_llama_cpp"]

WINDOW = 512  # tokens, bos included
PEER = Path(__file__).with_name("perplexity_llama_cpp.py")


def cut(tokenizer: Any, text: str, window: int = WINDOW) -> list[list[int]]:
    """Windows of a text's tokens, each with bos in front where the model has one; the last may be shorter."""
    start = [tokenizer.bos_token_id] if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else []
    ids = tokenizer.encode(text, add_special_tokens=False)
    step = window - len(start)
    return [start + ids[i : i + step] for i in range(0, len(ids), step) if len(ids) - i > 1]


def of_engine(
    model: str, text: str, window: int = WINDOW, n_windows: int | None = None, **options: Any
) -> tuple[float, list[list[int]]]:
    """(perplexity, the windows), of the first `n_windows` alone where that is given. `options`: of the engine."""
    return asyncio.run(_of_engine(model, text, window, n_windows, options))


async def _of_engine(
    model: str, text: str, window: int, n_windows: int | None, options: dict[str, Any]
) -> tuple[float, list[list[int]]]:
    from septet.session.start import start_session

    session = await start_session(model, **{"max_model_len": 2 * window, "max_num_seqs": 4, **options})
    try:
        windows = cut(session.tokenizer, text, window)[:n_windows]
        found = [await _log_probabilities(session, ids) for ids in windows]
    finally:
        await session.close()
    return perplexity(found), windows


async def _log_probabilities(session: Session, ids: list[int]) -> list[float]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    values: list[float] = []
    async with aclosing(session.generate(ids, params)) as events:
        async for event in events:
            if isinstance(event, PromptLogprobs):
                values = [place.chosen.logprob for place in event.positions if place is not None]
    if len(values) != len(ids) - 1:
        raise RuntimeError(f"{len(values)} log-probabilities for {len(ids)} tokens")
    return values


def perplexity(values: Sequence[Sequence[float]]) -> float:
    every = [value for window in values for value in window]
    return math.exp(-math.fsum(every) / len(every))


def of_llama_cpp(peer_python: str, model: str, windows: list[list[int]]) -> float:
    """llama.cpp's perplexity on the same windows, in its own environment."""
    command = [peer_python, str(PEER), model]
    done = run_job(command, 900, input=json.dumps(windows), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
    return perplexity(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of the catalogue or a path")
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--kernels", default="native")
    parser.add_argument("--peer-python", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    from septet.hub.pull import resolve

    path = str(resolve(args.model).path)
    ours, windows = of_engine(path, args.text.read_text(encoding="utf-8"), args.window, kernels=args.kernels)
    print(f"septet ({args.kernels}): {ours:.4f} over {sum(map(len, windows))} tokens in {len(windows)} windows")
    found = {"kernels": args.kernels, "tokens": sum(map(len, windows)), "windows": len(windows), "septet": ours}
    if args.peer_python:
        theirs = of_llama_cpp(args.peer_python, path, windows)
        print(f"llama.cpp: {theirs:.4f}, Septet differs by {ours / theirs - 1:+.3%}")
        found["llama_cpp"] = theirs
    if args.json:
        write_results(args.json, head("perplexity"), **found)


if __name__ == "__main__":
    main()
