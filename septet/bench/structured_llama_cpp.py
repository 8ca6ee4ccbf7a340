"""llama.cpp's side of `structured.py`: constrained and free streams through its C API.

    python septet/bench/structured_llama_cpp.py MODEL.gguf --schema JSON [--streams 1,8,32] [--tokens 128]

Runs in the peer's own environment and imports nothing of Septet. Sampling as llama-server does it: a token is drawn
freely first and drawn again under the grammar only where the grammar refuses it. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import time
from typing import Any

PROMPT = (
    "<|im_start|>user\nList people who work here as a JSON array of records, as many as you can.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class Peer:
    def __init__(self, path: str, threads: int, n_seq: int, grammar: str) -> None:
        import llama_cpp as api

        self.api: Any = api
        api.llama_backend_init()
        self.silence = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        self.vocab = api.llama_model_get_vocab(self.model)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 16384, 2048, 512, n_seq
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = api.llama_init_from_model(self.model, settings)
        self.grammar = grammar
        self.batch = api.llama_batch_init(2048, 0, 1)

    def prompt(self) -> list[int]:
        text, out = PROMPT.encode(), (self.api.llama_token * 256)()
        return list(out[: self.api.llama_tokenize(self.vocab, text, len(text), out, 256, True, True)])

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wanted)"""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def chain(self, seed: int, bound: bool) -> Any:
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if bound:
            api.llama_sampler_chain_add(
                chain, api.llama_sampler_init_grammar(self.vocab, self.grammar.encode(), b"root")
            )
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed))
        return chain

    def allowed(self, grammar: Any, token: int) -> bool:
        api = self.api
        one = (api.llama_token_data * 1)(api.llama_token_data(token, 1.0, 0.0))
        array = api.llama_token_data_array(one, 1, -1, False)
        api.llama_sampler_apply(grammar, ctypes.byref(array))
        return not math.isinf(array.data[0].logit)

    def rate(self, n_seq: int, tokens: int, bound: bool) -> float:
        """Tokens per second, first token to last."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        free = [self.chain(seed, False) for seed in range(n_seq)]
        held = [self.chain(seed, True) for seed in range(n_seq)] if bound else []
        grammars = [api.llama_sampler_chain_get(chain, 0) for chain in held]
        prompt = self.prompt()
        last = []
        for s in range(n_seq):  # a prompt at a time, so that a batch never grows beyond the buffers
            self.decode([(t, p, s, p == len(prompt) - 1) for p, t in enumerate(prompt)])
            last.append(self._draw(s, len(prompt) - 1, free, held, grammars))
        began = time.perf_counter()
        for k in range(tokens - 1):
            self.decode([(token, len(prompt) + k, s, True) for s, token in enumerate(last)])
            last = [self._draw(s, s, free, held, grammars) for s in range(n_seq)]
        seconds = time.perf_counter() - began
        for chain in (*free, *held):
            api.llama_sampler_free(chain)
        return n_seq * (tokens - 1) / seconds

    def _draw(self, s: int, at: int, free: list[Any], held: list[Any], grammars: list[Any]) -> int:
        token = int(self.api.llama_sampler_sample(free[s], self.context, at))
        if held and not self.allowed(grammars[s], token):
            return int(self.api.llama_sampler_sample(held[s], self.context, at))  # which the grammar also accepts
        if held:
            self.api.llama_sampler_accept(grammars[s], token)
        return token


def endless(record: str) -> str:
    """A grammar of an array of such records that never ends, as llama.cpp translates schemas."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    rules = [line for line in json_schema_to_gbnf(record).splitlines() if line.strip()]
    rules = ["record" + line.removeprefix("root") if line.startswith("root ::=") else line for line in rules]
    return "\n".join([*rules, 'list ::= record space "," space list', 'root ::= "[" space list'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--schema", required=True, help="of one record")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    counts = [int(part) for part in args.streams.split(",")]
    peer = Peer(args.model, args.threads, max(counts), endless(args.schema))
    results = []
    for streams in counts:
        rates: dict[bool, list[float]] = {False: [], True: []}
        peer.rate(streams, 8, True)
        for _ in range(args.rounds):
            for bound, found in rates.items():
                found.append(peer.rate(streams, args.tokens, bound))
        free, constrained = (statistics.median(rates[bound]) for bound in (False, True))
        row = {"engine": "llama.cpp", "streams": streams, "schema": "endless", "free": free}
        results.append({**row, "constrained": constrained, "ratio": constrained / free})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
