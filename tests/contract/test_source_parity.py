"""The same weights through every source give the same tensors, and those are transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import pytest
import torch

from septet.hub.model_config import read_model_config
from septet.kernels.ggml import KINDS
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.quant.gguf import GGUFBlocks
from septet.weights import load
from septet.weights.dummy import DummySource
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from septet.quant.scheme import PackedWeight
    from septet.weights.source import Source

CPU = torch.device("cpu")
F32 = torch.float32


class BlockOps(ReferenceOps):
    """The reference, multiplying every block type as it is."""

    block_kinds = KINDS - {"F32", "F16", "BF16"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny.build(family, root / family) for family in tiny.FAMILIES}


def reference(dir: Path) -> dict[str, torch.Tensor]:
    """Tensors as layers want them, by transformers: Gemma's norms with their 1, nothing that is tied."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(dir, dtype=F32)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    gemma = model.config.model_type == "gemma3_text"
    return {k: v + 1 if gemma and k.endswith("norm.weight") else v for k, v in state.items()}


def open_(path: Path, ops: ReferenceOps | None = None, dtype: torch.dtype = F32) -> Source:
    return load.open_source(path, read_model_config(path), ops or ReferenceOps(), CPU, dtype)


def pull(source: Source, name: str, shape: tuple[int, ...], dtype: torch.dtype = F32) -> torch.Tensor:
    if len(shape) == 1:
        return source.vector(name, shape)
    weight: PackedWeight = source.matrix(name, (shape[0], shape[1]))
    assert weight.shape == shape
    return weight.dequantize(BlockOps(), dtype)


def check_all(source: Source, want: dict[str, torch.Tensor], dtype: torch.dtype = F32) -> None:
    for name, tensor in want.items():
        assert source.has(name)
        got = pull(source, name, tuple(tensor.shape), dtype)
        assert got.dtype == dtype
        assert torch.equal(got, tensor.to(dtype)), name
    source.finish()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_safetensors_single_and_sharded(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    want = reference(checkpoints[family])
    check_all(open_(checkpoints[family]), want)
    sharded = tiny.build(family, tmp_path, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check_all(open_(sharded), want)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gguf_in_float32(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    check_all(open_(tiny.to_gguf(checkpoints[family], tmp_path / "m.gguf")), reference(checkpoints[family]))


def quantised(want: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """What is left of each matrix after `kind`: rows are quantised alone, so their order does not matter."""
    block_type = gguf.GGMLQuantizationType[kind]

    def through(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), block_type), block_type))

    return {k: through(v) if v.dim() == 2 else v for k, v in want.items()}


@pytest.mark.parametrize("ops", [ReferenceOps(), BlockOps()], ids=["dense", "blocks"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gguf_in_q8_0(family: str, ops: ReferenceOps, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.to_gguf(checkpoints[family], tmp_path / "m.gguf", "Q8_0")
    check_all(open_(path, ops), quantised(reference(checkpoints[family]), "Q8_0"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_in_other_types(kind: str, dtype: torch.dtype, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.to_gguf(checkpoints["llama"], tmp_path / "m.gguf", kind)
    want = quantised(reference(checkpoints["llama"]), kind)
    check_all(open_(path, dtype=dtype), want, dtype)


def test_narrow_safetensors_widen_and_wide_ones_are_rounded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    want = reference(checkpoints["qwen2"])
    check_all(open_(checkpoints["qwen2"], dtype=torch.float16), want, torch.float16)
    narrow = tiny.build("qwen2", tmp_path, dtype="bfloat16")
    check_all(open_(narrow), {k: v.bfloat16().float() for k, v in want.items()})


@pytest.mark.parametrize("overrides", [{"attention_bias": True}, {"tie_word_embeddings": True}, {"mlp_bias": True}])
def test_llama_with_biases_or_tied(overrides: dict[str, bool], tmp_path: Path) -> None:
    """Biases of q and k are permuted in GGUF as their matrices are."""
    dir = tiny.build("llama", tmp_path / "hf", **overrides)
    check_all(open_(dir), reference(dir))
    check_all(open_(tiny.to_gguf(dir, tmp_path / "m.gguf")), reference(dir))


def test_rope_factors_come_with_gguf_only(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = open_(tiny.to_gguf(checkpoints["llama3"], tmp_path / "m.gguf", "Q8_0"), dtype=torch.bfloat16)
    factors = source.optional("rope_freqs.weight", (8,))
    assert factors is not None
    assert factors.dtype == F32
    assert factors[0] == 1  # the fastest pair is kept, the slowest is stretched by the whole factor
    assert factors[-1] == 8
    assert open_(checkpoints["llama3"]).optional("rope_freqs.weight", (8,)) is None


def test_blocks_lie_in_the_mapped_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is copied on the CPU, and the views outlive the source."""
    path = tiny.to_gguf(checkpoints["qwen3"], tmp_path / "m.gguf", "Q8_0")
    source = open_(path, BlockOps())
    first, second = (source.matrix("model.layers.0.mlp.up_proj.weight", (128, 64)) for _ in range(2))
    assert first.scheme == GGUFBlocks("Q8_0")
    blocks = first.tensors["blocks"]
    assert blocks.data_ptr() == second.tensors["blocks"].data_ptr()
    before = blocks.clone()
    source.file.close()  # type: ignore[attr-defined]
    del source, second
    assert torch.equal(blocks, before)
    assert before.any()


def test_large_tensors_are_made_dense_in_chunks(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "CHUNK", 640)  # 10 rows of 64, the last chunk is shorter
    seen: list[int] = []

    class Spy(ReferenceOps):
        def dequantize(self, blocks: torch.Tensor, kind: str, dtype: object) -> torch.Tensor:
            seen.append(len(blocks))
            return super().dequantize(blocks, kind, dtype)

    path = tiny.to_gguf(checkpoints["llama"], tmp_path / "m.gguf", "Q8_0")
    check_all(open_(path, Spy()), quantised(reference(checkpoints["llama"]), "Q8_0"))
    assert max(seen) == 10
    check_all(open_(checkpoints["llama"], dtype=torch.bfloat16), reference(checkpoints["llama"]), torch.bfloat16)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dummy_builds_every_family(family: str, checkpoints: dict[str, Path]) -> None:
    config = read_model_config(checkpoints[family])
    source = DummySource(config, CPU, F32, seed=3)
    load_model(Build(config, ReferenceOps(), source, CPU, F32, 64))
    name, shape = "model.layers.1.mlp.up_proj.weight", (128, 64)
    weight = source.matrix(name, shape).tensors["weight"]
    assert 0.018 < weight.std() < 0.022
    assert torch.equal(weight, DummySource(config, CPU, F32, seed=3).matrix(name, shape).tensors["weight"])
    assert not torch.equal(weight, DummySource(config, CPU, F32, seed=4).matrix(name, shape).tensors["weight"])
    assert not torch.equal(weight, source.matrix("model.layers.2.mlp.up_proj.weight", shape).tensors["weight"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_models_take_every_tensor(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Both formats, through the real models: `finish` finds nothing left over."""
    for path in (checkpoints[family], tiny.to_gguf(checkpoints[family], tmp_path / "m.gguf", "Q8_0")):
        config = read_model_config(path)
        source = load.open_source(path, config, BlockOps(), CPU, F32)
        load_model(Build(config, BlockOps(), source, CPU, F32, 64))


def check_real(path: Path) -> None:
    config = read_model_config(path)
    source = load.open_source(path, config, BlockOps(), CPU, torch.bfloat16)
    load_model(Build(config, BlockOps(), source, CPU, torch.bfloat16, 64))


def test_smollm2_is_taken_whole(smollm2_path: Path) -> None:
    check_real(smollm2_path)


def test_gemma3_is_taken_whole(gemma3_path: Path) -> None:
    check_real(gemma3_path)
