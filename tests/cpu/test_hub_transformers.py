"""The hub's readings held against the libraries that define them: transformers' configs, safetensors' tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from septet.errors import ModelFileError
from septet.hub.model_config import read_model_config
from septet.hub.safetensors import SafetensorsDir

if TYPE_CHECKING:
    from pathlib import Path

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 300, "eos_token_id": 5, "bos_token_id": 4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", {}),
    "mistral full": ("MistralConfig", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "attention_bias": True}),
    "qwen3 default head": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "gemma3 caps": (
        "Gemma3TextConfig",
        {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "layer_types": ["full_attention"] * 7},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(tmp_path: Path, case: str) -> None:
    import transformers

    kind, changes = CASES[case]
    theirs = getattr(transformers, kind)(**{**COMMON, **changes})
    theirs.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    for name in ("vocab_size", "hidden_size", "intermediate_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_layers, ours.num_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert (ours.norm_eps, ours.max_position) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.bos_token_id, ours.eos_token_ids) == (4, (5,))
    scalar = getattr(theirs, "query_pre_attn_scalar", None)
    assert ours.scale == pytest.approx((scalar or head_dim) ** -0.5)
    assert (ours.logit_softcap or None) == getattr(theirs, "final_logit_softcapping", None)
    assert (ours.attention_softcap or None) == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.windows == their_windows(theirs)
    check_ropes(ours, theirs.rope_parameters)


def their_windows(theirs: Any) -> tuple[int | None, ...]:
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None)
    if types is None:
        return (window,) * theirs.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def check_ropes(ours: Any, params: dict[str, Any]) -> None:
    if "full_attention" in params:
        assert ours.rope_local.theta == params["sliding_attention"]["rope_theta"]
        params = params["full_attention"]
    assert (ours.rope.theta, ours.rope.kind) == (params["rope_theta"], params["rope_type"])
    assert ours.rope.factor == params.get("factor", 1.0)
    assert ours.rope.original_max_position == params.get("original_max_position_embeddings", 0)


@pytest.mark.parametrize("case", ["llama biases", "mistral", "qwen2", "qwen3", "gemma3"])
def test_biases_are_those_of_the_model_that_transformers_builds(tmp_path: Path, case: str) -> None:
    import transformers

    kind, changes = CASES[case]
    theirs = getattr(transformers, kind)(**{**COMMON, **changes})
    theirs.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    with torch.device("meta"):
        names = set(transformers.AutoModelForCausalLM.from_config(theirs).state_dict())
    assert ours.attention_bias == ("model.layers.0.self_attn.q_proj.bias" in names)
    assert ours.attention_out_bias == ("model.layers.0.self_attn.o_proj.bias" in names)
    assert ours.mlp_bias == ("model.layers.0.mlp.gate_proj.bias" in names)


def test_safetensors_load(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsDir.open(tmp_path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        loaded = {name: checkpoint.load(name) for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_what_only_the_library_refuses_is_a_typed_error_too(tmp_path: Path) -> None:
    """A hole between tensors passes our checks; the library refuses it."""
    raw = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: SafetensorError"):
        SafetensorsDir.open(tmp_path).load("a")
