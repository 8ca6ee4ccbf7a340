"""The recorder: Ops that note what a forward does instead of doing it.

`TapeOps` is handed to the layers like any other ops; weights are packed as they are met. One call of the model's
forward with `Sym`s in place of activations leaves a list of `Node`s, which `compile.py` turns into the native program.
Weights, biases and tables are real: numpy's arrays, or tensors, which bring torch with them (`arrays.py`). Must not
know layers or models, nor how the program is laid out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from septet.errors import UnsupportedModel
from septet.kernels.native.arrays import address, as_bytes, as_floats, round_to
from septet.kernels.native.pack import KINDS, Packer
from septet.kernels.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.kernels.native.library import Library, Pool
    from septet.kernels.native.pack import PackedMatrix
    from septet.kernels.ops import LayerKV, Layout

__all__ = ["Node", "Recording", "Sym", "TapeOps"]


@dataclass(eq=False, slots=True)
class Sym:
    """A value of the step: `width` floats for each token ("tokens") or for each position that samples ("picks")."""

    domain: str
    width: int

    def to(self, _dtype: object) -> Sym:
        """Activations of the tape are float32, whatever the weights are."""
        return self

    def __getattr__(self, name: str) -> Any:
        """An array's methods: an op that has no node computes on what is not there yet."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unrecorded(name)

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any) -> Any:
        raise _unrecorded(func.__name__)

    def __mul__(self, _other: Any) -> Any:
        raise _unrecorded("arithmetic")

    __array_ufunc__ = None  # numpy leaves operators to this class
    __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __getitem__ = __mul__


@dataclass(eq=False, slots=True)
class Node:
    """One recorded op. `args`: its numbers, tensors and packed weights, by the names that compile.py reads."""

    op: str
    inputs: tuple[Sym, ...]
    outputs: tuple[Sym, ...]
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Recording:
    """A forward in two parts: nodes[:split] give `hidden`, the rest `logits` of its rows that sample."""

    nodes: list[Node]
    split: int
    hidden: Sym
    logits: Sym


class TapeOps(Ops):
    """Records ops on `Sym`s."""

    name = "native"
    block_kinds = frozenset(KINDS)

    def __init__(self, library: Library, pool: Pool, path: str = "") -> None:
        """path: see `library.choose_path`."""
        self.library = library
        self.pool = pool
        self.packer = Packer(library, pool, path)
        self.nodes: list[Node] = []
        self.layers: Sequence[LayerKV] = ()
        self.packed: dict[tuple[int, tuple[int, ...], str], tuple[Tensor, PackedMatrix]] = {}

    # -- notes --------------------------------------------------------------------------------------------------------
    def note(self, op: str, inputs: Sequence[Sym], domain: str, *widths: int, **args: Any) -> Any:
        """Append a node -> its output, or outputs where there are several."""
        outputs = tuple(Sym(domain, width) for width in widths)
        self.nodes.append(Node(op, tuple(inputs), outputs, args))
        return outputs[0] if len(outputs) == 1 else outputs

    def weight(self, tensor: Tensor, kind: str) -> PackedMatrix:
        """The packed copy of GGUF blocks, or of a dense matrix (kind ""): one, however often it is met.

        The tensor is held as long as these ops, so that no other one can come to lie at its address.
        """
        key = (address(tensor)[0], tuple(tensor.shape), kind)
        if key not in self.packed:
            packed = self.packer.pack(as_bytes(tensor), kind) if kind else self.packer.pack_dense(tensor)
            self.packed[key] = (tensor, packed)
        return self.packed[key][1]

    def _product(self, x: Any, packed: PackedMatrix, bias: Tensor | None) -> Any:
        x = _known(x)
        return self.note("linear", [x], x.domain, packed.shape[0], weight=packed, bias=as_floats(bias))

    def _lookup(self, ids: Any, packed: PackedMatrix, scale: float) -> Any:
        if not isinstance(ids, Sym) or ids.width:
            raise UnsupportedModel("embed of anything but the step's ids can't be recorded: use kernels=reference")
        return self.note("embed", [], "tokens", packed.shape[1], weight=packed, scale=scale)

    # -- ops ----------------------------------------------------------------------------------------------------------
    def linear(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
        return self._product(x, self.weight(weight, ""), bias)

    def block_linear(self, x: Any, blocks: Tensor, kind: str, bias: Tensor | None = None) -> Any:
        return self._product(x, self.weight(blocks, kind), bias)

    def embed(self, ids: Any, table: Tensor, scale: float = 1.0) -> Any:
        return self._lookup(ids, self.weight(table, ""), _rounded(scale, table.dtype))

    def block_embed(self, ids: Any, blocks: Tensor, kind: str, dtype: Any, scale: float = 1.0) -> Any:
        return self._lookup(ids, self.weight(blocks, kind), _rounded(scale, dtype))

    def rms_norm(self, x: Any, weight: Tensor, eps: float) -> Any:
        x = _known(x)
        return self.note("norm", [x], x.domain, x.width, weight=as_floats(weight), eps=eps)

    def add_rms_norm(self, x: Any, residual: Any, weight: Tensor, eps: float) -> tuple[Any, Any]:
        x, residual = _known(x), _known(residual)
        return self.note("add_norm", [x, residual], x.domain, x.width, x.width, weight=as_floats(weight), eps=eps)

    def gated_act(self, gate_up: Any, kind: str) -> Any:
        gate_up = _known(gate_up)
        return self.note("gated", [gate_up], gate_up.domain, gate_up.width // 2, kind=kind)

    def soft_cap(self, x: Any, cap: float) -> Any:
        x = _known(x)
        return self.note("cap", [x], x.domain, x.width, cap=cap)

    def take_rows(self, x: Any, index: Any) -> Any:
        return self.note("take", [_known(x)], "picks", x.width)

    def join(self, parts: list[Any]) -> Any:
        if not any(isinstance(part, Sym) for part in parts):  # biases
            return np.concatenate([as_floats(part) for part in parts])
        parts = [_known(part) for part in parts]
        return self.note("join", parts, parts[0].domain, sum(part.width for part in parts))

    def qkv_write(
        self,
        qkv: Any,
        kv: LayerKV,
        layout: Layout,
        cos_sin: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Any:
        layer = next(i for i, known in enumerate(self.layers) if known is kv)
        kv_heads, dim = kv.k.shape[1:]
        heads = _known(qkv).width // dim - 2 * kv_heads
        shape = {"layer": layer, "heads": heads, "kv_heads": kv_heads, "dim": dim, "eps": eps}
        norms = {"cos_sin": as_floats(cos_sin), "q_norm": as_floats(q_norm), "k_norm": as_floats(k_norm)}
        return self.note("qkv", [qkv], "tokens", heads * dim, **shape, **norms)

    def attention(
        self, q: Any, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Any:
        return self.note("attention", [q], "tokens", _known(q).width, scale=scale, window=window or 0, cap=soft_cap)


def _unrecorded(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} on a value of the step can't be recorded: this op has no node; use kernels=reference"
    )


def _known(value: Any) -> Sym:
    if not isinstance(value, Sym):
        raise UnsupportedModel(f"an op on a {type(value).__name__} can't be recorded: use kernels=reference")
    return value


def _rounded(scale: float, dtype: object) -> float:
    return float(round_to(np.array([scale], dtype=np.float32), dtype)[0])
