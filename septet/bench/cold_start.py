"""From nothing to the first token, weights in the page cache: once without compiled kernels, once with them.

    python -m septet.bench.cold_start --shape 8b --dir DIR [--json PATH] [--rounds 1]

Writes a checkpoint of the shape into DIR once (random bf16, safetensors shards of 4 GB; it stays in the page cache),
then starts `LLM` in a fresh process and asks for one token: with an empty kernel cache, and again with the one that the
first start filled. The clock runs from before the process is made. Prints the parts, which the engine reports, and when
each step of the start was over: context, libraries, each captured shape.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.bench.host import head, run_job, write_results
from septet.bench.shapes import SHAPES, write_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["main", "write_checkpoint"]

SHARD = 4 << 30  # bytes, at most
BLOCK = 1 << 26  # random values; tensors are cut out of them, each from another place
TIMEOUT_S = 240


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint's tensors, in its order."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (q, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_checkpoint(shape: str, root: Path, *, shard: int = SHARD) -> Path:
    """`root`/`shape`: a checkpoint of random weights, if it is not there yet; a complete one has its index."""
    directory = write_shape(shape, root)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return directory
    files: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    size = 0
    for name, dims in shapes_of(SHAPES[shape]):
        n_bytes = 2 * _product(dims)
        if files[-1] and size + n_bytes > shard:
            files.append([])
            size = 0
        files[-1].append((name, dims, n_bytes))
        size += n_bytes
    values = _random_values()
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write_shard(directory / name, tensors, values)
        weight_map |= dict.fromkeys((tensor for tensor, _, _ in tensors), name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def _product(dims: tuple[int, ...]) -> int:
    n = 1
    for dim in dims:
        n *= dim
    return n


def _random_values() -> memoryview:
    """Normal values of standard deviation 0.02 in bf16, their bytes twice over so that any BLOCK of them is whole."""
    import numpy as np

    floats = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
    return np.concatenate([halves, halves]).data.cast("B")


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...], int]], values: memoryview) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, dims, n_bytes in tensors:
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (name, _, n_bytes) in enumerate(tensors):
            if name.endswith("norm.weight"):
                file.write(b"\x80\x3f" * (n_bytes // 2))  # ones
                continue
            left = n_bytes
            while left:
                n, start = min(left, 2 * BLOCK), 2 * (i * 7919 % BLOCK)
                file.write(values[start : start + n])
                left -= n


# -- one start --------------------------------------------------------------------------------------------------------
def child(model: str, options: dict[str, Any]) -> None:
    """In the fresh process: one token, then a line of JSON."""
    from septet import LLM, SamplingParams

    imported = time.time()
    with LLM(model, dtype="bfloat16", max_model_len=16384, **options) as llm:
        ready = time.time()
        prompt = {"prompt_token_ids": [(7919 * i) % 30000 + 10 for i in range(128)]}
        tokens = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
        first = time.time()
        info = llm._session.client.info
        print(
            json.dumps(
                {
                    "imported": imported,
                    "ready": ready,
                    "first": first,
                    "token": list(tokens[0].outputs[0].token_ids),
                    "load_s": info.load_s,
                    "weight_bytes": info.weight_bytes,
                    "choices": info.choices,
                }
            )
        )


def start(model: Path, cache: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One start in a process of its own, timed from outside."""
    command = [sys.executable, "-m", "septet.bench.cold_start", "--child", str(model), "--options", json.dumps(options)]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "SEPTET_LOG_LEVEL": "DEBUG"}
    began = time.time()
    done = run_job(command, TIMEOUT_S, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"the start failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    loading = next((words for name, _, words in told["choices"] if name == "load"), "")
    weights_s = float(found.group(1)) if (found := re.search(r"weights ([0-9.]+) s", loading)) else 0.0
    return {
        "first_token_s": told["first"] - began,
        "python_and_api_s": told["imported"] - began,
        "engine_process_and_imports_s": told["ready"] - told["imported"] - told["load_s"],
        "load_s": told["load_s"],
        "first_request_s": told["first"] - told["ready"],
        "weights_gb_s": told["weight_bytes"] / 1e9 / weights_s if weights_s else 0.0,
        "load": loading,
        "events": list(events(done.stderr, began)),
    }


def events(log: str, began: float) -> Iterator[str]:
    """What the engine said on its way, each line with the seconds since `began`."""
    for line in log.splitlines():
        if found := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (?:DEBUG|INFO|WARNING) (engine\..*)", line):
            at = datetime.strptime(found.group(1), "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
            yield f"{at - began:.3f} {found.group(2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--dir", type=Path, help="where the checkpoint is, or will be written")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--rounds", type=int, default=1, help="of a cold and a warm start each")
    parser.add_argument("--options", type=json.loads, default={}, help="engine options as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.options)
        return
    if args.dir is None:
        parser.error("--dir is needed")
    began = time.perf_counter()
    model = write_checkpoint(args.shape, args.dir)
    print(f"checkpoint ready after {time.perf_counter() - began:.1f} s", flush=True)
    starts = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kernels in ("cold", "warm"):
                figures = {"kernel_cache": kernels, **start(model, Path(cache), args.options)}
                starts.append(figures)
                print(json.dumps({name: value for name, value in figures.items() if name != "events"}))
                print("\n".join(figures["events"]), flush=True)
    if args.json:
        write_results(args.json, {**head("cold_start"), "shape": args.shape}, starts=starts)


if __name__ == "__main__":
    main()
