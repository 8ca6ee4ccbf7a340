"""A checkpoint directory's config.json as a `ModelConfig`.

Called by `model_config.py`. Reads Hugging Face's names in the spellings of transformers 4 and 5 (`rope_scaling` and
`rope_parameters`, `sliding_window_pattern` and `layer_types`), with the defaults of each family's config class where a
key is left out, as real checkpoints do. Never imports transformers, never runs a repository's code (`auto_map`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.config import ModelConfig, RopeConfig
from septet.errors import ModelFileError, UnsupportedModel
from septet.hub import limits
from septet.hub.facts import Facts, read_json, shown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["config_from_directory"]

MAX_CONFIG_BYTES = 8 * 2**20
GEMMA3_THETA = 1_000_000.0
GEMMA3_LOCAL_THETA = 10_000.0
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family's config class assumes where config.json is silent. `...`: the key is required."""

    architecture: str
    max_position: int
    vocab_size: Any = ...
    hidden_size: Any = ...
    intermediate_size: Any = ...
    num_layers: Any = ...
    num_heads: Any = ...
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    tie_embeddings: bool = False
    activation: str = "silu"
    sliding_window: int | None = None
    bos: int | None = None
    eos: tuple[int, ...] = ()


_GEMMA3 = _Family(
    architecture="gemma3",
    max_position=131_072,
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    tie_embeddings=True,
    activation="gelu_pytorch_tanh",
    sliding_window=4096,
    bos=2,
    eos=(1,),
)
_FAMILIES = {
    "llama": _Family("llama", 2048, bos=1, eos=(2,)),
    "mistral": _Family("mistral", 131_072, num_kv_heads=8, sliding_window=4096, bos=1, eos=(2,)),
    "qwen2": _Family("qwen2", 32_768, sliding_window=4096),
    "qwen3": _Family("qwen3", 32_768, head_dim=128, sliding_window=4096),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
}


def config_from_directory(path: Path) -> ModelConfig:
    """Raises ModelFileError for a missing or absurd value, UnsupportedModel for what Septet doesn't implement."""
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelFileError(f"{shown(path.name)} holds no config.json: give a checkpoint's directory, or a .gguf file")
    top = Facts(f"{path.name}/config.json", read_json(path / "config.json", MAX_CONFIG_BYTES))
    family = _family(top)
    facts = (top.part("text_config") or top) if top.text("model_type") == "gemma3" else top
    _refuse_unknown(top, facts)
    hidden = facts.integer("hidden_size", *limits.WIDTH, default=family.hidden_size)
    heads = facts.integer("num_attention_heads", *limits.HEADS, default=family.num_heads)
    layers = facts.integer("num_hidden_layers", *limits.LAYERS, default=family.num_layers)
    # A null means "as many as query heads", a missing key the default of the family's class.
    kv_default = heads if "num_key_value_heads" in facts.values else family.num_kv_heads or heads
    gemma = family.architecture == "gemma3"
    rope, rope_local = _gemma_ropes(facts) if gemma else (_rope(facts), None)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=facts.integer("vocab_size", *limits.VOCAB, default=family.vocab_size),
        hidden_size=hidden,
        intermediate_size=facts.integer("intermediate_size", *limits.WIDTH, default=family.intermediate_size),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=facts.integer("num_key_value_heads", *limits.HEADS, default=kv_default),
        head_dim=_head_dim(facts, family, hidden, heads),
        norm_eps=facts.number("rms_norm_eps", *limits.EPS, default=1e-6),
        max_position=facts.integer("max_position_embeddings", *limits.POSITIONS, default=family.max_position),
        rope=rope,
        rope_local=rope_local,
        layer_windows=_windows(facts, family, layers),
        tie_embeddings=_either(top, facts).flag("tie_word_embeddings", family.tie_embeddings),
        **_biases(facts, family.architecture),
        activation=_activation(facts, family),
        attention_scale=facts.number("query_pre_attn_scalar", 1e-3, 1e6, default=256.0) ** -0.5 if gemma else 0.0,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_softcap=facts.number("attn_logit_softcapping", *limits.SOFT_CAP, default=0.0) if gemma else 0.0,
        logit_softcap=facts.number("final_logit_softcapping", *limits.SOFT_CAP, default=0.0) if gemma else 0.0,
        bos_token_id=next(iter(_either(top, facts).ids("bos_token_id")), family.bos),
        eos_token_ids=_ends(path, _either(top, facts), family),
        dtype=_dtype(_either(top, facts)),
    )


def _family(top: Facts) -> _Family:
    known = ", ".join(_FAMILIES)
    if "auto_map" in top.values:
        raise UnsupportedModel(
            f"{top.file} asks to run code from the repository (auto_map), which Septet never does; "
            f"supported model types are {known}"
        )
    kind = top.text("model_type", default=None)
    if kind not in _FAMILIES:
        raise UnsupportedModel(f"{top.file}: model_type {shown(kind)} is not supported; supported are {known}")
    return _FAMILIES[kind]


def _refuse_unknown(top: Facts, facts: Facts) -> None:
    for owner in (top, facts):
        if owner.values.get("quantization_config"):
            raise UnsupportedModel(f"{owner.file}: quantised safetensors are not supported; use a GGUF file")
    if facts.flag("use_bidirectional_attention", False):
        raise UnsupportedModel(f"{facts.file}: bidirectional attention is not supported")
    if facts.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise UnsupportedModel(f"{facts.file}: partial rotary embedding is not supported")


def _either(top: Facts, facts: Facts) -> Facts:
    """Keys that a multimodal config may state at either level; the outer one wins."""
    return Facts(top.file, {**facts.values, **{k: v for k, v in top.values.items() if v is not None}})


def _head_dim(facts: Facts, family: _Family, hidden: int, heads: int) -> int:
    head_dim = facts.integer("head_dim", *limits.HEAD_DIM, default=family.head_dim)
    if head_dim is not None:
        return head_dim
    if hidden % heads:
        raise ModelFileError(f"{facts.file}: hidden_size {hidden} is no multiple of {heads} heads, and no head_dim")
    return hidden // heads


def _rope(facts: Facts) -> RopeConfig:
    params = facts.part("rope_parameters") or facts.part("rope_scaling")
    theta = facts.number("rope_theta", *limits.THETA, default=10_000.0)
    return RopeConfig(theta=theta) if params is None else _rope_of(params, theta, facts)


def _rope_of(params: Facts, theta: float, facts: Facts) -> RopeConfig:
    """One table of rope parameters; `theta` where it has none."""
    theta = params.number("rope_theta", *limits.THETA, default=theta)
    kind = params.text("rope_type", default=None) or params.text("type", default="default")
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise UnsupportedModel(f"{params.file}: rope type {shown(kind)} is not supported; supported are {known}")
    if params.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        raise UnsupportedModel(f"{params.file}: partial rotary embedding is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = params.number("factor", *limits.FACTOR)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    longest = facts.integer("max_position_embeddings", *limits.POSITIONS, default=None)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=params.number("low_freq_factor", 1e-3, 1e6),
        high_freq_factor=params.number("high_freq_factor", 1e-3, 1e6),
        original_max_position=params.integer(
            "original_max_position_embeddings", *limits.POSITIONS, default=... if longest is None else longest
        ),
    )


def _gemma_ropes(facts: Facts) -> tuple[RopeConfig, RopeConfig]:
    """-> (of layers without a window, of layers with one). Context scaling belongs to the former alone."""
    theta = facts.number("rope_theta", *limits.THETA, default=GEMMA3_THETA)
    local = facts.number("rope_local_base_freq", *limits.THETA, default=GEMMA3_LOCAL_THETA)
    both = facts.part("rope_parameters")
    if both is None:
        params = facts.part("rope_scaling")
        return _rope_of(params, theta, facts) if params else RopeConfig(theta=theta), RopeConfig(theta=local)
    full, sliding = both.part("full_attention"), both.part("sliding_attention")
    if full is None and sliding is None and both.values:
        raise UnsupportedModel(f"{both.file}: expected full_attention and sliding_attention inside")
    return (
        _rope_of(full, theta, facts) if full else RopeConfig(theta=theta),
        _rope_of(sliding, local, facts) if sliding else RopeConfig(theta=local),
    )


def _windows(facts: Facts, family: _Family, layers: int) -> tuple[int | None, ...]:
    """(layers,), or () where no layer has a window."""
    if family.architecture == "llama":
        return ()
    default = None if "sliding_window" in facts.values else family.sliding_window
    window = facts.integer("sliding_window", *limits.POSITIONS, default=default)
    qwen = family.architecture.startswith("qwen")
    if window is None or (qwen and not facts.flag("use_sliding_window", False)):
        return ()
    if family.architecture == "mistral":
        return (window,) * layers
    types = facts.values.get("layer_types")
    if types is not None:
        return _windows_of(facts, types, window, layers)
    if qwen:
        first = facts.integer("max_window_layers", 0, limits.LAYERS[1], default=28)
        return tuple(window if i >= first else None for i in range(layers))
    period = facts.integer("sliding_window_pattern", 1, limits.LAYERS[1], default=None)
    period = period or facts.integer("_sliding_window_pattern", 1, limits.LAYERS[1], default=6)
    return tuple(window if (i + 1) % period else None for i in range(layers))


def _windows_of(facts: Facts, types: object, window: int, layers: int) -> tuple[int | None, ...]:
    of_type = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers:
        raise facts.bad("layer_types", f"a list of {layers} names")
    for kind in types:
        if not isinstance(kind, str) or kind not in of_type:
            known = ", ".join(of_type)
            raise UnsupportedModel(f"{facts.file}: layer type {shown(kind)} is not supported; supported are {known}")
    return tuple(of_type[kind] for kind in types)


def _biases(facts: Facts, architecture: str) -> dict[str, bool]:
    if architecture == "qwen2":  # always on q, k, v; never on o
        return {"attention_bias": True}
    if architecture == "mistral":
        return {}
    bias = facts.flag("attention_bias", False)
    mlp = architecture == "llama" and facts.flag("mlp_bias", False)
    return {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": mlp}


def _activation(facts: Facts, family: _Family) -> str:
    key = "hidden_activation" if family.architecture == "gemma3" else "hidden_act"
    name = facts.text(key, default=family.activation)
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedModel(f"{facts.file}: {key} {shown(name)} is not supported; supported are {known}")
    return _ACTIVATIONS[name]


def _ends(path: Path, facts: Facts, family: _Family) -> tuple[int, ...]:
    """eos of generation_config.json first (an instruct model's end of turn is often only there), then config.json's."""
    ids: list[int] = []
    generation = path / "generation_config.json"
    if generation.exists():
        said = Facts(f"{path.name}/{generation.name}", read_json(generation, MAX_CONFIG_BYTES))
        ids.extend(said.ids("eos_token_id"))
    ids.extend(facts.ids("eos_token_id") if "eos_token_id" in facts.values else family.eos)
    return tuple(dict.fromkeys(ids))


def _dtype(facts: Facts) -> str:
    name = facts.text("dtype", default=None) or facts.text("torch_dtype", default="bfloat16")
    if name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedModel(f"{facts.file}: dtype {shown(name)} is not supported; use float32, float16 or bfloat16")
    return name
