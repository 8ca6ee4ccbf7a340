"""llama.cpp's side of the CPU workloads, through its C API (no Python in its sampling path, as llama-bench does).

    python septet/bench/cpu_llama_cpp.py MODEL.gguf [--threads N]     prints one JSON line
    python septet/bench/cpu_llama_cpp.py MODEL.gguf --first           loads, makes one token and ends (to be timed)
    python septet/bench/cpu_llama_cpp.py --quantize SOURCE.gguf TARGET.gguf Q4_0

Runs in the peer's own environment (llama-cpp-python, built there with -march=native) and imports nothing of Septet.
Prefill of 512 tokens, one stream of 128 tokens after 16, 8 and 32 streams of 64 steps after 16 tokens; medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import time
from typing import Any

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}  # llama.h: enum llama_ftype


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp as api

        self.api: Any = api
        api.llama_backend_init()
        self.silence = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 8192, 2048, 512, 32
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = api.llama_init_from_model(self.model, settings)
        self.rng = random.Random(0)

    def tokens(self, n: int) -> list[int]:
        return [self.rng.randrange(100, 20000) for _ in range(n)]

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int]) -> None:
        held = (self.api.llama_token * len(tokens))(*tokens)  # the batch points into it
        self._run(self.api.llama_batch_get_one(held, len(tokens)))

    def _run(self, batch: Any) -> None:
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.api.llama_synchronize(self.context)

    def prefill(self, n: int = 512) -> float:
        self.clear()
        began = time.perf_counter()
        self.decode(self.tokens(n))
        return n / (time.perf_counter() - began)

    def stream(self, n: int = 128) -> float:
        self.clear()
        self.decode(self.tokens(16))
        began = time.perf_counter()
        for _ in range(n):
            self.decode(self.tokens(1))
        return n / (time.perf_counter() - began)

    def streams(self, n_seq: int, steps: int = 64) -> float:
        self.clear()
        batch = self.api.llama_batch_init(512, 0, 1)

        def step(rows: list[tuple[int, int, bool]]) -> None:
            batch.n_tokens = len(rows)
            for i, (position, sequence, wanted) in enumerate(rows):
                batch.token[i] = self.tokens(1)[0]
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = position, 1, wanted
                batch.seq_id[i][0] = sequence
            self._run(batch)

        step([(p, s, p == 15) for s in range(n_seq) for p in range(16)])
        began = time.perf_counter()
        for k in range(steps):
            step([(16 + k, s, True) for s in range(n_seq)])
        return n_seq * steps / (time.perf_counter() - began)


def quantize(source: str, target: str, kind: str) -> None:
    """Write `target` in another block type, from a file of any type (speed tests only: quality suffers twice)."""
    import llama_cpp as api

    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = FILE_TYPES[kind], True
    code = api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--quantize", nargs=3, metavar=("SOURCE", "TARGET", "KIND"))
    args = parser.parse_args()
    if args.quantize:
        quantize(*args.quantize)
        return
    peer = Peer(args.model, args.threads)
    if args.first:
        peer.decode(peer.tokens(31))  # as long as the other side's templated prompt
        logits = peer.api.llama_get_logits(peer.context)
        print(
            max(
                range(peer.api.llama_vocab_n_tokens(peer.api.llama_model_get_vocab(peer.model))), key=logits.__getitem__
            )
        )
        return
    peer.prefill(64)
    figures = {
        "pp512": statistics.median(peer.prefill() for _ in range(args.repeat)),
        "tg128": statistics.median(peer.stream() for _ in range(args.repeat)),
        "b8": peer.streams(8),
        "b32": peer.streams(32),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
