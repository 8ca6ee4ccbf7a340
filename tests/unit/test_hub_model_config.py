"""What GGUF metadata and config.json say, as a ModelConfig: families, spellings, and numbers that no model has."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from septet.config import ModelConfig, RopeConfig
from septet.errors import ModelFileError, ModelNotFound, SeptetError, UnsupportedModel
from septet.hub.model_config import read_model_config

if TYPE_CHECKING:
    from pathlib import Path

HF = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def hf(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    values = {k: v for k, v in {**HF, **changes}.items() if v is not ...}
    (path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(path)


def make_gguf(path: Path, arch: str, *, tokens: int = 12, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A file with the metadata of a tiny model; a key given as `...` is left out. `__` in a key means a dot."""
    target = path / "tiny.gguf"
    writer = gguf.GGUFWriter(target, arch)
    values = {
        "embedding_length": 64, "feed_forward_length": 128, "block_count": 8, "attention__head_count": 4,
        "attention__head_count_kv": 2, "context_length": 512, "attention__layer_norm_rms_epsilon": 1e-5, **keys,
    }  # fmt: skip
    for key, value in values.items():
        full = key.replace("__", ".")
        full = full if full.startswith(("tokenizer.", "split.")) else f"{arch}.{full}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif value is not ...:
            writer.add_int32(full, value)
    if "tokenizer__ggml__tokens" not in keys:
        writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(tokens)])
    for name, shape in {"token_embd.weight": (12, 64), **(tensors or {})}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


# -- GGUF -------------------------------------------------------------------------------------------------------------
def test_gguf_llama(tmp_path: Path) -> None:
    path = make_gguf(tmp_path, "llama", rope__freq_base=500_000.0, tokenizer__ggml__bos_token_id=1)
    assert read_model_config(path) == ModelConfig(
        architecture="llama", vocab_size=12, hidden_size=64, intermediate_size=128, num_layers=8, num_heads=4,
        num_kv_heads=2, head_dim=16, norm_eps=1e-5, max_position=512, rope=RopeConfig(theta=500_000.0),
        tie_embeddings=True, attention_scale=0.25, bos_token_id=1, dtype="float32",
    )  # fmt: skip


def test_gguf_reads_biases_and_tying_off_the_tensors(tmp_path: Path) -> None:
    tensors = {"output.weight": (12, 64), "blk.0.attn_q.bias": (64,)}
    config = read_model_config(make_gguf(tmp_path, "qwen2", tensors=tensors, attention__sliding_window=64))
    assert (config.tie_embeddings, config.attention_bias, config.attention_out_bias) == (False, True, False)
    assert config.windows == (None,) * 8  # llama.cpp runs Qwen's files without their window


def test_gguf_gemma3(tmp_path: Path) -> None:
    path = make_gguf(
        tmp_path, "gemma3", attention__key_length=32, attention__value_length=32, attention__sliding_window=16,
        rope__freq_base=1e6, rope__scaling__type="linear", rope__scaling__factor=8.0,
    )  # fmt: skip
    config = read_model_config(path)
    assert config.windows == (16, 16, 16, 16, 16, None, 16, 16)
    assert config.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert config.rope_local == RopeConfig(theta=10_000.0)
    assert config.embedding_scale == 8.0
    assert config.scale == 32**-0.5
    assert config.activation == "gelu_tanh"
    big = make_gguf(tmp_path, "gemma3", block_count=62, attention__key_length=32, attention__value_length=32)
    assert read_model_config(big).scale == (64 / 4) ** -0.5  # the 27B divides by hidden / heads


def test_gguf_window_patterns(tmp_path: Path) -> None:
    def windows(**keys: Any) -> tuple[int | None, ...]:
        return read_model_config(make_gguf(tmp_path, "gemma3", attention__sliding_window=9, **keys)).windows

    assert windows(attention__sliding_window_pattern=2) == (9, None) * 4
    assert windows(attention__sliding_window_pattern=[True] * 7 + [False]) == (9,) * 7 + (None,)
    with pytest.raises(ModelFileError, match="list of 8 booleans"):
        windows(attention__sliding_window_pattern=[True] * 7)


def test_gguf_ends(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_end|>"] + [f"t{i}" for i in range(7)]
    path = make_gguf(
        tmp_path, "llama", tokenizer__ggml__tokens=tokens, tokenizer__ggml__token_type=[3, 3, 3, 3, 1] + [1] * 7,
        tokenizer__ggml__eos_token_id=2, tokenizer__ggml__eot_token_id=7,
    )  # fmt: skip
    assert read_model_config(path).eos_token_ids == (2, 7, 3)  # 4 is ordinary text of the same spelling


GGUF_BAD: dict[str, tuple[dict[str, Any], type[SeptetError], str]] = {
    "architecture": ({"arch": "mamba"}, UnsupportedModel, "'mamba' is not supported; supported are llama, qwen2"),
    "missing": ({"embedding_length": ...}, ModelFileError, "embedding_length is missing"),
    "zero": ({"block_count": 0}, ModelFileError, "block_count must be an integer in"),
    "negative": ({"attention__head_count": -4}, ModelFileError, "attention.head_count must be"),
    "huge": ({"block_count": 2**31 - 1}, ModelFileError, "block_count must be"),
    "text": ({"context_length": "512"}, ModelFileError, "context_length must be .* not '512'"),
    "flag": ({"context_length": True}, ModelFileError, "context_length must be"),
    "float": ({"feed_forward_length": 128.0}, ModelFileError, "feed_forward_length must be"),
    "varying": ({"feed_forward_length": [128, 64]}, ModelFileError, "feed_forward_length must be"),
    "groups": ({"attention__head_count_kv": 3}, ModelFileError, "4 attention heads can't share 3"),
    "heads": ({"attention__head_count": 7, "attention__head_count_kv": 7}, ModelFileError, "no multiple of 7 heads"),
    "odd head": ({"attention__key_length": 15, "attention__value_length": 15}, ModelFileError, "must be even"),
    "value length": ({"attention__value_length": 8}, UnsupportedModel, "value_length 8 differs"),
    "partial rotary": ({"rope__dimension_count": 8}, UnsupportedModel, "rope.dimension_count 8 differs"),
    "yarn": ({"rope__scaling__type": "yarn"}, UnsupportedModel, "'yarn' is not supported"),
    "NaN eps": ({"attention__layer_norm_rms_epsilon": math.nan}, ModelFileError, "epsilon must be a number"),
    "infinite theta": ({"rope__freq_base": math.inf}, ModelFileError, "freq_base must be"),
    "negative theta": ({"rope__freq_base": -1.0}, ModelFileError, "freq_base must be"),
    "shrinking": ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.5}, ModelFileError, "factor must be"),
    "experts": ({"expert_count": 8}, UnsupportedModel, "mixtures of experts"),
    "split": ({"split__count": 3}, UnsupportedModel, "one part of a split model"),
    "vocabulary": ({"tokens": 11}, ModelFileError, "11 tokens in the vocabulary, 12 rows"),
    "tokens": ({"tokenizer__ggml__tokens": "abc"}, ModelFileError, "no list of tokens"),
    "eos": ({"tokenizer__ggml__eos_token_id": 12}, ModelFileError, "eos_token_id 12 lies outside"),
    "eos text": ({"tokenizer__ggml__eos_token_id": "x"}, ModelFileError, "eos_token_id must be"),
    "no table": ({"tensors": {"token_embd.weight": (12,)}}, ModelFileError, "token_embd.weight is missing or no"),
}


@pytest.mark.parametrize("case", GGUF_BAD)
def test_gguf_that_no_model_has(tmp_path: Path, case: str) -> None:
    keys, kind, words = GGUF_BAD[case]
    with pytest.raises(kind, match=words):
        read_model_config(make_gguf(tmp_path, **{"arch": "llama", **keys}))


# -- config.json ------------------------------------------------------------------------------------------------------
def test_directory_llama(tmp_path: Path) -> None:
    config = hf(tmp_path, eos_token_id=[2, 3], torch_dtype="float16", generation={"eos_token_id": 7})
    assert config == ModelConfig(
        architecture="llama", vocab_size=100, hidden_size=64, intermediate_size=128, num_layers=8, num_heads=4,
        num_kv_heads=2, head_dim=16, norm_eps=1e-5, max_position=2048, bos_token_id=1, eos_token_ids=(7, 2, 3),
        dtype="float16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(kind="linear", factor=2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=512),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=512),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(theta=1e6)),
    ],
)
def test_rope_in_both_spellings(tmp_path: Path, changes: dict[str, Any], rope: RopeConfig) -> None:
    assert hf(tmp_path, **changes).rope == rope


def test_windows_of_each_family(tmp_path: Path) -> None:
    assert hf(tmp_path, sliding_window=32).windows == (None,) * 8
    assert hf(tmp_path, model_type="mistral", sliding_window=32).windows == (32,) * 8
    assert hf(tmp_path, model_type="mistral", sliding_window=None).windows == (None,) * 8
    qwen = {"model_type": "qwen2", "sliding_window": 32}
    assert hf(tmp_path, **qwen, use_sliding_window=False, max_window_layers=4).windows == (None,) * 8
    assert hf(tmp_path, **qwen, use_sliding_window=True, max_window_layers=6).windows == (None,) * 6 + (32,) * 2
    types = ["sliding_attention"] * 2 + ["full_attention"] * 6
    assert hf(tmp_path, **qwen, use_sliding_window=True, layer_types=types).windows == (32,) * 2 + (None,) * 6


def test_gemma3_inside_a_multimodal_config(tmp_path: Path) -> None:
    """The published 4B states only what differs from the class's defaults."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    top = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(top))
    config = read_model_config(tmp_path)
    assert (config.architecture, config.num_heads, config.num_kv_heads, config.head_dim) == ("gemma3", 8, 4, 256)
    assert config.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert config.rope_local == RopeConfig(theta=1e4)
    assert config.windows[:6] == (1024,) * 5 + (None,)
    assert (config.tie_embeddings, config.eos_token_ids, config.scale) == (True, (1, 106), 0.0625)


def test_biases_of_each_family(tmp_path: Path) -> None:
    def biases(**changes: Any) -> tuple[bool, bool, bool]:
        config = hf(tmp_path, **changes)
        return config.attention_bias, config.attention_out_bias, config.mlp_bias

    assert biases() == (False, False, False)
    assert biases(attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases(model_type="qwen2") == (True, False, False)
    assert biases(model_type="qwen3", attention_bias=True) == (True, True, False)


HF_BAD: dict[str, tuple[dict[str, Any], type[SeptetError], str]] = {
    "family": ({"model_type": "gpt2"}, UnsupportedModel, "'gpt2' is not supported; supported are llama, mistral"),
    "no family": ({"model_type": ...}, UnsupportedModel, "model_type None"),
    "family list": ({"model_type": ["llama"]}, ModelFileError, "model_type must be a string"),
    "remote code": ({"auto_map": {"AutoModel": "x.Y"}}, UnsupportedModel, "auto_map.*never does"),
    "quantised": ({"quantization_config": {"bits": 4}}, UnsupportedModel, "use a GGUF file"),
    "missing": ({"hidden_size": ...}, ModelFileError, "hidden_size is missing"),
    "zero": ({"num_hidden_layers": 0}, ModelFileError, "num_hidden_layers must be"),
    "negative": ({"vocab_size": -1}, ModelFileError, "vocab_size must be"),
    "huge": ({"intermediate_size": 10**18}, ModelFileError, "intermediate_size must be"),
    "text": ({"hidden_size": "64"}, ModelFileError, "hidden_size must be"),
    "flag": ({"num_attention_heads": True}, ModelFileError, "num_attention_heads must be"),
    "float": ({"hidden_size": 64.5}, ModelFileError, "hidden_size must be"),
    "groups": ({"num_key_value_heads": 3}, ModelFileError, "can't share 3"),
    "division": ({"hidden_size": 66}, ModelFileError, "no multiple of 4 heads"),
    "eps": ({"rms_norm_eps": 5.0}, ModelFileError, "rms_norm_eps must be"),
    "infinite eps": ({"rms_norm_eps": math.inf}, ModelFileError, "Infinity"),
    "activation": ({"hidden_act": "relu"}, UnsupportedModel, "'relu' is not supported"),
    "rope type": ({"rope_scaling": {"type": "yarn", "factor": 4}}, UnsupportedModel, "'yarn' is not supported"),
    "rope text": ({"rope_scaling": "linear"}, ModelFileError, "rope_scaling must be an object"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, ModelFileError, "factor is missing"),
    "rope shrinks": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ModelFileError, "factor must be"),
    "rope order": (
        {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, ModelFileError, "must be below",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, UnsupportedModel, "partial rotary"),
    "dtype": ({"torch_dtype": "float64"}, UnsupportedModel, "'float64' is not supported"),
    "eos": ({"eos_token_id": 100}, ModelFileError, "eos_token_id 100 lies outside"),
    "eos text": ({"eos_token_id": "2"}, ModelFileError, "eos_token_id must be"),
    "layer types": (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
        ModelFileError, "list of 8 names",
    ),
    "layer type": (
        {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["linear_attention"] * 8},
        UnsupportedModel, "'linear_attention' is not supported",
    ),
    "text config": ({"model_type": "gemma3", "text_config": [1]}, ModelFileError, "text_config must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", HF_BAD)
def test_config_that_no_model_has(tmp_path: Path, case: str) -> None:
    changes, kind, words = HF_BAD[case]
    with pytest.raises(kind, match=words):
        hf(tmp_path, **changes)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"holds no config\.json: give a checkpoint's directory"):
        read_model_config(tmp_path)
    with pytest.raises(ModelNotFound, match="nowhere"):
        read_model_config(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="give its directory"):
        read_model_config(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(b" " * (8 * 2**20 + 1))
    with pytest.raises(ModelFileError, match="at most 8388608"):
        read_model_config(tmp_path)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["type", "factor", "rope_type", "full_attention"]), st.text(max_size=8)),
)  # fmt: skip
KEYS = st.sampled_from([*HF, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "eos_token_id",
                        "sliding_window", "use_sliding_window", "tie_word_embeddings", "hidden_act", "text_config",
                        "dtype", "attention_bias", "bos_token_id", "query_pre_attn_scalar"])  # fmt: skip


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text"]),
    junk=st.dictionaries(KEYS, JUNK, min_size=1, max_size=3),
)
def test_junk_values_give_a_checked_config_or_a_typed_error(tmp_path: Path, kind: str, junk: dict[str, Any]) -> None:
    try:
        config = hf(tmp_path, **{"model_type": kind, **junk})
    except (ModelFileError, UnsupportedModel):
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert len(config.windows) == config.num_layers
    assert math.isfinite(config.scale)
    assert config.scale > 0
