"""The GPU workloads W1 to W5 and W7 on random weights, for Septet and for vLLM through the same calls.

    python -m septet.bench.gpu_workloads --target septet --shape 1b [--only w1,w2] [--json PATH]

W1 one request (128 in, 256 out), W2 batches of 32 to 256 (128 in, 256 out), W3 256 requests of mixed lengths, W4 ten
requests sharing a 4,096-token prefix, then ten that share nothing, W5 64 agents over five turns, W7 prefill of
8 x 4,096 tokens. Greedy, end of sequence ignored, token ids in and out. After a warm-up, medians of up to three runs,
fewer where one is long; one shape takes about a minute. Both targets receive the same prompts (one seed).
`--options '{"enable_prefix_caching": false}' --only w5` measures W5 without the cache. The JSON holds the machine, the
versions, the commit, the command and, for a card that is known, the limits of W1, W2 and W7 with our share of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from septet.bench.gpu_limits import CARDS, decode_bytes, limits
from septet.bench.host import head
from septet.bench.shapes import SHAPES, write_shape
from septet.hub.model_config import read_model_config

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

Ids = list[int]
MAX_LEN = 16384
LONG_S = 3.0  # a workload is repeated up to three times while its runs together took less


class Target(Protocol):
    def generate(self, prompts: list[Ids], n_out: list[int]) -> list[Ids]:
        """Greedy continuation of each prompt by exactly n_out tokens."""
        ...


class SeptetTarget:
    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        from septet import LLM

        self.llm = LLM(str(model), load_format="dummy", dtype="bfloat16", max_model_len=MAX_LEN, **options)

    def generate(self, prompts: list[Ids], n_out: list[int]) -> list[Ids]:
        from septet import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in n_out]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


class VllmTarget:
    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(model),
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=MAX_LEN,
            gpu_memory_utilization=0.88,
            max_num_seqs=256,
            disable_log_stats=True,
            skip_tokenizer_init=True,
            **options,
        )

    def generate(self, prompts: list[Ids], n_out: list[int]) -> list[Ids]:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in n_out]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


class Run:
    """Times calls of one target and keeps the figures."""

    def __init__(self, target: Target, vocab: int, path: Path | None, about: dict[str, Any]) -> None:
        self.target = target
        self.rng = random.Random(0)
        self.vocab = vocab
        self.path = path
        self.about = about
        self.figures: dict[str, float] = {}

    def tokens(self, n: int) -> Ids:
        return [self.rng.randrange(10, self.vocab - 10) for _ in range(n)]

    def timed(self, prompts: list[Ids], n_out: int | list[int]) -> tuple[float, list[Ids]]:
        each = [n_out] * len(prompts) if isinstance(n_out, int) else n_out
        began = time.perf_counter()
        outputs = self.target.generate(prompts, each)
        seconds = time.perf_counter() - began
        if [len(o) for o in outputs] != each:
            raise RuntimeError(f"asked for {sum(each)} tokens, got {sum(len(o) for o in outputs)}")
        return seconds, outputs

    def median(self, once: Callable[[], float]) -> float:
        """Of the seconds that `once` returns: up to three times, as long as that does not take long."""
        seconds = [once()]
        while len(seconds) < 3 and sum(seconds) < LONG_S:
            seconds.append(once())
        return statistics.median(seconds)

    def record(self, name: str, value: float) -> None:
        self.figures[name] = value
        limit = self.about.get("limits", {}).get(name)
        share = "" if limit is None else f"   {100 * (limit / value if name.endswith('ms') else value / limit):.0f} %"
        print(f"{name:24} {value:12.3f}{share}", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.about, "figures": self.figures}, indent=1))


def w1(run: Run) -> None:
    first = [run.timed([run.tokens(128)], 1)[0] for _ in range(12)][2:]
    whole = run.median(lambda: run.timed([run.tokens(128)], 257)[0])
    run.record("w1_ttft128_ms", 1e3 * statistics.median(first))
    run.record("w1_tpot_ms", 1e3 * (whole - statistics.median(first)) / 256)


def w2(run: Run) -> None:
    for n in (32, 64, 128, 256):
        run.timed([run.tokens(128) for _ in range(n)], 24)
        seconds = run.median(lambda n=n: run.timed([run.tokens(128) for _ in range(n)], 256)[0])  # type: ignore[misc]
        run.record(f"w2_b{n}_tok_s", n * 256 / seconds)


def w3(run: Run) -> None:
    lengths = [(run.rng.randint(100, 1024), run.rng.randint(100, 1024)) for _ in range(256)]
    seconds, _ = run.timed([run.tokens(n_in) for n_in, _ in lengths], [n_out for _, n_out in lengths])
    run.record("w3_out_tok_s", sum(n_out for _, n_out in lengths) / seconds)


def w4(run: Run) -> None:
    shared, unique = [], []
    for _ in range(3):
        prefix = run.tokens(4096)
        shared.append(run.timed([prefix + run.tokens(64) for _ in range(10)], 16)[0])
        unique.append(run.timed([run.tokens(4160) for _ in range(10)], 16)[0])
    run.record("w4_shared4k_x10_ms", 1e3 * statistics.median(shared))
    run.record("w4_unique4k_x10_ms", 1e3 * statistics.median(unique))


def w5(run: Run) -> None:
    system = run.tokens(1024)
    histories = [system + run.tokens(128) for _ in range(64)]
    began = time.perf_counter()
    for _ in range(5):
        _, outputs = run.timed(histories, 128)
        histories = [h + o + run.tokens(128) for h, o in zip(histories, outputs, strict=True)]
    run.record("w5_agents_out_tok_s", 5 * 64 * 128 / (time.perf_counter() - began))


def w7(run: Run) -> None:
    run.timed([run.tokens(4096) for _ in range(4)], 1)
    seconds = run.median(lambda: run.timed([run.tokens(4096) for _ in range(8)], 1)[0])
    run.record("w7_prefill_tok_s", 8 * 4096 / seconds)


WORKLOADS: dict[str, Callable[[Run], None]] = {"w1": w1, "w2": w2, "w7": w7, "w3": w3, "w4": w4, "w5": w5}
TARGETS: dict[str, Callable[[Path, dict[str, Any]], Target]] = {"septet": SeptetTarget, "vllm": VllmTarget}


def about(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What stands beside the figures in the JSON."""
    found = head("gpu_workloads")
    found |= {"target": args.target, "shape": args.shape, "options": args.options}
    found["libraries"]["vllm"] = _version("vllm")
    card = found["machine"]
    known = next((value for name, value in CARDS.items() if name in card.get("gpu", "")), None)
    config = read_model_config(directory)
    steps = {f"b{rows}": decode_bytes(config, rows, 256) for rows in (1, 32, 64, 128, 256)}
    found["bytes_per_decode_step"] = steps  # at 256 tokens of context a row
    return found if known is None else {**found, "limits": limits(config, known)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), default="septet")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="comma-separated workloads")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--options", type=json.loads, default={}, help="engine options as JSON")
    parser.add_argument("--settle", type=float, default=10.0, help="idle seconds before W1: engines capture in pauses")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        directory = write_shape(args.shape, Path(root))
        beside = about(args, directory)
        began = time.perf_counter()
        target = TARGETS[args.target](directory, args.options)
        run = Run(target, int(str(SHAPES[args.shape]["vocab_size"])), args.json, beside)
        run.timed([run.tokens(64)], 1)
        run.record("start_to_first_token_s", time.perf_counter() - began)
        run.timed([run.tokens(64) for _ in range(4)], 8)
        time.sleep(args.settle)
        for name in args.only.split(","):
            run.rng = random.Random(name)  # the same prompts for both targets, however often each repeats
            WORKLOADS[name](run)


if __name__ == "__main__":
    main()
