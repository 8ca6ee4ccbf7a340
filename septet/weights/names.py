"""Names of tensors: what files call them -> the canonical names that layers ask for (Hugging Face's, for Llama).

Called by the sources in `load.py`. Plain strings, no torch. Source of the names: docs/gguf.md of ggml, llama.cpp's
`llama-arch.cpp`; checkpoints of transformers, old and new.
"""

from __future__ import annotations

import re

__all__ = ["build_order", "canonical_of_gguf", "canonical_of_hf", "is_harmless"]

_ROOT = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",  # has no name in Hugging Face: the divisors of the rotary frequencies
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",  # the norm before the MLP, called after what it follows
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {  # four norms a layer: "post_attention_layernorm" is a real post norm here
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<module>[a-z0-9_]+)\.(?P<leaf>weight|bias)", re.ASCII)

_PREFIXES = (  # longest first: text models saved alone, inside a multimodal model (two generations), as a bare trunk
    ("model.language_model.lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.", "model."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)
_HARMLESS = re.compile(
    r"(model\.layers\.[0-9]+\.self_attn|model)\.rotary_emb\.inv_freq"  # computed from the config, kept by old files
    r"|rope_freqs\.weight"  # the same in GGUF, where the model does not ask for it
    r"|(model\.)?(vision_tower|multi_modal_projector)\..*",  # Gemma 3's eyes: Septet reads text
    re.ASCII,
)


def canonical_of_gguf(name: str, architecture: str) -> str:
    """GGUF's name of a tensor of `architecture` -> the canonical name; an unknown name is returned as it is."""
    match = _GGUF.fullmatch(name)
    if match is None:
        return name
    if match["layer"] is None:
        module = _ROOT.get(match["module"])
        return name if module is None else f"{module}.{match['leaf']}"
    module = (_GEMMA_LAYER if architecture == "gemma3" else _LAYER).get(match["module"])
    return name if module is None else f"model.layers.{match['layer']}.{module}.{match['leaf']}"


def canonical_of_hf(name: str) -> str:
    """A checkpoint's name -> the canonical name: the prefixes of wrappers around the text model are dropped."""
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def is_harmless(name: str, tied: bool) -> bool:
    """Whether the tensor of this canonical name may be left in the file unused. `tied`: the embedding is the head."""
    return bool(_HARMLESS.fullmatch(name)) or (tied and name == "lm_head.weight")


_BUILD_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_order(name: str) -> tuple[int, int, int]:
    """Sorts canonical names about as a decoder asks for them: embedding, layer by layer, the rest."""
    parts = name.split(".")
    if name.startswith("model.layers.") and len(parts) > 3 and parts[2].isdigit():
        module = parts[-2]
        return (1, int(parts[2]), _BUILD_ORDER.index(module) if module in _BUILD_ORDER else len(_BUILD_ORDER))
    return (0 if name.startswith("model.embed_tokens.") else 2, 0, 0)
