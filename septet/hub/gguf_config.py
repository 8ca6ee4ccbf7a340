"""A GGUF file's metadata as a `ModelConfig`.

Called by `model_config.py`. Keys are `<architecture>.<name>` as docs/gguf.md of ggml lists them; where the format
leaves a thing out (Gemma 3's local layers, its attention scale, which tokens end a turn) the constants are those that
llama.cpp assumes for the same files. Biases and tied embeddings are read off the tensors that are there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from septet.config import ModelConfig, RopeConfig
from septet.errors import ModelFileError, UnsupportedModel
from septet.hub import limits
from septet.hub.facts import Facts, shown

if TYPE_CHECKING:
    from septet.hub.gguf import GGUFFile

__all__ = ["config_from_gguf"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")  # "llama" covers Mistral: GGUF doesn't tell them apart
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_PATTERN = 6  # five layers with a window, then one without
GEMMA3_27B_LAYERS = 62
END_OF_TURN = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>")
)
_CONTROL, _USER_DEFINED = 3, 4  # token types of the format
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Raises ModelFileError for a missing or absurd value, UnsupportedModel for an architecture that is not ours."""
    arch = Facts(file.name, file.metadata).text("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"{file.name}: architecture {shown(arch)} is not supported; supported are {known}")
    prefix = arch + "."
    own = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    facts = Facts(f"{file.name}: {arch}", own)
    _refuse_unknown(file, facts)
    hidden = facts.integer("embedding_length", *limits.WIDTH)
    heads = facts.integer("attention.head_count", *limits.HEADS)
    layers = facts.integer("block_count", *limits.LAYERS)
    head_dim = _head_dim(facts, hidden, heads)
    gemma = arch == "gemma3"
    rope = _rope(facts)
    return ModelConfig(
        architecture=arch,
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        intermediate_size=facts.integer("feed_forward_length", *limits.WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=facts.integer("attention.head_count_kv", *limits.HEADS, default=heads),
        head_dim=head_dim,
        norm_eps=_short(facts.number("attention.layer_norm_rms_epsilon", *limits.EPS)),
        max_position=facts.integer("context_length", *limits.POSITIONS),
        rope=rope,
        rope_local=_rope_local(facts) if gemma else None,
        layer_windows=_windows(facts, arch, layers),
        tie_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        activation="gelu_tanh" if gemma else "silu",
        attention_scale=(hidden / heads) ** -0.5 if gemma and layers == GEMMA3_27B_LAYERS else head_dim**-0.5,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        logit_softcap=facts.number("final_logit_softcapping", *limits.SOFT_CAP, default=0.0) if gemma else 0.0,
        bos_token_id=next(iter(_ids(file, "bos")), None),
        eos_token_ids=_ends(file),
        dtype=_dtype(file),
    )


def _refuse_unknown(file: GGUFFile, facts: Facts) -> None:
    if facts.integer("expert_count", 0, 2**16, default=0):
        raise UnsupportedModel(f"{facts.file}: mixtures of experts are not supported")
    if Facts(file.name, file.metadata).integer("split.count", 0, 2**16, default=0) > 1:
        raise UnsupportedModel(f"{file.name} is one part of a split model; join the parts (llama-gguf-split --merge)")


def _head_dim(facts: Facts, hidden: int, heads: int) -> int:
    head_dim = facts.integer("attention.key_length", *limits.HEAD_DIM, default=None)
    if head_dim is None:
        if hidden % heads:
            raise ModelFileError(f"{facts.file}: embedding_length {hidden} is no multiple of {heads} heads")
        head_dim = hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        other = facts.integer(key, *limits.HEAD_DIM, default=head_dim)
        if other != head_dim:
            raise UnsupportedModel(f"{facts.file}: {key} {other} differs from the key length {head_dim}")
    return head_dim


def _rope(facts: Facts) -> RopeConfig:
    """Llama 3's scaling has no keys: its factors are the tensor rope_freqs.weight, which the weight source applies."""
    theta = facts.number("rope.freq_base", *limits.THETA, default=10_000.0)
    kind = facts.text("rope.scaling.type", default=None)
    factor = facts.number("rope.scaling.factor", 0.0, limits.FACTOR[1], default=0.0)
    factor = factor or facts.number("rope.scale_linear", 0.0, limits.FACTOR[1], default=0.0)
    if kind not in (None, "none", "linear"):
        raise UnsupportedModel(f"{facts.file}: rope scaling {shown(kind)} is not supported; supported are none, linear")
    if kind == "none" or factor in (0.0, 1.0):
        return RopeConfig(theta=theta)
    if factor < limits.FACTOR[0]:
        raise facts.bad("rope.scaling.factor", f"a number in [{limits.FACTOR[0]:g}, {limits.FACTOR[1]:g}]")
    return RopeConfig(theta=theta, kind="linear", factor=_short(factor))


def _rope_local(facts: Facts) -> RopeConfig:
    return RopeConfig(theta=facts.number("rope.freq_base_swa", *limits.THETA, default=GEMMA3_LOCAL_THETA))


def _windows(facts: Facts, arch: str, layers: int) -> tuple[int | None, ...]:
    """(layers,), or () where no layer has a window. A window in Qwen's files is unused without a pattern, as there."""
    window = facts.integer("attention.sliding_window", 0, limits.POSITIONS[1], default=0)
    key = "attention.sliding_window_pattern"
    pattern = facts.values.get(key)
    if not window or (arch.startswith("qwen") and pattern is None):
        return ()
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(local, bool) for local in pattern):
            raise facts.bad(key, f"an integer or a list of {layers} booleans")
        return tuple(window if local else None for local in pattern)
    period = facts.integer(key, 0, limits.LAYERS[1], default=GEMMA3_PATTERN if arch == "gemma3" else 0)
    return tuple(window if period == 0 or i % period < period - 1 else None for i in range(layers))


def _vocab_size(file: GGUFFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelFileError(f"{file.name}: the tensor token_embd.weight is missing or no matrix")
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, list | tuple) or (tokens and len(tokens) != table.shape[0]):
        n = len(tokens) if isinstance(tokens, list) else "no list of"
        raise ModelFileError(f"{file.name}: {n} tokens in the vocabulary, {table.shape[0]} rows in token_embd.weight")
    low, high = limits.VOCAB
    if not low <= table.shape[0] <= high:
        raise ModelFileError(f"{file.name}: a vocabulary of {table.shape[0]} tokens; {low} to {high} are accepted")
    return table.shape[0]


def _ids(file: GGUFFile, name: str) -> tuple[int, ...]:
    return Facts(file.name, file.metadata).ids(f"tokenizer.ggml.{name}_token_id")


def _ends(file: GGUFFile) -> tuple[int, ...]:
    """The ids that end a generation: those named as such, and special tokens spelled as a family's end of turn."""
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    types = file.metadata.get("tokenizer.ggml.token_type", [])
    ids = [*_ids(file, "eos"), *_ids(file, "eot"), *_ids(file, "eom")]
    for i, token in enumerate(tokens):
        if token in END_OF_TURN and (i >= len(types) or types[i] in (_CONTROL, _USER_DEFINED)):
            ids.append(i)
    return tuple(dict.fromkeys(ids))


def _dtype(file: GGUFFile) -> str:
    sample = file.tensors.get("blk.0.attn_q.weight") or file.tensors["token_embd.weight"]
    return _DTYPES.get(sample.kind, "bfloat16")


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
