"""From recorded ops to the native program's phases: fusion, placement, memory.

Called by `tape.py`. A phase is row operations (each token by itself), then products of one input, or attention; a
barrier ends it (csrc/tape.h). Fused here: norms and sums into the products that follow, outputs of joined products into
one register, the activation into gate and up, rotation and KV write into attention, the soft cap into the head. What
fits no pattern stays a row operation, so any order of ops runs. Knows no ctypes, no weights' contents, no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.errors import UnsupportedModel
from septet.kernels.native.record import Node, Recording, Sym

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.kernels.native.pack import PackedMatrix

__all__ = ["Compiled", "Phase", "Product", "Value", "compile_recording"]

GROUP = 16  # csrc/linear.h
DENSE = ("F32", "F16", "BF16")
DOMAINS = ("tokens", "picks")
END = 1 << 30


@dataclass(slots=True)
class Product:
    """Groups g0 .. g1 - 1 of `weight` times the phase's input, into columns from `column` on."""

    weight: PackedMatrix
    bias: Any
    g0: int
    g1: int
    column: int


@dataclass(slots=True)
class Phase:
    """work: "none", "products", "gated" or "attention"."""

    work: str
    rows: list[Node]
    products: list[Product] = field(default_factory=list)
    input: Sym | None = None
    output: Sym | None = None
    kind: str = ""  # gated: the activation
    cap: float = 0.0
    attention: dict[str, Any] = field(default_factory=dict)

    @property
    def quantises(self) -> bool:
        return any(product.weight.kind not in DENSE for product in self.products)


@dataclass(slots=True)
class Value:
    """Where a Sym lives (csrc/tape.h: Register)."""

    zone: str  # "own", "shared" or "result"
    domain: str
    width: int  # floats of a row
    merged: Sym | None = None
    birth: int = 0  # phases
    death: int = 0
    prefix: int = 0

    @property
    def stride(self) -> int:
        return (self.width + 15) // 16 * 16


@dataclass(slots=True)
class Compiled:
    phases: list[Phase]
    logits_phase: int
    values: dict[Sym, Value]
    hidden: Sym
    widths: dict[tuple[str, str], int]  # (zone, domain) -> floats a row


def compile_recording(recording: Recording) -> Compiled:
    """UnsupportedModel for a forward whose attention can't be told apart (keys written without attention, say)."""
    builder = _Phases(recording)
    for i, node in enumerate(recording.nodes):
        if i == recording.split:
            builder.flush()
            builder.logits_phase = len(builder.phases)
        builder.take(node)
    builder.flush()
    values = _values(builder, recording)
    return Compiled(builder.phases, builder.logits_phase, values, recording.hidden, _place(values))


class _Phases:
    """Cuts the nodes, in order, into phases."""

    def __init__(self, recording: Recording) -> None:
        self.phases: list[Phase] = []
        self.pending: list[Node] = []  # row operations that wait for the products that follow
        self.logits_phase = 0
        self.merged: dict[Sym, Sym] = {}  # attention's output -> what it writes itself, before parts are merged
        self.uses: dict[Sym, int] = {recording.hidden: 1, recording.logits: 1}
        self.maker: dict[Sym, Node] = {}
        self.place: dict[Sym, tuple[Sym, int]] = {}  # a product's output -> (joined value, column)
        for node in recording.nodes:
            for value in node.inputs:
                self.uses[value] = self.uses.get(value, 0) + 1
            for value in node.outputs:
                self.maker[value] = node
        for node in recording.nodes:
            if node.op == "join" and all(self.maker[v].op == "linear" and self.uses[v] == 1 for v in node.inputs):
                column = 0
                for value in node.inputs:
                    self.place[value] = (node.outputs[0], column)
                    column += value.width

    def take(self, node: Node) -> None:
        if node.op == "linear":
            self._linear(node)
        elif node.op == "join":
            self._join(node)
        elif node.op == "qkv":
            if self.uses.get(node.outputs[0]) != 1:
                raise UnsupportedModel("queries are used otherwise than by one attention: use kernels=reference")
        elif node.op == "attention":
            self._attention(node)
        elif not (node.op == "gated" and self._fuse_gated(node)) and not (node.op == "cap" and self._fuse_cap(node)):
            self.pending.append(node)

    def flush(self) -> None:
        """A phase of the waiting row operations alone."""
        if self.pending:
            self.phases.append(Phase("none", self.pending))
            self.pending = []

    def _linear(self, node: Node) -> None:
        (value,) = node.inputs
        output, column = self.place.get(node.outputs[0], (node.outputs[0], 0))
        last = self.phases[-1] if self.phases else None
        fits = last is not None and last.work == "products" and last.input is value and last.output is output
        if last is None or not fits or self.pending:
            last = Phase("products", self.pending, input=value, output=output)
            self.phases.append(last)
            self.pending = []
        weight = node.args["weight"]
        last.products.append(Product(weight, node.args["bias"], 0, -(-weight.shape[0] // GROUP), column))

    def _join(self, node: Node) -> None:
        if node.inputs[0] in self.place:
            return
        column = 0
        for value in node.inputs:
            self.pending.append(Node("copy", (value,), node.outputs, {"column": column}))
            column += value.width

    def _made(self, node: Node) -> Phase | None:
        """The last phase, if its products' output is what `node` alone reads, and nothing waits."""
        (value,) = node.inputs
        last = self.phases[-1] if self.phases else None
        alone = last is not None and last.work == "products" and last.output is value and self.uses[value] == 1
        return last if alone and not self.pending and not (last and last.cap) else None

    def _fuse_gated(self, node: Node) -> bool:
        phase, half = self._made(node), node.outputs[0].width
        if phase is None or half % GROUP:
            return False
        first, middle = phase.products[0], half // GROUP
        if len(phase.products) == 1:
            gate = Product(first.weight, first.bias, 0, middle, 0)
            phase.products = [gate, Product(first.weight, first.bias, middle, 2 * middle, half)]
        elif len(phase.products) != 2 or phase.products[1].column != half:
            return False
        phase.work, phase.kind, phase.output = "gated", node.args["kind"], node.outputs[0]
        return True

    def _fuse_cap(self, node: Node) -> bool:
        phase = self._made(node)
        if phase is None:
            return False
        phase.cap, phase.output = node.args["cap"], node.outputs[0]
        return True

    def _attention(self, node: Node) -> None:
        """The prologue is in the phase; parts of split contexts are merged by the row operations of the next one."""
        prologue = self.maker.get(node.inputs[0])
        if prologue is None or prologue.op != "qkv":
            raise UnsupportedModel("attention reads something else than qkv_write's queries: use kernels=reference")
        qkv = prologue.inputs[0]
        if not any(phase.output is qkv for phase in self.phases):  # made by row operations: to shared memory first
            copy = Node("copy", (qkv,), (Sym("tokens", qkv.width),), {"column": 0})
            self.pending.append(copy)
            qkv = copy.outputs[0]
        self.flush()
        raw = Sym("tokens", node.outputs[0].width)
        facts = {**prologue.args, **node.args}
        self.phases.append(Phase("attention", [], input=qkv, output=raw, attention=facts))
        index = sum(phase.work == "attention" for phase in self.phases) - 1
        self.pending.append(Node("merge", (raw,), node.outputs, {"attention": index}))
        self.merged[node.outputs[0]] = raw


def _values(builder: _Phases, recording: Recording) -> dict[Sym, Value]:
    """Zone and lifetime of every value. What row operations make before products is each thread's own."""
    values: dict[Sym, Value] = {}

    def make(sym: Sym, zone: str, i: int) -> None:
        if sym not in values:
            values[sym] = Value(zone, sym.domain, sym.width, builder.merged.get(sym), i, i)

    def use(syms: Iterable[Sym], i: int) -> None:
        for sym in syms:
            values[sym].death = max(values[sym].death, i)
            if (raw := builder.merged.get(sym)) is not None:
                values[raw].death = max(values[raw].death, i)

    for i, phase in enumerate(builder.phases):
        for node in phase.rows:
            use(node.inputs, i)
            for sym in node.outputs:
                make(sym, "shared" if phase.work == "none" else "own", i)
        if phase.input is not None:
            use([phase.input], i)
        if phase.output is not None:
            make(phase.output, "shared", i)
    if values[recording.logits].zone == "own" or values[recording.hidden].zone == "own":
        raise UnsupportedModel("hidden states or logits are read again before they are given: use kernels=reference")
    values[recording.logits].zone = "result"
    values[recording.hidden].death = END
    return values


def _place(values: dict[Sym, Value]) -> dict[tuple[str, str], int]:
    """Give each value its columns of its zone's rows: first fit among those alive at the same time -> zones' widths."""
    widths = {(zone, domain): 0 for zone in ("own", "shared") for domain in DOMAINS}
    placed: list[Value] = []
    for value in sorted(values.values(), key=lambda v: (v.birth, -v.stride)):
        if value.zone == "result":
            continue
        others = [
            other
            for other in placed
            if (other.zone, other.domain) == (value.zone, value.domain)
            and other.birth <= value.death
            and value.birth <= other.death
        ]
        at = 0
        for other in sorted(others, key=lambda v: v.prefix):
            if other.prefix - at >= value.stride:
                break
            at = max(at, other.prefix + other.stride)
        value.prefix = at
        placed.append(value)
        key = (value.zone, value.domain)
        widths[key] = max(widths[key], at + value.stride)
    return widths
