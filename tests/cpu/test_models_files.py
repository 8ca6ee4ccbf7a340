"""The whole way from a file to logits: config, weights and model of safetensors and GGUF against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from septet.hub.model_config import read_model_config
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.weights.load import open_source
from tests import tiny
from tests.forward import Harness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from septet.kernels.ops import Ops

IDS = torch.arange(80).mul(37).remainder(256).tolist()


class BlockOps(ReferenceOps):
    block_kinds = frozenset({"Q8_0", "Q4_0"})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(request.param, tmp_path_factory.mktemp(request.param))


def harness(path: Path, ops: Ops | None = None) -> Harness:
    config, ops, device = read_model_config(path), ops or ReferenceOps(), torch.device("cpu")
    source = open_source(path, config, ops, device, torch.float32)
    return Harness(load_model(Build(config, ops, source, device, torch.float32, 256)), config)


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_files_give_the_logits_of_transformers(checkpoint: Path, tmp_path: Path, form: str) -> None:
    path = checkpoint if form == "safetensors" else tiny.to_gguf(checkpoint, tmp_path / "tiny.gguf")
    with torch.inference_mode():
        want = reference(checkpoint)(torch.tensor([IDS])).logits[0]
    assert len(set(want.argmax(-1).tolist())) > 10, "the reference is too uniform to show a difference"
    got = harness(path).step({0: IDS})[0]
    # 1e-4, and less where the family's logits are flatter than one unit, so that the bound always says as much.
    torch.testing.assert_close(got, want, atol=1e-4 * min(1.0, want.std().item()), rtol=0.0)
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_multiply_as_their_dense_weights(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """Weights that stay blocks (merged by rows, tied to the head) and the same made dense at load."""
    path = tiny.to_gguf(checkpoint, tmp_path / "tiny.gguf", kind)
    packed, dense = harness(path, BlockOps()), harness(path)
    assert packed.model.layers[0].attention.qkv.weights[0].scheme.name != "dense"  # type: ignore[attr-defined]
    got, want = packed.step({0: IDS})[0], dense.step({0: IDS})[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0.0)
    with torch.inference_mode():
        exact = reference(checkpoint)(torch.tensor([IDS])).logits[0]
    # Near the unquantised model, yet not it: unrelated logits of this spread differ by 1.13 standard deviations.
    assert 1e-3 < (got - exact).abs().mean() / exact.std() < {"Q8_0": 0.1, "Q4_0": 0.8}[kind]
