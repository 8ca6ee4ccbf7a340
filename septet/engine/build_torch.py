"""The executor of a `Runner` in torch, from what `build.py` has decided: the reference on a CPU, Triton on a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from septet.engine.forward import EagerForward
from septet.engine.local import LocalExecutor
from septet.engine.pool import allocate_pool
from septet.engine.rows import Rows
from septet.engine.runner import Runner
from septet.engine.staging import Staging
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.weights.load import open_source

if TYPE_CHECKING:
    from septet.engine.build import Decisions
    from septet.engine.rehearsal import Rehearsal
    from septet.engine.sizing import Sizes
    from septet.kernels.ops import Ops
    from septet.models.registry import Model
    from septet.weights.source import Source

__all__ = ["build_torch"]

log = logging.getLogger(__name__)


def build_torch(decided: Decisions) -> tuple[LocalExecutor, tuple[str, str]]:
    """-> the executor; whether steps are captured, and what that means."""
    config, sizes, phases = decided.config, decided.sizes, decided.phases
    device, dtype = torch.device(decided.device), getattr(torch, decided.dtype)
    ops = _ops(decided.kernels)
    captured = decided.device == "cuda" and decided.kernels != "reference" and not config.enforce_eager
    rehearsal = _rehearse(decided, ops, dtype) if captured else None
    with torch.inference_mode():
        source = _source(decided, ops, device, dtype)
        model = load_model(Build(decided.model, ops, source, device, dtype, max_len=sizes.max_model_len + 1))
        phases.done("weights")
        kv = allocate_pool(decided.model, sizes.num_kv_slots, getattr(torch, decided.kv_dtype), device)
        rows = Rows(sizes.max_num_seqs, sizes.max_model_len, device)
    runner = Runner(EagerForward(model, ops), ops, kv, rows, Staging(device))
    phases.done("memory")
    why_eager = "eager steps"
    if rehearsal is not None:
        phases.done(f"{rehearsal.finish()} kernels more")
        why_eager = _capture(runner, model, sizes, rehearsal)
    phases.done("first steps")
    on_close = rehearsal.cancel if rehearsal is not None else lambda: None
    executor = LocalExecutor(runner, 2 if decided.overlap else 1, on_close)
    if runner.graphs is None:
        return executor, ("off", why_eager)
    return executor, ("on", "decode steps and small chunks are CUDA graphs")


def _ops(kernels: str) -> Ops:
    if kernels == "triton":
        from septet.kernels.triton import TritonOps

        return TritonOps()
    from septet.kernels.reference import ReferenceOps

    return ReferenceOps()


def _source(decided: Decisions, ops: Ops, device: torch.device, dtype: torch.dtype) -> Source:
    config, model = decided.config, decided.model
    if config.load_format == "dummy":
        from septet.weights.dummy import DummySource

        return DummySource(model, device, dtype, config.seed)
    return open_source(Path(config.model), model, ops, device, dtype)


def _rehearse(decided: Decisions, ops: Ops, dtype: torch.dtype) -> Rehearsal:
    """Compile the kernels of the first steps while the weights are loaded."""
    from septet.engine.buckets import Shapes
    from septet.engine.rehearsal import Rehearsal, kernel_directory

    sizes = decided.sizes
    major, minor = torch.cuda.get_device_capability()
    shapes = Shapes.of(sizes.max_num_seqs, sizes.max_model_len, sizes.max_num_batched_tokens)
    return Rehearsal(decided.model, ops, dtype, shapes, kernel_directory(f"sm{major}{minor}"))


def _capture(runner: Runner, model: Model, sizes: Sizes, rehearsal: Rehearsal) -> str:
    """Steps as CUDA graphs -> "", or why not: then every step is launched kernel by kernel."""
    from septet.engine.buckets import Shapes
    from septet.engine.graphs import CudaCapture, StepGraphs

    shapes = Shapes.of(sizes.max_num_seqs, sizes.max_model_len, sizes.max_num_batched_tokens)
    graphs = StepGraphs(runner, model, shapes, CudaCapture())
    graphs.compiled = rehearsal.over
    try:
        graphs.capture_first()
    except RuntimeError as error:
        log.warning("this device or driver can't capture steps", exc_info=error)
        rehearsal.cancel()
        return f"steps could not be captured: {type(error).__name__}"
    runner.graphs = graphs
    rehearsal.go_on()
    return ""
