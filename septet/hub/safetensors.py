"""A checkpoint directory in safetensors, single or sharded: which tensors it has, and each one when asked for.

Called by the weight loader. The headers are parsed and checked here first (sizes, offsets, shapes, names), so that a
damaged or hostile checkpoint gives a typed error before the safetensors library sees it; torch and that library are
imported at the first `load`. Pickled weights (.bin, .pt, .pth) are never opened.
Source: the format's page at huggingface.co/docs/safetensors. Layout: u64 header size | JSON header | tensor data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from septet.errors import ModelFileError, ModelNotFound
from septet.hub.facts import parse_json, read_json, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPE_BYTES", "SafetensorsDir", "TensorInfo"]

MAX_HEADER_BYTES = 32 * 2**20  # per file, and of the index
MAX_TENSORS = 2**18  # per file
MAX_SHARDS = 4096
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8} | {
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header states it."""

    shape: tuple[int, ...]
    dtype: str  # the format's name: "F32", "BF16", ...
    file: str  # plain name inside the directory
    offset: int = field(default=0, compare=False)  # bytes from the start of the file


class SafetensorsDir:
    """An open checkpoint: `tensors` by name, `load` for each. A context manager."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self._files: dict[str, Any] = {}  # name -> safe_open handle, opened at the first load

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsDir:
        """Read and check all headers. ModelNotFound: no such directory; ModelFileError: anything unsound in it."""
        path = Path(path)
        if not path.is_dir():
            raise ModelNotFound(f"no such directory: {path.name}")
        if (path / SINGLE).exists():
            return cls(path, _read_header(path, SINGLE))
        if (path / INDEX).exists():
            return cls(path, _read_index(path))
        raise ModelFileError(_nothing_here(path))

    def load(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, backed by the file's mapping. ModelFileError if there is none."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path.name}: no tensor {shown(name)}")
        if info.file not in self._files:
            from safetensors import safe_open

            try:
                self._files[info.file] = safe_open(self.path / info.file, framework="pt", device="cpu")
            except Exception as error:  # the library's own type, OSError; its message holds no more than the format's
                raise ModelFileError(f"{info.file}: {type(error).__name__} while opening: {error}") from None
        return self._files[info.file].get_tensor(name)

    def close(self) -> None:
        """Tensors that were loaded stay valid."""
        self._files.clear()

    def __enter__(self) -> SafetensorsDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing_here(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        return (
            f"{path.name} has only pickled weights ({shown(pickles[0])}), which can run code when opened and are never "
            "loaded: convert them to safetensors first"
        )
    return f"{path.name} has neither {SINGLE} nor {INDEX}"


def _read_index(path: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards; each name must be where the index says, and nowhere else."""
    weight_map = read_json(path / INDEX, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{INDEX}: weight_map must be a non-empty object")
    for file in weight_map.values():
        _check_plain(file)
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise ModelFileError(f"{INDEX} names {len(shards)} files; at most {MAX_SHARDS} are accepted")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_header(path, shard).items():
            if weight_map.get(name) == shard:
                tensors[name] = info
            elif name not in weight_map:
                raise ModelFileError(f"{shard} holds the tensor {shown(name)}, which {INDEX} doesn't list")
    missing = weight_map.keys() - tensors.keys()
    if missing:
        name = min(missing)
        raise ModelFileError(f"{INDEX} places {shown(name)} in {weight_map[name]}, which doesn't have it")
    return tensors


def _check_plain(file: object) -> None:
    """A file name and nothing else, on any system: no directories, no drive, no control characters."""
    ok = isinstance(file, str) and len(file) <= 255 and file.isprintable() and file.endswith(".safetensors")
    if not ok or PureWindowsPath(file).name != file or ":" in file:  # type: ignore[arg-type, operator]
        raise ModelFileError(f"{INDEX} names {shown(file)}, which is not a plain .safetensors file name")


def _check_inside(path: Path, file: str) -> None:
    """Links may point into the directory, or into the blobs of a Hugging Face cache whose snapshot this is."""
    root, target = path.resolve(), (path / file).resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if target.parent not in (root, blobs):
        raise ModelFileError(f"{file} is a link that leads out of the model's directory")


def _read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    target = path / file
    try:
        _check_inside(path, file)
        if not target.is_file():
            raise ModelFileError(f"{path.name}: the file {file} is missing: fetch the checkpoint again")
        with target.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            n_header = int.from_bytes(stream.read(8), "little")
            if size < 8 or n_header > size - 8:
                raise ModelFileError(f"{file}: its header claims {n_header} bytes of {size}: truncated or damaged")
            if n_header > MAX_HEADER_BYTES:
                raise ModelFileError(f"{file}: a header of {n_header} bytes; at most {MAX_HEADER_BYTES} are accepted")
            raw = stream.read(n_header)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelFileError(f"can't read {file}: {getattr(error, 'strerror', None) or 'a loop of links'}") from None
    header = parse_json(raw, f"the header of {file}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelFileError(f"{file} has {len(header)} tensors; at most {MAX_TENSORS} are accepted")
    tensors = _check_entries(file, header, size - 8 - n_header)
    return {name: replace(info, offset=8 + n_header + info.offset) for name, info in tensors.items()}


def _check_entries(file: str, header: dict[str, Any], n_data: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info, begin, end = _check_entry(file, name, entry)
        if end > n_data:
            raise ModelFileError(f"{file}: tensor {shown(name)} ends {end - n_data} bytes past the end: truncated")
        tensors[name] = info
        spans.append((begin, end, name))
    spans.sort()
    for before, after in pairwise(spans):
        if before[1] > after[0]:
            raise ModelFileError(f"{file}: tensors {shown(before[2])} and {shown(after[2])} overlap")
    return tensors


def _check_entry(file: str, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """-> (info, begin, end), the span in bytes from the start of the data."""
    what = f"{file}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise ModelFileError(f"{what} is described by {shown(entry)}, not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFileError(f"{what} has the unknown dtype {shown(dtype)}")
    if not _naturals(shape) or len(shape) > 8:  # type: ignore[arg-type]
        raise ModelFileError(f"{what} has the impossible shape {shown(shape)}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:  # type: ignore[arg-type, index]
        raise ModelFileError(f"{what} has the impossible offsets {shown(span)}")
    begin, end = span  # type: ignore[misc]
    n_bytes = prod(shape) * DTYPE_BYTES[dtype]  # type: ignore[arg-type]
    if n_bytes != end - begin:
        raise ModelFileError(f"{what}: {dtype} of shape {shown(shape)} is {n_bytes} bytes, not {end - begin}")
    return TensorInfo(tuple(shape), dtype, file, begin), begin, end  # type: ignore[arg-type]


def _naturals(values: object) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**48 for v in values)
