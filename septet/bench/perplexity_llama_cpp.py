"""llama.cpp's side of the perplexity: windows of token ids on standard input, log-probabilities on standard output.

    python septet/bench/perplexity_llama_cpp.py MODEL.gguf < windows.json      prints one JSON line

Runs in the peer's own environment (llama-cpp-python) and imports nothing of Septet. float64 softmax of its logits.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any


class Peer:
    def __init__(self, path: str, window: int) -> None:
        import llama_cpp as api

        self.api: Any = api
        api.llama_backend_init()
        self.silence = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {path}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = window
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = api.llama_init_from_model(self.model, settings)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """Of ids[1:], each after those before it."""
        import numpy as np

        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        code = api.llama_decode(self.context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        raw = np.ctypeslib.as_array(api.llama_get_logits(self.context), (len(ids), self.vocab)).astype(np.float64)
        top = raw.max(axis=1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(raw - top).sum(axis=1))
        values = raw[np.arange(len(ids) - 1), ids[1:]] - norm[:-1]
        api.llama_batch_free(batch)
        return [float(value) for value in values]


def main() -> None:
    windows = json.load(sys.stdin)
    peer = Peer(sys.argv[1], max(map(len, windows)))
    print(json.dumps([peer.log_probabilities(ids) for ids in windows]))


if __name__ == "__main__":
    main()
