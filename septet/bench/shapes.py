"""Model shapes for benchmarks with random weights: Llama 3's 1B and 8B, written as checkpoints without weights.

Called by the GPU workloads and tests. Standard library only.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SHAPES", "write_shape"]

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_TINY = {  # to try a benchmark out
    **_1B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES: dict[str, dict[str, object]] = {
    "1b": {**_COMMON, **_1B, "vocab_size": 128256},
    "1b49k": {**_COMMON, **_1B, "vocab_size": 49152},
    "8b": {**_COMMON, **_8B, "vocab_size": 128256},
    "tiny": {**_COMMON, **_TINY, "vocab_size": 1024},
}


def write_shape(name: str, root: Path) -> Path:
    """Write `root`/`name`/config.json and a tokenizer; returns the directory, to be loaded with load_format "dummy"."""
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(int(str(config["vocab_size"])))))
    return directory


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """A byte-level BPE (the file format of the tokenizers library) whose every id has a text and no merge exists."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]  # GPT-2's byte alphabet
    words = letters + [f"\u0120w{i}" for i in range(vocab_size - len(letters))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": level, "decoder": level}
