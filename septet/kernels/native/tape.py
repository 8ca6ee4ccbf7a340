"""The native program of one model: filled from the compiled phases, run once a step in one call.

Called by `engine/forward.py`. Keeps alive whatever the program points to. The structures mirror csrc/tape.h field by
field; their sizes are compared with the library's before use. Must not know layers, models or the scheduler.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, addressof, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np

from septet.errors import InvalidRequest, OutOfMemory
from septet.kernels.native.arrays import STORES, address, dtype_name
from septet.kernels.native.compile import DOMAINS, Compiled, Phase, compile_recording
from septet.kernels.native.library import PATHS, NativeUnavailable, signature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.kernels.native.library import Library, Pool
    from septet.kernels.native.pack import PackedMatrix
    from septet.kernels.native.record import Node, Recording, Sym
    from septet.kernels.ops import LayerKV, Layout

__all__ = ["Decode", "Tape"]

ZONES = ("own", "shared", "result")
ROW_OPS = ("embed", "norm", "add_norm", "gated", "cap", "take", "copy", "merge")
WORKS = ("none", "products", "gated", "attention")
ACTIVATIONS = ("silu", "gelu_tanh")
HIDDEN, LOGITS = 1, 2


def _structure(name: str, fields: str) -> type[Structure]:
    """fields: "i a b, q n, f x, p pointer" - C types by letter, then names."""
    kinds = {"i": c_int32, "q": c_int64, "f": c_float, "p": c_void_p}
    listed = [(field, kinds[part.split()[0]]) for part in fields.split(",") for field in part.split()[1:]]
    return type(name, (Structure,), {"_fields_": listed})


_Register = _structure("Register", "i zone domain merged reserved, q prefix width width_k")
_RowOp = _structure("RowOp", "i op kind a b out out2, q column n, f f0 reserved, p p0 weight")
_Product = _structure("Product", "p weight bias, q g0 g1 column")
_Attention = _structure(
    "Attention",
    "i qkv out layer heads kv_heads dim, f scale cap eps reserved, q window, p cos_sin q_norm k_norm",
)
_Phase = _structure(
    "Phase", "i work first_op op_count first_product product_count input output quantise attention kind, f cap reserved"
)
_LayerPool = _structure("LayerPool", "p k v, q k_slot v_slot k_head v_head")
_Program = _structure(
    "Program",
    "p registers ops products attentions phases layers,"
    "q n_registers n_ops n_products n_attentions n_phases n_layers logits_phase own0 own1 shared0 shared1,"
    "q quant_width result_width, i hidden store path reserved",
)
_Step = _structure(
    "Step",
    "q tokens rows picks, p ids positions slots row q_start kv_len slot_of, q slot_stride, p logits_at result",
)
Decode = _structure(
    "Decode",
    "q n, p row start slots tokens slot_of, q stride, p temperature top_p min_p top_k seed logits sampled words,"
    "q words_stride, p line",
)
"""Arguments of `Tape.decode` (csrc/tape.h): addresses of the rows' tables, of this step's rows and of the results."""
_STRUCTURES = (_Register, _RowOp, _Product, _Attention, _Phase, _LayerPool, _Program, _Step, Decode)


class Tape:
    """`hidden` and `logits` of one recorded model over one KV pool. One caller at a time."""

    def __init__(self, library: Library, pool: Pool, path: str, recording: Recording, kv: Sequence[LayerKV]) -> None:
        _declare(library)
        self._library = library
        self._pool = pool
        compiled = compile_recording(recording)
        self._program = _Writer(compiled, kv, path)  # what the tape points to lives here
        self._handle = library.septet_tape_create(pool.handle, addressof(self._program.program))
        if not self._handle:
            raise OutOfMemory(f"the tape can't be made for path {path}: no memory, or not on this CPU")
        self.vocab = recording.logits.width
        self.hidden_width = recording.hidden.width
        self._hidden_stride = compiled.values[compiled.hidden].stride
        self.n_phases = len(compiled.phases)
        self._labels = [*(_label(phase) for phase in compiled.phases), "sampling"]
        self._step = _Step()

    def run(self, ids: np.ndarray, layout: Layout, logits_at: np.ndarray | None) -> np.ndarray | None:
        """Compute the step and write its keys and values -> (S, V) float32 logits of `logits_at`, None without it.

        ids (T,) int64 and the layout as `Ops` defines it, all numpy arrays. InvalidRequest for a token id that the
        model does not have, OutOfMemory.
        """
        step = self._step
        held = self._lay_out(ids, layout)
        parts = HIDDEN if logits_at is None else HIDDEN | LOGITS
        out = self._picks(logits_at)
        self._check(self._library.septet_tape_run(self._handle, addressof(step), parts))
        del held
        return out

    def logits(self, logits_at: np.ndarray) -> np.ndarray:
        """(S, V) logits at other tokens of the last run's."""
        out = self._picks(logits_at)
        self._check(self._library.septet_tape_run(self._handle, addressof(self._step), LOGITS))
        assert out is not None
        return out

    def hidden(self) -> np.ndarray:
        """(T, D) final hidden states of the last run, normed; the memory is overwritten by the next."""
        n = self._step.tokens * self._hidden_stride  # type: ignore[attr-defined]
        values = (c_float * n).from_address(self._library.septet_tape_hidden(self._handle))
        return np.frombuffer(values, dtype=np.float32).reshape(-1, self._hidden_stride)[:, : self.hidden_width]

    def decode(self, rows: Structure) -> None:
        """A step in which each of `rows.n` rows computes one token and, where `rows.sampled` is set, draws the next.

        rows: a `Decode` whose addresses hold what csrc/tape.h says. Raises as `run`.
        """
        self._step.tokens = rows.n  # type: ignore[attr-defined]
        self._check(self._library.septet_tape_decode(self._handle, addressof(rows)))

    def draw_again(self, rows: Structure) -> None:
        """The tokens of the `decode` before this once more, of those rows that have a mask, under it."""
        self._check(self._library.septet_tape_draw_again(self._handle, addressof(rows)))

    def times(self) -> dict[str, tuple[float, float]]:
        """Where the first thread's time went since the call before this: kind of phase -> seconds (working, waiting for
        the other threads). The first call only starts the clock."""
        work, wait = ((c_double * len(self._labels))() for _ in "ab")
        self._library.septet_tape_times(self._handle, work, wait)
        sums: dict[str, tuple[float, float]] = {}
        for label, one, two in zip(self._labels, work, wait, strict=True):
            before = sums.get(label, (0.0, 0.0))
            sums[label] = (before[0] + one, before[1] + two)
        return sums

    def _lay_out(self, ids: np.ndarray, layout: Any) -> list[np.ndarray]:
        step = self._step
        wide = [ids, layout.positions, layout.slots, layout.rows]
        held = [np.ascontiguousarray(values, dtype=np.int64) for values in wide]
        narrow = (layout.q_start, layout.kv_len, layout.slot_of)
        held += [np.ascontiguousarray(values, dtype=np.int32) for values in narrow]
        names = ("ids", "positions", "slots", "row", "q_start", "kv_len", "slot_of")
        for name, values in zip(names, held, strict=True):
            setattr(step, name, values.ctypes.data)
        step.tokens, step.rows = ids.shape[0], layout.rows.shape[0]
        step.slot_stride = layout.slot_of.shape[1]
        self._held = held  # `logits` reads the rows again
        return held

    def _picks(self, logits_at: np.ndarray | None) -> np.ndarray | None:
        step = self._step
        if logits_at is None:
            step.picks, step.logits_at, step.result = 0, None, None
            return None
        self._at = np.ascontiguousarray(logits_at, dtype=np.int64)
        out = np.empty((self._at.shape[0], self.vocab), dtype=np.float32)
        step.picks, step.logits_at, step.result = self._at.shape[0], self._at.ctypes.data, out.ctypes.data
        return out

    def _check(self, status: int) -> None:
        if status == -1:
            raise OutOfMemory(f"no memory for a step of {self._step.tokens} tokens")
        if status == -2:
            raise InvalidRequest("a token id of the step is not in the model's vocabulary", param="prompt")

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            self._library.septet_tape_release(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


def _label(phase: Phase) -> str:
    """A phase by what it does: "attention", "rows", or its products' sizes."""
    if not phase.products:
        return "rows" if phase.work == "none" else phase.work
    k = phase.products[0].weight.shape[1]
    kinds = "+".join(dict.fromkeys(product.weight.kind for product in phase.products))
    return f"{phase.work} {sum((p.g1 - p.g0) * 16 for p in phase.products)}x{k} {kinds}"


def _declare(library: Library) -> None:
    """Type the tape's functions; NativeUnavailable where the library was built from other structures."""
    signature(library, "septet_tape_sizes", None, [POINTER(c_int64)])
    signature(library, "septet_tape_create", c_void_p, [c_void_p, c_void_p])
    signature(library, "septet_tape_release", None, [c_void_p])
    signature(library, "septet_tape_times", None, [c_void_p, POINTER(c_double), POINTER(c_double)])
    signature(library, "septet_tape_decode", c_int, [c_void_p, c_void_p])
    signature(library, "septet_tape_draw_again", c_int, [c_void_p, c_void_p])
    signature(library, "septet_tape_run", c_int, [c_void_p, c_void_p, c_int])
    signature(library, "septet_tape_hidden", c_void_p, [c_void_p])
    sizes = (c_int64 * len(_STRUCTURES))()
    library.septet_tape_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(s) for s in _STRUCTURES]:
        raise NativeUnavailable("the native library is of another version: build it again with `python csrc/build.py`")


class _Writer:
    """The compiled phases as the C structures, in arrays that live as long as this."""

    def __init__(self, compiled: Compiled, kv: Sequence[LayerKV], path: str) -> None:
        self.compiled = compiled
        self.numbers = {sym: i for i, sym in enumerate(compiled.values)}
        self.keep: list[Any] = [compiled, list(kv)]
        self.ops: list[Structure] = []
        self.products: list[Structure] = []
        self.attentions: list[Structure] = []
        phases = [self.phase(phase) for phase in compiled.phases]
        registers = [self.register(sym) for sym in compiled.values]
        layers = [_layer(layer) for layer in kv]
        arrays = {
            "registers": self.array(_Register, registers),
            "ops": self.array(_RowOp, self.ops),
            "products": self.array(_Product, self.products),
            "attentions": self.array(_Attention, self.attentions),
            "phases": self.array(_Phase, phases),
            "layers": self.array(_LayerPool, layers),
        }
        widths = {f"{zone}{i}": compiled.widths[zone, d] for zone in ("own", "shared") for i, d in enumerate(DOMAINS)}
        inputs = [p.input.width for p in compiled.phases if p.quantises and p.input is not None]
        result = next(v.width for v in compiled.values.values() if v.zone == "result")
        self.program = _Program(
            **{name: addressof(array) for name, array in arrays.items()},
            **{f"n_{name}": len(array) for name, array in arrays.items()},
            **widths,
            logits_phase=compiled.logits_phase,
            quant_width=max(inputs, default=32),
            result_width=result,
            hidden=self.numbers[compiled.hidden],
            store=list(STORES).index(_stored(kv[0].k)),
            path=PATHS.index(path),
        )

    def array(self, kind: type[Structure], items: list[Structure]) -> Any:
        made = (kind * max(len(items), 1))(*items)
        self.keep.append(made)
        return made if items else (kind * 0).from_buffer(made)

    def address(self, values: np.ndarray | None) -> int | None:
        if values is None:
            return None
        self.keep.append(values)
        return values.ctypes.data

    def handle(self, weight: PackedMatrix) -> int:
        self.keep.append(weight)
        return weight.handle

    def number(self, sym: Sym | None) -> int:
        return -1 if sym is None else self.numbers[sym]

    def register(self, sym: Sym) -> Structure:
        value = self.compiled.values[sym]
        return _Register(
            zone=ZONES.index(value.zone),
            domain=DOMAINS.index(value.domain),
            merged=self.number(value.merged),
            prefix=value.prefix,
            width=value.stride,
            width_k=value.width,
        )

    def phase(self, phase: Phase) -> Structure:
        first_op, first_product = len(self.ops), len(self.products)
        self.ops += [self.row_op(node) for node in phase.rows]
        for p in phase.products:
            weight, bias = self.handle(p.weight), self.address(p.bias)
            self.products.append(_Product(weight=weight, bias=bias, g0=p.g0, g1=p.g1, column=p.column))
        if phase.work == "attention":
            self.attentions.append(self.attention(phase))
        return _Phase(
            work=WORKS.index(phase.work),
            first_op=first_op,
            op_count=len(phase.rows),
            first_product=first_product,
            product_count=len(phase.products),
            input=self.number(phase.input),
            output=self.number(phase.output),
            quantise=phase.quantises,
            attention=len(self.attentions) - 1,
            kind=ACTIVATIONS.index(phase.kind) if phase.kind else 0,
            cap=phase.cap,
        )

    def row_op(self, node: Node) -> Structure:
        args = node.args
        inputs = [self.number(sym) for sym in node.inputs] + [-1, -1]
        outputs = [self.number(sym) for sym in node.outputs] + [-1]
        kind = args.get("attention", 0)
        if node.op == "gated":
            kind = ACTIVATIONS.index(args["kind"])
        lookup = node.op == "embed"
        return _RowOp(
            op=ROW_OPS.index(node.op),
            kind=kind,
            a=inputs[0],
            b=inputs[1],
            out=outputs[0],
            out2=outputs[1],
            column=args.get("column", 0),
            n=node.inputs[0].width if node.op == "copy" else node.outputs[0].width,
            f0=args.get("eps", args.get("scale", args.get("cap", 0.0))),
            p0=None if lookup else self.address(args.get("weight")),
            weight=self.handle(args["weight"]) if lookup else None,
        )

    def attention(self, phase: Phase) -> Structure:
        facts = phase.attention
        plain = ("layer", "heads", "kv_heads", "dim", "scale", "cap", "eps", "window")
        return _Attention(
            qkv=self.number(phase.input),
            out=self.number(phase.output),
            **{name: facts[name] for name in plain},
            **{name: self.address(facts[name]) for name in ("cos_sin", "q_norm", "k_norm")},
        )


def _layer(kv: LayerKV) -> Structure:
    (k, k_steps), (v, v_steps) = address(kv.k), address(kv.v)
    if k_steps[2] != 1 or v_steps[2] != 1:
        raise ValueError("kv: the elements of a head must be adjacent")
    return _LayerPool(k=k, v=v, k_slot=k_steps[0], v_slot=v_steps[0], k_head=k_steps[1], v_head=v_steps[1])


def _stored(pool: Any) -> str:
    """A key of STORES."""
    name = dtype_name(pool.dtype)
    return name if name in STORES else next(key for key, kind in STORES.items() if pool.dtype == kind)
