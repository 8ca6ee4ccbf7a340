"""A bounded reader of GGUF files (versions 2 and 3, little-endian): metadata, tensor table, raw bytes of tensors.

Called by the hub (`model_config`), the tokenizer and the weight loader. The file is hostile until proven sound: no
count is believed before it is held against the bytes that are left, so a bad file costs no more time and memory than
its size (and never more than the caps below). Knows no torch, no numpy and no model; tensor bytes are never read here.
Source: docs/gguf.md of ggml. Layout: magic, version, n_tensors, n_kv | key-values | tensor table | padding | data.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from septet.errors import ModelFileError, ModelNotFound, UnsupportedModel
from septet.geometry import BLOCKS
from septet.hub.facts import shown

__all__ = ["GGUFFile", "TensorInfo"]

MAX_HEADER_BYTES = 256 * 2**20  # everything before the tensor data
MAX_ENTRIES = 65_536  # key-values, and tensors, each
MAX_ARRAY_ELEMENTS = 2**22  # all arrays of a file together; the largest known vocabularies need about 1.3 million
MAX_KEY_BYTES = 65_535  # of the format's specification
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 65_536

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: ("UINT8", "B"),
    1: ("INT8", "b"),
    2: ("UINT16", "H"),
    3: ("INT16", "h"),
    4: ("UINT32", "I"),
    5: ("INT32", "i"),
    6: ("FLOAT32", "f"),
    _BOOL: ("BOOL", "B"),
    10: ("UINT64", "Q"),
    11: ("INT64", "q"),
    12: ("FLOAT64", "d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_KINDS = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"))),
    **dict(enumerate(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), start=10)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), start=16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), start=24)),
    **dict(enumerate(("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0"), start=31)),
    **dict(enumerate(("IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4", "NVFP4", "Q1_0"), start=36)),
}
"""GGML type id -> name, as ggml.h lists them. Only those in `geometry.BLOCKS` can be read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` is row-major as torch sees it: the reverse of GGUF's `ne`."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "F32", "Q4_0", ...; see geometry.BLOCKS for those that can be read
    offset: int  # bytes from the start of the file
    n_bytes: int  # 0 where Septet doesn't know the kind


class _Header:
    """What stands before the tensors' bytes."""

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        cursor = _Cursor(name, mapping)
        n_tensors, n_kv = _read_counts(cursor)
        self.metadata: dict[str, Any] = _read_metadata(cursor, n_kv)
        self.alignment = _alignment(name, self.metadata)
        table = _read_table(cursor, n_tensors)
        self.tensors: dict[str, TensorInfo] = _place(name, table, cursor.pos, self.alignment, len(mapping))


_headers: WeakValueDictionary[tuple[int, ...], _Header] = WeakValueDictionary()
"""Of the files that are open, by identity and time of change: a vocabulary takes a while to read. Never changed."""


class GGUFFile:
    """An open file: `metadata` (arrays as lists), `tensors` by name, and `data` over a read-only mapping.

    Both are for reading: whoever opens the file while it is open shares them. A context manager. Views that `data` gave
    out stay valid after `close`; the mapping ends with the last of them.
    """

    def __init__(self, name: str, mapping: mmap.mmap, header: _Header | None = None) -> None:
        self.name = name  # of the file, without its directory: for messages
        self._map = mapping
        header = header or _Header(name, mapping)
        self.metadata, self.tensors, self.alignment = header.metadata, header.tensors, header.alignment
        self._header: _Header | None = header

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map and parse the header. ModelNotFound: no such file; ModelFileError: not a sound GGUF file."""
        path = Path(path)
        mapping, identity = _map_file(path)
        try:
            header = _headers.get(identity) or _Header(path.name, mapping)
            _headers[identity] = header
            return cls(path.name, mapping, header)
        except BaseException:
            mapping.close()
            raise

    def data(self, info: TensorInfo) -> memoryview:
        """The tensor's bytes as they lie in the file, read-only, not copied. UnsupportedModel for an unknown kind."""
        if info.kind not in BLOCKS:
            raise UnsupportedModel(
                f"{self.name}: tensor {shown(info.name)} is of type {info.kind}, which Septet can't read; "
                f"supported are {', '.join(BLOCKS)}"
            )
        return memoryview(self._map)[info.offset : info.offset + info.n_bytes]

    def close(self) -> None:
        self._header = None
        with contextlib.suppress(BufferError):  # views are alive: the mapping ends with the last of them
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_file(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """-> (mapping, which file in which state)"""
    try:
        info = path.stat()  # before opening: a pipe would block, a device might never end
        if not stat.S_ISREG(info.st_mode):
            raise ModelFileError(f"{path.name} is not a regular file")
        if info.st_size < 24:
            raise ModelFileError(f"{path.name} is not a GGUF file: {info.st_size} bytes are less than its header")
        with path.open("rb") as file:
            now = os.fstat(file.fileno())
            identity = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), identity
    except FileNotFoundError:
        raise ModelNotFound(f"no such file: {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"can't read {path.name}: {getattr(error, 'strerror', None) or error}") from None


class _Cursor:
    """A position in the header. Every read is held against `end` before it allocates."""

    def __init__(self, name: str, mapping: mmap.mmap) -> None:
        self.name = name
        self.buffer = mapping
        self.pos = 0
        self.end = min(len(mapping), MAX_HEADER_BYTES)
        self.elements_left = MAX_ARRAY_ELEMENTS

    def bad(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.name}: {what}")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes <= self.end - self.pos:
            return
        if self.end < len(self.buffer):
            raise self.bad(f"{what} would run past {MAX_HEADER_BYTES >> 20} MiB of metadata, the most Septet accepts")
        raise self.bad(f"{what} needs {n_bytes} bytes, {self.end - self.pos} are left: truncated or damaged")

    def u32(self, what: str) -> int:
        self.need(4, what)
        self.pos += 4
        return _U32.unpack_from(self.buffer, self.pos - 4)[0]

    def u64(self, what: str) -> int:
        self.need(8, what)
        self.pos += 8
        return _U64.unpack_from(self.buffer, self.pos - 8)[0]

    def text(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(f"the length of {what}")
        if length > max_bytes:
            raise self.bad(f"{what} claims {length} bytes; at most {max_bytes} are accepted")
        self.need(length, what)
        start, self.pos = self.pos, self.pos + length
        try:
            return str(self.buffer[start : self.pos], "utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what)
        return self._numbers(kind, 1, what)[0]

    def _array(self, what: str) -> list[Any]:
        kind = self.u32(f"the element type of {what}")
        count = self.u64(f"the length of {what}")
        if kind == _ARRAY:
            raise self.bad(f"{what} is an array of arrays, which no supported model has")
        if count > self.elements_left:
            raise self.bad(f"{what} claims {count} elements; a file may have {MAX_ARRAY_ELEMENTS} in all its arrays")
        self.elements_left -= count
        return self._texts(count, what) if kind == _STRING else self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> list[Any]:
        if kind not in _SCALARS:
            raise self.bad(f"{what} has the unknown type {kind}")
        code = _SCALARS[kind][1]
        n_bytes = count * struct.calcsize(code)
        self.need(n_bytes, what)
        values = list(struct.unpack_from(f"<{count}{code}", self.buffer, self.pos))
        self.pos += n_bytes
        if kind != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise self.bad(f"{what} is a boolean that is neither 0 nor 1")
        return [value == 1 for value in values]

    def _texts(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)
        buffer, pos, end, length_at = self.buffer, self.pos, self.end, _U64.unpack_from
        texts: list[str] = []
        for i in range(count):  # a vocabulary has hundreds of thousands: no call per string
            start = pos + 8
            if start > end or (pos := start + length_at(buffer, pos)[0]) > end:
                raise self.bad(f"string {i} of {what} runs past the end: truncated, damaged or too large")
            try:
                texts.append(str(buffer[start:pos], "utf-8"))
            except UnicodeDecodeError:
                raise self.bad(f"string {i} of {what} is not UTF-8") from None
        self.pos = pos
        return texts


def _read_counts(header: _Cursor) -> tuple[int, int]:
    """-> (n_tensors, n_kv)."""
    magic = header.buffer[:4]
    if magic != b"GGUF":
        raise header.bad(f"not a GGUF file (it starts with {magic!r})")
    header.pos = 4
    version = header.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise header.bad("a big-endian GGUF file; convert it to little-endian")
    if version not in (2, 3):
        raise header.bad(f"GGUF version {version}; Septet reads 2 and 3 (convert the model again)")
    n_tensors, n_kv = header.u64("the number of tensors"), header.u64("the number of key-values")
    for count, what in ((n_tensors, "tensors"), (n_kv, "key-values")):
        if count > MAX_ENTRIES:
            raise header.bad(f"claims {count} {what}; at most {MAX_ENTRIES} are accepted")
    return n_tensors, n_kv


def _read_metadata(header: _Cursor, n_kv: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_kv):
        key = header.text(f"key {i}", MAX_KEY_BYTES)
        if key in metadata:
            raise header.bad(f"key {shown(key)} appears twice")
        what = f"the value of {shown(key)}"
        metadata[key] = header.value(header.u32(f"the type of {shown(key)}"), what)
    return metadata


def _alignment(name: str, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        rule = f"a power of two from 8 to {MAX_ALIGNMENT}"
        raise ModelFileError(f"{name}: general.alignment must be {rule}, not {shown(value)}")
    return value


def _read_table(header: _Cursor, n_tensors: int) -> list[TensorInfo]:
    """The tensor table, offsets still relative to the data section."""
    table = []
    for i in range(n_tensors):
        tensor = header.text(f"the name of tensor {i}", MAX_KEY_BYTES)
        what = f"tensor {shown(tensor)}"
        n_dims = header.u32(f"the rank of {what}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise header.bad(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
        ne = [header.u64(f"the shape of {what}") for _ in range(n_dims)]
        if not all(0 < n < 2**48 for n in ne):
            raise header.bad(f"{what} has the impossible shape {ne}")
        type_id, offset = header.u32(f"the type of {what}"), header.u64(f"the offset of {what}")
        kind = _KINDS.get(type_id, f"unknown ({type_id})")
        n_bytes = _n_bytes(header, what, kind, ne)
        table.append(TensorInfo(tensor, tuple(reversed(ne)), kind, offset, n_bytes))
    return table


def _n_bytes(header: _Cursor, what: str, kind: str, ne: list[int]) -> int:
    if kind not in BLOCKS:
        return 0
    block, block_bytes = BLOCKS[kind]
    if ne[0] % block:
        raise header.bad(f"{what} has rows of {ne[0]} elements, not a multiple of {kind}'s block of {block}")
    n_bytes = ne[0] // block * block_bytes
    for n in ne[1:]:
        n_bytes *= n
    return n_bytes


def _place(name: str, table: list[TensorInfo], header_end: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """Absolute offsets, each held against the alignment, the file's end and its neighbours."""
    start = -(-header_end // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in table:
        what = f"tensor {shown(info.name)}"
        if info.name in tensors:
            raise ModelFileError(f"{name}: {what} appears twice")
        if info.offset % alignment:
            raise ModelFileError(f"{name}: {what} at offset {info.offset} breaks the alignment of {alignment}")
        offset = start + info.offset
        if offset + info.n_bytes > size:
            missing = offset + info.n_bytes - size
            raise ModelFileError(f"{name}: {what} ends {missing} bytes past the end of the file: truncated or damaged")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.kind, offset, info.n_bytes)
    ordered = sorted(tensors.values(), key=lambda info: (info.offset, info.n_bytes))
    for before, after in pairwise(ordered):
        if before.offset + before.n_bytes > after.offset:
            raise ModelFileError(f"{name}: tensors {shown(before.name)} and {shown(after.name)} overlap")
    return tensors
