"""The executor of the native kernels, from what `build.py` has decided: packed weights, tape, tables, in numpy.

The weights of a GGUF file need no torch; those of safetensors, and random ones, are read by it and packed as they come.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from septet.engine.forward import record
from septet.engine.native import NativeExecutor
from septet.engine.pool import host_pool
from septet.engine.tables import Tables
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.weights.mapped import MappedSource
from septet.weights.separate import SeparateSource

if TYPE_CHECKING:
    from septet.engine.build import Decisions
    from septet.kernels.native.record import TapeOps
    from septet.kernels.native.tape import Tape
    from septet.weights.source import Source

__all__ = ["build_native"]


def build_native(decided: Decisions) -> tuple[NativeExecutor, tuple[str, str]]:
    """-> the executor; whether steps are captured, and what that means."""
    ops, sizes, phases = decided.ops, decided.sizes, decided.phases
    assert ops is not None
    tape = _tape(decided, ops)
    tables = Tables(sizes.max_num_seqs, sizes.max_model_len)
    eager = decided.config.enforce_eager
    kernels = ops.library, ops.pool, ops.packer.path
    executor = NativeExecutor(tape, tables, kernels, depth=2 if decided.overlap else 1, enforce_eager=eager)
    phases.done("memory")
    return executor, ("off", "eager steps") if eager else ("on", "decode steps are one native call")


def _tape(decided: Decisions, ops: TapeOps) -> Tape:
    """The model, recorded: only the packed weights stay."""
    dense = decided.config.load_format == "dummy"
    mapped = not dense and not Path(decided.config.model).is_dir()
    source = _mapped(decided) if mapped else _read_by_torch(decided, ops)
    build = Build(decided.model, ops, source, None, decided.dtype, max_len=decided.sizes.max_model_len + 1)
    model = load_model(build)
    decided.phases.done("weights")
    return record(model, ops, host_pool(decided.model, decided.sizes.num_kv_slots, decided.kv_dtype))


def _mapped(decided: Decisions) -> Source:
    return SeparateSource(MappedSource(decided.config.model, decided.model, decided.dtype))


def _read_by_torch(decided: Decisions, ops: TapeOps) -> Source:
    import torch

    cpu, dtype = torch.device("cpu"), getattr(torch, decided.dtype)
    if decided.config.load_format == "dummy":
        from septet.weights.dummy import DummySource

        return DummySource(decided.model, cpu, dtype, decided.config.seed)
    from septet.weights.load import open_source

    return SeparateSource(open_source(Path(decided.config.model), decided.model, ops, cpu, dtype))
