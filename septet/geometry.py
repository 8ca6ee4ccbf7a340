"""Sizes, computed once for everybody: bytes of weights, of caches, of blocks.

Owned by the base room, standard library only. The pool, the loaders and the benchmarks call the same functions, so that
no two of them disagree about how large a thing is. Knows no file format's layout beyond the size of its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septet.config import ModelConfig

__all__ = [
    "BLOCKS",
    "DTYPE_BYTES",
    "activation_bytes",
    "flops_per_token",
    "kv_bytes_per_token",
    "parameter_count",
    "row_state_bytes",
    "weight_bytes",
]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""GGML types that Septet reads: name -> (elements per block, bytes per block). Source: ggml-common.h of llama.cpp."""


def parameter_count(config: ModelConfig) -> int:
    """Weights of the whole model, elements; a tied head is counted once."""
    d, e = config.hidden_size, config.head_dim
    attention = d * e * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * d * config.intermediate_size
    heads = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return config.num_layers * (attention + mlp + 2 * d) + heads + d


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of all weights when each is held in `dtype`."""
    return parameter_count(config) * DTYPE_BYTES[dtype]


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token holds over all layers: one slot of the pool."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype]


def flops_per_token(config: ModelConfig, context: int = 0) -> int:
    """Floating-point operations of one token's forward pass: 2 per weight used, plus attention over `context`."""
    lookup = config.vocab_size * config.hidden_size * (0 if config.tie_embeddings else 1)  # a row, not a product
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    return 2 * (parameter_count(config) - lookup) + attention


def activation_bytes(config: ModelConfig, n_tokens: int, n_sampled: int, dtype: str) -> int:
    """Upper estimate of a step's temporaries: the widest few tensors of a layer alive together, and the sampler's
    float32 copies of the logits (raw, adjusted, noise, sort keys and ids)."""
    qkv = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    width = 4 * config.hidden_size + 2 * qkv + 3 * config.intermediate_size
    return n_tokens * width * DTYPE_BYTES[dtype] + n_sampled * config.vocab_size * (DTYPE_BYTES[dtype] + 6 * 4)


def row_state_bytes(max_num_seqs: int, max_model_len: int) -> int:
    """Bytes of the per-row tables: token ids and slots, int32 each."""
    return (max_num_seqs + 1) * (max_model_len + 1) * 2 * 4
