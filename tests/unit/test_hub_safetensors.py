"""Checkpoint directories in safetensors: what is listed, and what is refused before the library sees it."""

from __future__ import annotations

import json
import os
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from septet.errors import ModelFileError, ModelNotFound
from septet.hub import safetensors as module
from septet.hub.safetensors import SafetensorsDir, TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

SOUND = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def encode(header: Any, data: bytes = b"\0" * 32) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def single(path: Path, raw: bytes) -> Path:
    (path / "model.safetensors").write_bytes(raw)
    return path


def sharded(path: Path, weight_map: Any, shards: dict[str, bytes]) -> Path:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, raw in shards.items():
        (path / name).write_bytes(raw)
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        SafetensorsDir.open(path)
    assert str(path) not in str(caught.value)
    assert len(str(caught.value)) < 500


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


def test_single_file(tmp_path: Path) -> None:
    with SafetensorsDir.open(single(tmp_path, encode(SOUND))) as checkpoint:
        assert checkpoint.tensors == {
            "a": TensorInfo((2, 3), "F32", "model.safetensors"),
            "b": TensorInfo((4,), "BF16", "model.safetensors"),
        }
        with pytest.raises(ModelFileError, match="no tensor 'c'"):
            checkpoint.load("c")


def test_shards(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    b = {"b": {"dtype": "F16", "shape": [16], "data_offsets": [0, 32]}}
    sharded(tmp_path, {"a": first, "b": second}, {first: encode(one()), second: encode(b)})
    tensors = SafetensorsDir.open(tmp_path).tensors
    assert {name: info.file for name, info in tensors.items()} == {"a": first, "b": second}


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "claims"),
    "short": (b"\1\0\0", "claims"),
    "header past the end": (struct.pack("<Q", 2**63) + b"{}", "truncated or damaged"),
    "not JSON": (encode(b"{nope"), "not valid JSON"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (encode([1]), "JSON object"),
    "deep": (encode(b'{"a":' * 200_000), "not valid JSON|too deeply"),
    "NaN": (encode(b'{"a": NaN}'), "NaN"),
    "huge number": (encode(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "entry": (encode({"a": 3}), "not an object"),
    "no dtype": (encode({"a": {"shape": [1], "data_offsets": [0, 4]}}), "unknown dtype"),
    "dtype": (encode(one(dtype="F7")), "unknown dtype 'F7'"),
    "dtype list": (encode(one(dtype=["F32"])), "unknown dtype"),
    "negative": (encode(one(shape=[-2, -3])), "impossible shape"),
    "fraction": (encode(one(shape=[2.0, 3])), "impossible shape"),
    "flag": (encode(one(shape=[True, 6])), "impossible shape"),
    "dimensions": (encode(one(shape=[1] * 100)), "impossible shape"),
    "product": (encode(one(shape=[2**40, 2**40])), "is .* bytes, not 24"),
    "mismatch": (encode(one(shape=[2, 4])), "is 32 bytes, not 24"),
    "offsets backwards": (encode(one(data_offsets=[24, 0])), "impossible offsets"),
    "offsets negative": (encode(one(data_offsets=[-24, 0])), "impossible offsets"),
    "offsets three": (encode(one(data_offsets=[0, 12, 24])), "impossible offsets"),
    "offsets huge": (encode(one(data_offsets=[2**63, 2**63 + 24])), "impossible offsets"),
    "out of range": (encode(one(data_offsets=[9, 33])), "ends 1 bytes past the end"),
    "data cut": (encode(SOUND, b"\0" * 31), "'b' ends 1 bytes past the end"),
    "overlap": (encode({**one(), "b": one(data_offsets=[8, 32])["a"]}), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, case: str) -> None:
    raw, words = BAD_HEADERS[case]
    refused(single(tmp_path, raw), words)


def test_header_and_entry_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**30) + b"{")
    os.truncate(path, 2**31)  # sparse: the claim is true, and still too much
    start = time.process_time()
    refused(tmp_path, "at most 33554432 are accepted")
    assert time.process_time() - start < 0.5
    monkeypatch.setattr(module, "MAX_TENSORS", 1)
    refused(single(tmp_path, encode({**one(), "b": one()["a"]})), "2 tensors; at most 1")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors",
     "C:x.safetensors", "x\0.safetensors", "x\n.safetensors", "x.bin", "", "..", "x" * 300 + ".safetensors", 7, None],
)  # fmt: skip
def test_shard_names_must_be_plain(tmp_path: Path, name: Any) -> None:
    refused(sharded(tmp_path, {"a": name}, {}), "plain .safetensors file name")


def test_index_must_fit_its_shards(tmp_path: Path) -> None:
    shard = "model-1.safetensors"
    refused(sharded(tmp_path, [], {}), "weight_map")
    refused(sharded(tmp_path, {}, {}), "weight_map")
    refused(sharded(tmp_path, {"a": shard}, {}), "model-1.safetensors is missing")
    refused(sharded(tmp_path, {"a": shard, "z": shard}, {shard: encode(one())}), "places 'z' in model-1.safetensors")
    refused(sharded(tmp_path, {"z": shard}, {shard: encode(one())}), "holds the tensor 'a'")


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(encode(SOUND))
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "model.safetensors").symlink_to(outside)
    refused(inside, "leads out")
    (inside / "model.safetensors").unlink()
    (inside / "real.safetensors").write_bytes(encode(SOUND))
    (inside / "model.safetensors").symlink_to("real.safetensors")
    assert set(SafetensorsDir.open(inside).tensors) == {"a", "b"}


def test_a_hugging_face_snapshot_links_to_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(encode(SOUND))
    snapshot = tmp_path / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert set(SafetensorsDir.open(snapshot).tensors) == {"a", "b"}


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    refused(tmp_path, "neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(tmp_path, "never loaded: convert them to safetensors")
    with pytest.raises(ModelNotFound):
        SafetensorsDir.open(tmp_path / "nowhere")


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_sound_checkpoint_or_a_typed_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(encode(SOUND))
    for at, value in flips:
        raw[at % len(raw)] = value
    try:
        tensors = SafetensorsDir.open(single(tmp_path, bytes(raw))).tensors
    except ModelFileError:
        return
    assert all(isinstance(info, TensorInfo) for info in tensors.values())
