"""Sizes come from arithmetic, and a refusal shows its sums."""

from __future__ import annotations

import pytest

from septet.config import EngineConfig, ModelConfig
from septet.engine.sizing import resolve_sizes
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import activation_bytes, flops_per_token, kv_bytes_per_token, parameter_count, weight_bytes

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    max_position=131072,
)
GIB = 1 << 30


def test_geometry_of_a_known_model() -> None:
    assert parameter_count(LLAMA_8B) == 8_030_261_248  # the published count of Llama 3.1 8B
    assert weight_bytes(LLAMA_8B, "bfloat16") == 2 * 8_030_261_248
    assert kv_bytes_per_token(LLAMA_8B, "bfloat16") == 128 * 1024  # 2 * 32 * 8 * 128 * 2
    embedding = 128256 * 4096
    assert flops_per_token(LLAMA_8B) == 2 * (8_030_261_248 - embedding)
    assert flops_per_token(LLAMA_8B, context=1000) - flops_per_token(LLAMA_8B) == 4 * 32 * 32 * 128 * 1000


def sizes(free_gib: float, **settings: object):
    engine = EngineConfig(model="x", **settings)  # type: ignore[arg-type]
    weights = weight_bytes(LLAMA_8B, "bfloat16")
    return resolve_sizes(engine, LLAMA_8B, device="cuda", dtype="bfloat16", weights=weights, free=int(free_gib * GIB))


def test_the_pool_fills_what_is_left() -> None:
    got = sizes(79)
    spent = weight_bytes(LLAMA_8B, "bfloat16") + activation_bytes(LLAMA_8B, 8192, 256, "bfloat16")
    pool = got.num_kv_slots * kv_bytes_per_token(LLAMA_8B, "bfloat16")
    assert spent + pool < 79 * GIB * 0.9
    assert spent + pool > 79 * GIB * 0.9 - 3 * GIB  # nothing large is left over
    assert got.max_model_len == 131072


def test_length_shrinks_to_the_pool_and_says_so() -> None:
    got = sizes(32)
    assert got.max_model_len == got.num_kv_slots < 131072
    assert any(name == "max_model_len" and "reduced" in why for name, _, why in got.choices)


def test_a_length_that_can_not_fit_is_refused_with_the_sums() -> None:
    with pytest.raises(OutOfMemory, match=r"max_model_len 100000 needs 12500 MiB.*Lower --max-model-len"):
        sizes(24, max_model_len=100000)


def test_a_pool_too_small_for_anything_is_refused_with_the_models_length() -> None:
    with pytest.raises(OutOfMemory, match=r"would hold 0 tokens .* max_model_len 131072 needs 16384 MiB"):
        sizes(79, kv_cache_memory=1000)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_model_len": 200_000}, "max_model_len"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
        ({"memory_utilization": 1.5}, "memory_utilization"),
        ({"memory_utilization": float("nan")}, "memory_utilization"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sizes(79, **settings)
    assert caught.value.param == named


def test_settings_as_asked_are_kept() -> None:
    got = sizes(79, max_num_seqs=7, max_num_batched_tokens=100, num_kv_slots=5000, max_model_len=4000)
    assert (got.max_num_seqs, got.max_num_batched_tokens, got.num_kv_slots, got.max_model_len) == (7, 100, 5000, 4000)
