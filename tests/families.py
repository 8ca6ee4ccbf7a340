"""Tiny random models of each family in transformers, the oracle, and the same models in Septet.

All parameters are random and large enough that logits spread over several units: attention, norms, biases and windows
all matter to the result. Windows are far shorter than the tests' sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from septet.config import ModelConfig, RopeConfig
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import MODELS, load_model
from tests.forward import Harness, StateSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from septet.models.registry import Model

__all__ = ["FAMILIES", "Family", "Pair", "make"]

VOCAB, WINDOW, MAX_LEN = 199, 9, 256


@dataclass(frozen=True)
class Family:
    """`config_class` of transformers with `hf` values on top of the common shape, and what Septet calls the same."""

    config_class: str
    architecture: str
    hf: dict[str, Any] = field(default_factory=dict)
    septet: dict[str, Any] = field(default_factory=dict)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL_GLOBAL = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"]
WINDOWS = tuple(None if kind == "full_attention" else WINDOW for kind in LOCAL_GLOBAL)

FAMILIES = {
    "llama": Family("LlamaConfig", "llama"),
    "llama-bias-tied": Family(
        "LlamaConfig",
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "tie_embeddings": True},
    ),
    "llama3": Family(
        "LlamaConfig",
        "llama",
        {"rope_parameters": LLAMA3},
        {"rope": RopeConfig(kind="llama3", factor=8.0, original_max_position=64)},
    ),
    "llama-linear": Family(
        "LlamaConfig",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope": RopeConfig(kind="linear", factor=4.0)},
    ),
    "mistral": Family("MistralConfig", "mistral", {"sliding_window": WINDOW}, {"layer_windows": (WINDOW,) * 4}),
    "qwen2": Family(
        "Qwen2Config", "qwen2", {"tie_word_embeddings": True}, {"attention_bias": True, "tie_embeddings": True}
    ),
    "qwen2-windows": Family(
        "Qwen2Config",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        {"attention_bias": True, "layer_windows": (None, None, WINDOW, WINDOW)},
    ),
    "qwen3": Family("Qwen3Config", "qwen3", {"head_dim": 24}, {"head_dim": 24}),
    "gemma3": Family(
        "Gemma3TextConfig",
        "gemma3",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_GLOBAL,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        {
            "head_dim": 24,
            "attention_scale": 20**-0.5,
            "layer_windows": WINDOWS,
            "rope": RopeConfig(theta=1_000_000.0, kind="linear", factor=8.0),
            "rope_local": RopeConfig(),
            "embedding_scale": 64**0.5,
            "logit_softcap": 30.0,
            "activation": "gelu_tanh",
            "tie_embeddings": True,
        },
    ),
}


@dataclass
class Pair:
    """One model twice."""

    hf: Any
    model: Model
    config: ModelConfig

    def harness(self, **kwargs: Any) -> Harness:
        return Harness(self.model, self.config, max_len=MAX_LEN, **kwargs)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """(n, V) of transformers for the whole sequence."""
        return self.hf(torch.tensor([ids])).logits[0]

    @torch.inference_mode()
    def greedy(self, ids: list[int], n: int) -> list[int]:
        """n tokens by transformers' own generate."""
        out = self.hf.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=n, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(ids) :].tolist()


def make(name: str, dtype: torch.dtype = torch.float32, models: Mapping[str, str] = MODELS) -> Pair:
    """The family's tiny model, the same weights in each."""
    family = FAMILIES[name]
    config = ModelConfig(
        **{
            "architecture": family.architecture,
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "norm_eps": 1e-5,
            "max_position": MAX_LEN,
            **family.septet,
        }
    )
    hf = _transformers(family).to(dtype)
    source = StateSource(_state(hf, family.architecture), dtype)
    build = Build(config, ReferenceOps(), source, torch.device("cpu"), dtype, MAX_LEN)
    return Pair(hf, load_model(build, models), config)


def _transformers(family: Family) -> Any:
    import transformers

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, family.config_class)(**{**common, **family.hf})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    dice = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.6 * parameter.shape[1] ** -0.5
            if "embed_tokens" in name:  # Gemma's is tied and scaled: small, so that the layers have their say
                spread = 0.05 if _gemma(family.architecture) else 0.5
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=dice))
    return model


def _gemma(architecture: str) -> bool:
    """Embeddings scaled by sqrt(D), norms stored without their 1."""
    return architecture.startswith("gemma")


def _state(hf: Any, architecture: str) -> dict[str, Tensor]:
    """The state dict as a source gives it: without the tied copy, Gemma's norms with their 1."""
    state = dict(hf.state_dict())
    if hf.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if _gemma(architecture):
        state = {name: t + 1.0 if "norm" in name else t for name, t in state.items()}
    return state
