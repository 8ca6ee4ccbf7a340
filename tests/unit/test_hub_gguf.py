"""The GGUF reader against files of the gguf package, and against every kind of bad file."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from septet.errors import ModelFileError, ModelNotFound, UnsupportedModel
from septet.geometry import BLOCKS
from septet.hub import gguf as reader
from septet.hub.gguf import GGUFFile

if TYPE_CHECKING:
    from pathlib import Path

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def tensor(name: str, ne: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def build(kvs: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, align: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(kvs)) + b"".join(kvs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


def opened(tmp_path: Path, raw: bytes) -> GGUFFile:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    return GGUFFile.open(path)


def refused(tmp_path: Path, raw: bytes, words: str) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        opened(tmp_path, raw)
    assert str(tmp_path) not in str(caught.value)
    assert "bad.gguf" in str(caught.value)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_bool("yes", True)
    writer.add_int64("negative", -(2**40))
    writer.add_array("tokens", ["a", "", "čč", "<|x|>"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    blocks = np.arange(2 * 36, dtype=np.uint8).reshape(2, 36)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_writes(sound: Path) -> None:
    with GGUFFile.open(sound) as file:
        meta = file.metadata
        assert meta["general.architecture"] == "llama"
        assert meta["llama.block_count"] == 2
        assert meta["negative"] == -(2**40)
        assert meta["yes"] is True
        assert meta["flags"] == [True, False]
        assert meta["tokens"] == ["a", "", "čč", "<|x|>"]
        assert meta["types"] == [1, 2, 3]
        assert meta["scores"] == [0.5, -1.0]
        a, b, q = (file.tensors[name] for name in "abq")
        assert (a.shape, a.kind, a.n_bytes) == ((3, 4), "F32", 48)
        assert (b.shape, b.kind, b.n_bytes) == ((5,), "F16", 10)
        assert (q.shape, q.kind, q.n_bytes) == ((2, 64), "Q4_0", 72)
        assert np.frombuffer(file.data(a), np.float32).tolist() == list(range(12))
        assert bytes(file.data(q)) == bytes(range(72))
        assert file.data(a).readonly


def test_views_outlive_the_file(sound: Path) -> None:
    file = GGUFFile.open(sound)
    view = file.data(file.tensors["a"])
    file.close()
    assert view[:4] == b"\0\0\0\0"


def test_a_header_is_parsed_once_for_all_who_have_the_file_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(build([u32("a", 1)], []))
    with GGUFFile.open(path) as first, GGUFFile.open(path) as second:
        assert second.metadata is first.metadata
        assert second.tensors is first.tensors
        path.with_suffix(".new").write_bytes(build([u32("a", 2)], []))
        path.with_suffix(".new").replace(path)
        with GGUFFile.open(path) as changed:
            assert (first.metadata["a"], changed.metadata["a"]) == (1, 2)
    assert not reader._headers
    with GGUFFile.open(path) as again:
        assert again.metadata == {"a": 2}


def test_block_table_agrees_with_the_gguf_package() -> None:
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: sizes[name] for name in BLOCKS} == BLOCKS
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType}.items() <= reader._KINDS.items()


def test_version_2_and_other_alignments_are_read(tmp_path: Path) -> None:
    raw = build([u32("general.alignment", 64)], [tensor("t", (4,))], b"\1" * 16, version=2, align=64)
    file = opened(tmp_path, raw)
    assert file.tensors["t"].offset % 64 == 0
    assert bytes(file.data(file.tensors["t"])) == b"\1" * 16


@pytest.mark.parametrize("type_id", [16, 39, 4, 77, 2**31])
def test_a_kind_we_cannot_read_is_named_when_its_data_is_asked_for(tmp_path: Path, type_id: int) -> None:
    file = opened(tmp_path, build([], [tensor("exotic", (256,), type_id)], b"\0" * 64))
    with pytest.raises(UnsupportedModel, match=r"'exotic'.*supported are F32, .*IQ4_XS"):
        file.data(file.tensors["exotic"])


def test_not_there_and_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.gguf"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="regular file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="regular file"):
        GGUFFile.open(tmp_path / "pipe.gguf")


HEADER = b"GGUF" + struct.pack("<I", 3)
F32_TENSOR = tensor("t", (4,))


BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "magic": (b"PK\3\4" + b"\0" * 60, "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many key-values": (HEADER + struct.pack("<QQ", 0, 2**63), "key-values"),
    "many tensors": (HEADER + struct.pack("<QQ", 2**40, 0), "tensors"),
    "key length": (HEADER + struct.pack("<QQQ", 0, 1, 2**62) + b"x" * 20, "key 0 claims"),
    "string length": (build([kv("k", STRING, struct.pack("<Q", 2**27))], []), "truncated"),
    "array length": (build([kv("k", ARRAY, struct.pack("<IQ", U64, 2**22))], []), "truncated"),
    "array beyond cap": (build([kv("k", ARRAY, struct.pack("<IQ", U64, 2**61))], []), "claims 2305843009213693952"),
    "string array length": (build([kv("k", ARRAY, struct.pack("<IQ", STRING, 2**22))], []), "truncated"),
    "string in array": (
        build([kv("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**60))], []),
        "string 0 of .* runs past",
    ),
    "nested array": (build([kv("k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))], []), "array of arrays"),
    "unknown type": (build([kv("k", 13, b"\0" * 8)], []), "unknown type 13"),
    "unknown element type": (build([kv("k", ARRAY, struct.pack("<IQ", 99, 1))], []), "unknown type 99"),
    "boolean": (build([kv("k", BOOL, b"\2")], []), "neither 0 nor 1"),
    "not UTF-8": (build([kv("k", STRING, text(b"\xff\xfe"))], []), "not UTF-8"),
    "key not UTF-8": (build([text(b"\xff") + struct.pack("<IB", 0, 0)], []), "not UTF-8"),
    "token not UTF-8": (build([kv("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))], []), "string 0"),
    "key twice": (build([u32("k", 1), u32("k", 2)], []), "'k' appears twice"),
    "tensor twice": (build([], [F32_TENSOR, tensor("t", (4,), offset=32)], b"\0" * 64), "'t' appears twice"),
    "no dimensions": (build([], [tensor("t", ())]), "0 dimensions"),
    "dimensions": (build([], [tensor("t", (1, 1, 1, 1, 1))]), "5 dimensions"),
    "many dimensions": (build([], [text("t") + struct.pack("<I", 2**31)]), "2147483648 dimensions"),
    "zero": (build([], [tensor("t", (4, 0))]), "impossible shape"),
    "negative": (build([], [tensor("t", (2**64 - 1,))]), "impossible shape"),
    "product": (build([], [tensor("t", (2**40, 2**24))], b"\0" * 64), "past the end"),
    "overflowing product": (build([], [tensor("t", (2**34, 2**34))], b"\0" * 64), "past the end"),
    "partial block": (build([], [tensor("t", (33,), 2)], b"\0" * 64), "multiple of Q4_0's block"),
    "offset": (build([], [tensor("t", (4,), offset=2**63)], b"\0" * 64), "past the end"),
    "offset wraps": (build([], [tensor("t", (4,), offset=2**64 - 32)], b"\0" * 64), "past the end"),
    "misaligned": (build([], [tensor("t", (4,), offset=8)], b"\0" * 64), "alignment of 32"),
    "overlap": (build([], [tensor("a", (16,)), tensor("b", (4,), offset=32)], b"\0" * 64), "'a' and 'b' overlap"),
    "data cut": (build([], [tensor("t", (16,))], b"\0" * 63), "ends 1 bytes past the end"),
    **{
        f"alignment {n}": (build([u32("general.alignment", n)], []), "power of two")
        for n in (0, 1, 3, 48, 2**17, 2**31)
    },
    "alignment text": (build([kv("general.alignment", STRING, text("32"))], []), "power of two"),
    "alignment list": (
        build([kv("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32))], []),
        "power of two",
    ),
    "alignment float": (build([kv("general.alignment", F32, struct.pack("<f", 32))], []), "power of two"),
    "alignment flag": (build([kv("general.alignment", BOOL, b"\1")], []), "power of two"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    refused(tmp_path, *BAD_FILES[case])


def test_names_out_of_the_file_are_escaped_and_short(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        opened(tmp_path, build([], [tensor("\x1b[31m\n" + "x" * 5000, (0,))]))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_truncation_at_every_byte_is_refused(tmp_path: Path, sound: Path) -> None:
    raw = sound.read_bytes()
    with GGUFFile.open(sound) as file:
        end = max(t.offset + t.n_bytes for t in file.tensors.values())
    for n in range(end):
        with pytest.raises(ModelFileError):
            opened(tmp_path, raw[:n])


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_sound_file_or_a_typed_error(
    tmp_path: Path, sound: Path, flips: list[tuple[int, int]]
) -> None:
    raw = bytearray(sound.read_bytes())
    for at, value in flips:
        raw[at % len(raw)] = value
    try:
        file = opened(tmp_path, bytes(raw))
        for info in file.tensors.values():
            assert len(file.data(info)) == info.n_bytes
    except (ModelFileError, UnsupportedModel):
        pass


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=300))
def test_any_bytes_after_the_magic(tmp_path: Path, tail: bytes) -> None:
    with contextlib.suppress(ModelFileError):  # any other exception fails the test
        opened(tmp_path, HEADER + tail)


def test_claimed_counts_cost_no_memory_and_no_time(tmp_path: Path) -> None:
    padding = b"\0" * 2**20
    claims = [
        HEADER + struct.pack("<QQ", 65_536, 65_536) + padding,
        build([kv("k", ARRAY, struct.pack("<IQ", U64, 2**22))], []) + padding,
        build([kv("k", ARRAY, struct.pack("<IQ", STRING, 2**22))], []) + padding,
        build([kv("k", STRING, struct.pack("<Q", 2**27))], []) + padding,
    ]
    for raw in claims:
        path = tmp_path / "claim.gguf"
        path.write_bytes(raw)
        tracemalloc.start()
        start = time.perf_counter()
        try:
            with pytest.raises(ModelFileError):
                GGUFFile.open(path)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert time.perf_counter() - start < 1.0


def test_a_sparse_giant_is_refused_at_the_caps(tmp_path: Path) -> None:
    """A file of a terabyte of zeros costs nothing to make; believing its counts would."""
    path = tmp_path / "sparse.gguf"
    head = HEADER + struct.pack("<QQ", 0, 1) + kv("k", STRING, struct.pack("<Q", 2**38))
    path.write_bytes(head)
    os.truncate(path, 2**40)
    with pytest.raises(ModelFileError, match=r"at most 268435456 are accepted"):
        GGUFFile.open(path)


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    n = 262_144
    payload = struct.pack("<IQ", STRING, n) + b"".join(text(f"token{i}") for i in range(n))
    path = tmp_path / "vocab.gguf"
    path.write_bytes(build([kv("tokens", ARRAY, payload)], []))
    best = 9.0
    for _ in range(3):
        start = time.process_time()  # not wall time: other tests may share the cores
        with GGUFFile.open(path) as file:
            assert file.metadata["tokens"][-1] == f"token{n - 1}"
        best = min(best, time.process_time() - start)
    assert best < 0.5
