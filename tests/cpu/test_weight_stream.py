"""Streamed weights are the file's bytes, in whatever order they are taken; what can't be read is told to the taker."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from septet.errors import ModelFileError
from septet.hub.model_config import read_model_config
from septet.kernels.reference import ReferenceOps
from septet.weights import load, stream
from septet.weights.load import open_source
from septet.weights.names import build_order
from septet.weights.stream import Span, WeightStream
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, bytes]:
    data = random.Random(3).randbytes(50_000)
    (tmp_path / "weights").write_bytes(data)
    return tmp_path / "weights", data


def cut(path: Path, n: int, total: int) -> list[Span]:
    """n spans side by side, of all sizes, none of them aligned."""
    marks = [0, *sorted(random.Random(n).sample(range(1, total), n - 1)), total]
    return [Span(str(i), path, marks[i], marks[i + 1] - marks[i]) for i in range(n)]


@pytest.mark.parametrize("ahead", [1, 3000, 1 << 30])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_order_gives_the_files_bytes(
    file: tuple[Path, bytes], ahead: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", 700)
    path, data = file
    spans = cut(path, 40, len(data))
    for order in (list(spans), list(reversed(spans)), random.Random(1).sample(spans, 40)):
        source = WeightStream(spans, CPU, threads, ahead=ahead)
        for span in order:
            assert span.name in source
            assert source.take(span.name).numpy().tobytes() == data[span.offset : span.offset + span.n_bytes]
            assert span.name not in source
        assert source.bytes_read == len(data)
        source.close()


def test_no_more_is_read_ahead_than_asked(file: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE", 700)
    path, _ = file
    spans = [Span(str(i), path, 1000 * i, 1000) for i in range(50)]
    source = WeightStream(spans, CPU, 2, ahead=5000)
    source.take("0")
    source.take("49")  # out of turn: at once
    with source._change:
        source._change.wait_for(lambda: source._waiting == 5000 and not source._open, timeout=10)
    assert source._waiting == 5000
    source.close()
    assert source.bytes_read <= 7000


def test_a_file_that_ends_early_is_told(file: tuple[Path, bytes]) -> None:
    path, data = file
    source = WeightStream([Span("a", path, len(data) - 10, 11)], CPU, 2)
    with pytest.raises(ModelFileError, match="ended early"):
        source.take("a")
    source.close()


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    source = WeightStream([Span("a", tmp_path / "gone", 0, 11)], CPU, 1)
    with pytest.raises((ModelFileError, FileNotFoundError)):
        source.take("a")
    source.close()


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_checkpoint_is_the_mapped_one(
    form: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All matrices of a tiny Llama, q and k reordered where GGUF has them interleaved."""
    path = tiny.build("llama", tmp_path / "hf")
    if form == "gguf":
        path = tiny.to_gguf(path, tmp_path / "model.gguf", "Q8_0")
    config = read_model_config(path)
    mapped = open_source(path, config, ReferenceOps(), CPU, dtype)
    monkeypatch.setattr(load, "_streamed", lambda spans, device: WeightStream([s for _, s in spans], device, 2))
    streamed = open_source(path, config, ReferenceOps(), CPU, dtype)
    for name, (_, shape) in mapped.inventory.known.items():  # type: ignore[attr-defined]
        if len(shape) > 1:
            want, got = mapped.matrix(name, shape), streamed.matrix(name, shape)
            assert got.tensors.keys() == want.tensors.keys()
            assert all(torch.equal(got.tensors[key], want.tensors[key]) for key in want.tensors)
        else:
            assert torch.equal(streamed.vector(name, shape), mapped.vector(name, shape))
    streamed.finish()


def test_weights_are_sent_in_the_order_of_a_decoder() -> None:
    names = ["lm_head.weight", "model.layers.10.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    names += ["model.norm.weight", "model.layers.2.self_attn.v_proj.weight", "model.embed_tokens.weight", "odd.weight"]
    assert [name.split(".")[-2] for name in sorted(names, key=build_order)] == [
        "embed_tokens",
        "v_proj",
        "down_proj",
        "q_proj",
        "lm_head",
        "norm",
        "odd",
    ]
