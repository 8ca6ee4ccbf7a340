"""Checkpoints as sources of tensors: GGUF files and safetensors directories, behind the same names and layouts.

`engine/build.py` calls `open_source`; layers pull from the result (contract: `source.py`). What stays packed and what
becomes dense is decided here, by what the ops at hand can multiply. One tensor is handled at a time and large ones in
chunks of rows, so that loading needs little more memory than the model; a GPU gets them from a stream (`stream.py`).
Knows no layer and no architecture's forward.
"""

from __future__ import annotations

import warnings
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from septet.errors import UnsupportedModel
from septet.hub.gguf import GGUFFile
from septet.hub.safetensors import DTYPE_BYTES, SafetensorsDir
from septet.kernels import ggml
from septet.machine import usable_cpus
from septet.quant.gguf import GGUFBlocks
from septet.quant.none import Dense
from septet.weights.inventory import Inventory, row_order
from septet.weights.names import build_order, canonical_of_gguf, canonical_of_hf
from septet.weights.stream import Span, WeightStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from septet.config import ModelConfig
    from septet.hub.gguf import TensorInfo
    from septet.kernels.ops import Ops
    from septet.quant.scheme import PackedWeight
    from septet.weights.source import Source

__all__ = ["GGUFSource", "SafetensorsSource", "open_source"]

MAX_THREADS = 12  # that stream: memory is busy before that
CHUNK = 1 << 20  # weights made dense at once: temporaries of 4 MiB, which the allocator reuses without new pages
DEVICE_CHUNK = 1 << 25  # the same on a GPU, where each chunk costs some launches
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what can be a weight


def open_source(path: str | Path, config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> Source:
    """The weights at `path`: a .gguf file, or a directory with safetensors. `dtype` is the compute dtype.

    ModelNotFound, ModelFileError or UnsupportedModel where the files are missing, damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return SafetensorsSource(SafetensorsDir.open(path), config, device, dtype)
    return GGUFSource(GGUFFile.open(path), config, ops, device, dtype, path)


class GGUFSource:
    """Weights of a GGUF file. Matrices whose block type the ops multiply stay blocks, on the CPU in the mapped file."""

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        path: Path | None = None,
    ) -> None:
        """`path`: of the file, where it may be streamed."""
        self.file = file
        self.config = config
        self.ops = ops
        self.device = device
        self.dtype = dtype
        entries = ((canonical_of_gguf(t.name, config.architecture), t.name, t.shape) for t in file.tensors.values())
        self.inventory = Inventory(file.name, entries)
        spans = [
            (canonical, Span(own, path, info.offset, info.n_bytes))
            for canonical, (own, shape) in self.inventory.known.items()
            if path is not None and len(shape) > 1 and (info := file.tensors[own]).n_bytes
        ]
        self.stream = _streamed(spans, device)

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        info = self.file.tensors[self.inventory.take(name, shape)]
        rows, order = self._streamed_rows(info), self._row_order(name, shape[0])
        if info.kind in self.ops.block_kinds:
            blocks = rows if order is None else rows[order.to(rows.device)]
            return GGUFBlocks(info.kind).pack(blocks.to(self.device))
        return Dense.pack(self._dense(rows, order, info.kind, shape))

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._floats(name, shape).to(self.dtype).to(self.device)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self._floats(name, shape) if self.has(name) else None

    def has(self, name: str) -> bool:
        return name in self.inventory.known

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.file.close()  # blocks that are views keep the mapping alive
        self.inventory.check_all_taken(self.config.tie_embeddings)

    def _rows(self, info: TensorInfo) -> Tensor:
        """(N, row_bytes) uint8 over the mapped file; never written to. A vector is one row."""
        view = self.file.data(info)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(view, dtype=torch.uint8)
        n_rows = info.shape[0] if len(info.shape) > 1 else 1
        return flat.view(n_rows, info.n_bytes // n_rows)

    def _streamed_rows(self, info: TensorInfo) -> Tensor:
        """(N, row_bytes) uint8, on the device already where it is streamed."""
        if self.stream is None or info.name not in self.stream:
            return self._rows(info)
        self.file.data(info)  # a kind that can't be read is told here
        return self.stream.take(info.name).view(info.shape[0], -1)

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small tensor in float32 on the CPU, in memory of its own."""
        info = self.file.tensors[self.inventory.take(name, shape)]
        values = ggml.dequantize(self._rows(info), info.kind, torch.float32).reshape(shape)
        order = self._row_order(name, shape[0])
        return values.clone() if order is None else values[order]

    def _row_order(self, name: str, n: int) -> Tensor | None:
        """`row_order` as a tensor on the CPU."""
        order = row_order(self.config, name, n)
        return None if order is None else torch.from_numpy(order)

    def _dense(self, rows: Tensor, order: Tensor | None, kind: str, shape: tuple[int, int]) -> Tensor:
        """(N, K) in the compute dtype on the device, made chunk by chunk; the mapped file's memory where it serves."""
        if _TORCH.get(kind) == self.dtype and order is None and self.device.type == "cpu":
            return rows.view(self.dtype)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in _chunks(shape, CHUNK if self.device.type == "cpu" else DEVICE_CHUNK):
            chunk = rows[part] if order is None else rows[order[part].to(rows.device)]
            out[part] = self.ops.dequantize(chunk.to(self.device), kind, self.dtype)
        return out


class SafetensorsSource:
    """Weights of a Hugging Face checkpoint: dense in the compute dtype."""

    def __init__(self, files: SafetensorsDir, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.files = files
        self.config = config
        self.device = device
        self.dtype = dtype
        entries = ((canonical_of_hf(own), own, info.shape) for own, info in files.tensors.items())
        self.inventory = Inventory(files.path.name, entries)
        spans = [
            (canonical, Span(own, files.path / info.file, info.offset, prod(shape) * DTYPE_BYTES[info.dtype]))
            for canonical, (own, shape) in self.inventory.known.items()
            if len(shape) > 1 and (info := files.tensors[own]).dtype in FLOATS
        ]
        self.stream = _streamed(spans, device)

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        own = self.inventory.known.get(name, ("",))[0]
        if self.stream is not None and own in self.stream:
            self.inventory.take(name, shape)
            values = self.stream.take(own).view(_FLOAT_TYPES[self.files.tensors[own].dtype]).view(shape)
            return Dense.pack(values.to(self.dtype))
        values = self._load(name, shape)
        if values.dtype == self.dtype:
            return Dense.pack(values.to(self.device))
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in _chunks(shape):
            out[part] = values[part].to(self.dtype).to(self.device)
        return Dense.pack(out)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._floats(name, shape).to(self.dtype).to(self.device)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self._floats(name, shape) if self.has(name) else None

    def has(self, name: str) -> bool:
        return name in self.inventory.known

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.files.close()
        self.inventory.check_all_taken(self.config.tie_embeddings)

    def _load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        own = self.inventory.take(name, shape)
        dtype = self.files.tensors[own].dtype
        if dtype not in FLOATS:
            raise UnsupportedModel(
                f"{self.inventory.where}: tensor {own} is of type {dtype}; Septet reads {', '.join(FLOATS)} from "
                "safetensors (take the model's unquantised checkpoint, or a GGUF file)"
            )
        return self.files.load(own)

    def _floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small tensor in float32 on the CPU. Gemma stores its norms less one; the sum is made before rounding."""
        values = self._load(name, shape).float()
        return values + 1.0 if self.config.architecture == "gemma3" and name.endswith("norm.weight") else values


_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOAT_TYPES = {"F64": torch.float64, **_TORCH}


def _streamed(spans: list[tuple[str, Span]], device: torch.device) -> WeightStream | None:
    """[(canonical name, span)] on their way to a GPU, in the order of a decoder; None where files are mapped."""
    if device.type != "cuda":
        return None
    spans.sort(key=lambda pair: build_order(pair[0]))
    return WeightStream([span for _, span in spans], device, threads=min(usable_cpus(), MAX_THREADS))


def _chunks(shape: tuple[int, int], n_weights: int = CHUNK) -> Iterator[slice]:
    """Slices of rows, `n_weights` or one row each."""
    step = max(1, n_weights // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))
