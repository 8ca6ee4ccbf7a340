"""Facts of a model and settings of an engine: frozen, resolved once, printed at start with the reason of each value.

Standard library only. `ModelConfig` is what a checkpoint says of itself, in Hugging Face's names; `EngineConfig` is
what the user chose. Neither is edited after birth (`dataclasses.replace` makes another).
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["EngineConfig", "ModelConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding (arXiv 2104.09864) and its context scaling, in Hugging Face's terms."""

    theta: float = 10_000.0
    kind: str = "default"  # "default" | "linear" | "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder-only transformer. All sizes in elements."""

    architecture: str  # "llama" | "mistral" | "qwen2" | "qwen3" | "gemma3": a key of models/registry.py
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int  # context length the checkpoint was made for, tokens
    rope: RopeConfig = field(default_factory=RopeConfig)
    rope_local: RopeConfig | None = None  # for layers with a window, where it differs (Gemma 3)
    layer_windows: tuple[int | None, ...] = ()  # (num_layers,) sliding window in tokens, None = full attention
    tie_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k, v
    attention_out_bias: bool = False  # bias on o
    mlp_bias: bool = False
    activation: str = "silu"  # "silu" | "gelu_tanh"
    attention_scale: float = 0.0  # multiplies q.k; 0 = 1/sqrt(head_dim)
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0  # 0 = off
    logit_softcap: float = 0.0  # 0 = off
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of the checkpoint: "float32" | "float16" | "bfloat16"

    @property
    def scale(self) -> float:
        """The factor of q.k in attention."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def windows(self) -> tuple[int | None, ...]:
        """(num_layers,) sliding window of each layer."""
        return self.layer_windows or (None,) * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model; vLLM's flag names. 0 or "auto" means: resolved at start from the machine, reason printed."""

    model: str  # local path of a .gguf file or a checkpoint directory
    load_format: str = "auto"  # "auto" | "dummy" (random weights of a config.json, for benchmarks)
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto" | "float32" | "bfloat16" | "float16"
    max_model_len: int = 0  # tokens per request; 0 = the model's, reduced to what memory holds (and said so)
    max_num_seqs: int = 0  # rows per step
    max_num_batched_tokens: int = 0  # tokens per step
    max_waiting: int = 4096  # queued requests before refusing
    kv_cache_memory: int = 0  # bytes; 0 = by arithmetic from free memory
    memory_utilization: float = 0.9  # share of the GPU's memory that Septet may fill
    num_kv_slots: int = 0  # tokens the KV pool holds; overrides kv_cache_memory
    enable_prefix_caching: bool = True
    overlap: str = "auto"  # "auto" | "on" | "off": schedule step N + 1 while step N runs
    enforce_eager: bool = False  # no captured steps
    kernels: str = "auto"  # "auto" | "reference" | "triton" | "native"
    stream_gap_ms: int = -1  # tokens within it of the last ones leave with the next ones; -1 = auto, 0 = each at once
    seed: int = 0
