"""Tiny random checkpoints of every family, made with transformers, and the same weights as GGUF files.

`build` saves a Hugging Face checkpoint with a byte-level tokenizer; `to_gguf` writes it as llama.cpp's converter does
(names, permuted q and k, Gemma's norms, rope factors) with the `gguf` package. Called by tests; knows no septet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3")
VOCAB = 320  # 256 bytes, merges, specials, unused
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MERGES = ["t h", "th e", "i n", "a n", "an d", "e r", "o n", "Ġ t", "Ġ a", "Ġ the", "r e", "o u"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|bos|>' + m['role'] + '\n' + m['content'] + '<|eos|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant\n' }}{% endif %}"
)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 300,
    "eos_token_id": 301,
    "pad_token_id": 302,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {
    "num_hidden_layers": 7,  # 5 with a window, 1 full, 1 with a window
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' model class less "Config" or "ForCausalLM", settings
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", GEMMA3),
}


# -- Hugging Face -----------------------------------------------------------------------------------------------------
def build(
    family: str, dir: Path, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Save a random checkpoint of `family` in `dir` (made if missing) -> `dir`.

    `overrides` are fields of the Hugging Face config (num_hidden_layers=2, tie_word_embeddings=True, ...). Weights are
    large enough for clear argmaxes; norms and biases are random too, so that none can be forgotten unnoticed.
    """
    import transformers

    name, settings = FAMILY[family]
    suffix = "TextConfig" if family == "gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**{**BASE, **settings, **overrides})
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    gemma = family == "gemma3"  # norms are stored less 1, embeddings are multiplied by sqrt(hidden_size)
    randomise(model, torch.Generator().manual_seed(seed), norm_mean=1.0 - gemma, embedding_std=0.02 if gemma else 0.4)
    model.generation_config.eos_token_id = config.eos_token_id
    model.to(getattr(torch, dtype)).save_pretrained(dir, max_shard_size=max_shard_size)
    save_tokenizer(dir, config.vocab_size)
    return dir


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator, norm_mean: float, embedding_std: float) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            std = embedding_std if "embed" in name else 1.5 / math.sqrt(parameter.shape[1])
            parameter.copy_(noise * std)
        else:
            mean = norm_mean if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * noise)


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def vocabulary(size: int) -> list[str]:
    """`size` tokens: bytes, merges, unused ones; bos, eos and pad at 300, 301 and 302."""
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"<unused{i}>" for i in range(len(tokens), size)]
    tokens[300:303] = [BOS, EOS, PAD]
    return tokens


def save_tokenizer(dir: Path, size: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(vocabulary(size))}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS, PAD)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(dir)


# -- GGUF -------------------------------------------------------------------------------------------------------------
def to_gguf(dir: Path, out: Path, kind: str = "F32") -> Path:
    """Write the checkpoint in `dir` as one GGUF file -> `out`. Matrices in block type `kind`, the rest in F32.

    `kind` is any that the gguf package can quantise: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Mistral becomes
    architecture "llama", as with llama.cpp, with `llama.attention.sliding_window` besides.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(dir)
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(out, arch)
    write_metadata(writer, config, arch)
    write_tokenizer(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in sorted(read_safetensors(dir).items()):
        converted = convert(name, tensor, config, arch)
        add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), converted, kind)
    if config.rope_parameters.get("rope_type") == "llama3":
        add_tensor(writer, "rope_freqs.weight", llama3_factors(config), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def read_safetensors(dir: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {k: v.float().numpy() for path in sorted(dir.glob("*.safetensors")) for k, v in load_file(path).items()}


def convert(name: str, tensor: np.ndarray, config: Any, arch: str) -> np.ndarray:
    """llama.cpp's layout: q and k rows permuted for interleaved rotation (llama), norms with their 1 (Gemma)."""
    if arch == "gemma3" and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if arch == "llama" and heads:
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    if tensor.ndim < 2 or kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
        return
    block_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), block_type), raw_dtype=block_type)


def llama3_factors(config: Any) -> np.ndarray:
    """(head_dim / 2,) divisors of the rotary frequencies (Llama 3.1's scaling as llama.cpp stores it)."""
    rope = config.rope_parameters
    base, context = rope["rope_theta"], rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi * base ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(f"tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch != "gemma3":
        writer.add_rope_dimension_count(head_dim)
    if arch in ("llama", "gemma3") and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        return
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def write_tokenizer(writer: gguf.GGUFWriter, config: Any) -> None:
    tokens = vocabulary(config.vocab_size)
    types = [gguf.TokenType.UNUSED if t.startswith("<unused") else gguf.TokenType.NORMAL for t in tokens]
    types[300:303] = [gguf.TokenType.CONTROL] * 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
