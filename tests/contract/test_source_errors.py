"""What a source says of checkpoints that do not fit: the tensor, what was found, what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from septet.errors import ModelFileError, ModelNotFound, UnsupportedModel
from septet.hub.model_config import read_model_config
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.weights.load import open_source
from septet.weights.names import canonical_of_gguf, canonical_of_hf, is_harmless
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from septet.config import ModelConfig

CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("gemma3", tmp_path_factory.mktemp("gemma"))


def edited(source: Path, target: Path, edit: Callable[[State], State]) -> tuple[Path, ModelConfig]:
    """A copy of a checkpoint whose tensors are `edit` of the original's -> (directory, config)."""
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    save_file(edit(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target, read_model_config(source)


def build(path: Path, config: ModelConfig) -> None:
    source = open_source(path, config, ReferenceOps(), CPU, torch.float32)
    load_model(Build(config, ReferenceOps(), source, CPU, torch.float32, 32))


def without(name: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def test_a_missing_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"{Q} is missing.*\[64, 64\]"):
        build(*edited(llama, tmp_path, without(Q)))


def test_another_shape_is_named_with_both(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"q_proj.weight has shape \[32, 64\].*asks for \[64, 64\]"):
        build(*edited(llama, tmp_path, lambda s: {**s, Q: s[Q][:32].clone()}))


def test_a_vector_where_a_matrix_belongs(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"shape \[64\]"):
        build(*edited(llama, tmp_path, lambda s: {**s, Q: s[Q][0].clone()}))


def test_tensors_that_nobody_takes_are_named(llama: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.0.self_attn.{n}_norm.weight": torch.ones(16) for n in "qk"}
    with pytest.raises(ModelFileError, match=r"2 tensors belong to no layer.*k_norm.*q_norm"):
        build(*edited(llama, tmp_path, lambda s: {**s, **extra}))


def test_more_layers_than_the_config_says(llama: Path, tmp_path: Path) -> None:
    def move(state: State) -> State:
        return {**state, **{k.replace("layers.2", "layers.3"): v.clone() for k, v in state.items() if "layers.2" in k}}

    with pytest.raises(ModelFileError, match=r"9 tensors belong to no layer.*layers\.3\..*\.\.\."):
        build(*edited(llama, tmp_path, move))


def test_an_untied_head_must_be_there_and_a_tied_one_may(llama: Path, gemma: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"lm_head.weight is missing"):
        build(*edited(llama, tmp_path, without("lm_head.weight")))
    build(*edited(gemma, tmp_path, lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()}))


def test_the_same_tensor_under_two_names(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'model\.norm\.weight' and 'norm\.weight' are the same|'norm.*'model"):
        build(*edited(llama, tmp_path, lambda s: {**s, "norm.weight": s["model.norm.weight"].clone()}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_safetensors_are_refused(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"q_proj.weight is of type (I8|F8_E4M3)"):
        build(*edited(llama, tmp_path, lambda s: {**s, Q: s[Q].to(dtype)}))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_wrappers_around_the_text_model(prefix: str, gemma: Path, tmp_path: Path) -> None:
    """Multimodal checkpoints, old and new, and a bare trunk: prefixes go, the vision tower is left alone."""
    vision = {"vision_tower.x.weight": torch.ones(1), "model.multi_modal_projector.y": torch.ones(1)}

    def rename(state: State) -> State:
        return {prefix + k.removeprefix("model."): v for k, v in state.items()} | vision

    path, config = edited(gemma, tmp_path, rename)
    build(path, config)
    name = "model.layers.1.self_attn.q_norm.weight"
    got = open_source(path, config, ReferenceOps(), CPU, torch.float32).vector(name, (32,))
    assert torch.equal(got, load_file(gemma / "model.safetensors")[name] + 1)


def test_old_rotary_buffers_are_harmless(llama: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    build(*edited(llama, tmp_path, lambda s: {**s, **extra}))


def test_only_pickled_weights(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFileError, match="pickle"):
        build(tmp_path, read_model_config(llama))


def test_no_such_file(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing\.gguf"):
        build(tmp_path / "nothing.gguf", read_model_config(llama))


# -- GGUF -------------------------------------------------------------------------------------------------------------
def gguf_of(tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]], path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_errors_give_both_names(llama: Path, tmp_path: Path) -> None:
    path = gguf_of({"blk.0.attn_q.weight": (np.zeros((8, 64), np.float32), None)}, tmp_path / "m.gguf")
    source = open_source(path, read_model_config(llama), ReferenceOps(), CPU, torch.float32)
    with pytest.raises(ModelFileError, match=rf"blk\.0\.attn_q\.weight \({Q}\) has shape \[8, 64\].*\[64, 64\]"):
        source.matrix(Q, (64, 64))
    with pytest.raises(ModelFileError, match=r"m\.gguf: the tensor model.embed_tokens.weight is missing"):
        source.matrix("model.embed_tokens.weight", (320, 64))


def test_gguf_leftovers_are_named_as_in_the_file(llama: Path, tmp_path: Path) -> None:
    one = (np.zeros((8, 64), np.float32), None)
    tensors = {"blk.0.ffn_gate_exps.weight": one, "blk.7.attn_q.weight": one, "rope_freqs.weight": one}
    source = open_source(
        gguf_of(tensors, tmp_path / "m.gguf"), read_model_config(llama), ReferenceOps(), CPU, torch.float32
    )
    with pytest.raises(ModelFileError, match=r"2 tensors.*'blk.0.ffn_gate_exps.weight', 'blk.7.attn_q.weight'"):
        source.finish()


def test_gguf_of_an_unknown_block_type(llama: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.TQ2_0
    values = gguf.quants.quantize(np.zeros((64, 256), np.float32), kind)
    path = gguf_of({"blk.0.attn_q.weight": (values, kind)}, tmp_path / "m.gguf")
    source = open_source(path, read_model_config(llama), ReferenceOps(), CPU, torch.float32)
    with pytest.raises(UnsupportedModel, match="TQ2_0"):
        source.matrix(Q, (64, 256))


# -- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_names_are_those_of_the_gguf_package(arch: str, llama: Path, gemma: Path) -> None:
    """Every name that its map knows for the architecture and that our layers ask for, in both directions."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 12)
    modules = {
        k.removesuffix(".weight") for k in load_file((gemma if arch == "gemma3" else llama) / "model.safetensors")
    }
    if arch == "qwen3":
        modules |= {"model.layers.11.self_attn.q_norm", "model.layers.11.self_attn.k_norm"}
    for module in modules:
        for leaf in ("weight", "bias"):
            assert canonical_of_gguf(f"{names.get_name(module)}.{leaf}", arch) == f"{module}.{leaf}"


@pytest.mark.parametrize(
    "name",
    ["blk.00.attn_q.weight", "blk.0.attn_q.weight.x", "blk..attn_q.weight", "token_embd", "blk.0.nothing.weight"],
)
def test_names_out_of_the_format_stay_as_they_are(name: str) -> None:
    assert canonical_of_gguf(name, "llama") == name


def test_harmless_is_a_short_list() -> None:
    assert is_harmless("lm_head.weight", tied=True)
    assert not is_harmless("lm_head.weight", tied=False)
    assert not is_harmless("model.layers.0.self_attn.rotary_emb.inv_freq.x", tied=True)
    assert not is_harmless("my_vision_tower.weight", tied=True)
    assert canonical_of_hf("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_of_hf("embed_tokens.weight") == "model.embed_tokens.weight"
    assert canonical_of_hf("transformer.h.0.attn.weight") == "transformer.h.0.attn.weight"
