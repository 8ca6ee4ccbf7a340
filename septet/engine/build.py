"""From settings to a running executor: the one place that knows models, weights, kernels and sizes at once.

Called by the engine process (`engine/__main__.py`) and by tests. Resolves each "auto" with a reason that is printed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from septet.engine.forward import EagerForward, TapeForward, record
from septet.engine.local import LocalExecutor
from septet.engine.messages import EngineInfo
from septet.engine.phases import Phases
from septet.engine.pool import allocate_pool
from septet.engine.rows import Rows
from septet.engine.runner import Runner
from septet.engine.sizing import Choice, Sizes, resolve_sizes
from septet.engine.staging import Staging
from septet.engine.taped import TapedDecode
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import kv_bytes_per_token
from septet.hub.footprint import loaded_bytes
from septet.hub.model_config import read_model_config
from septet.layers.build import Build
from septet.machine import available_memory
from septet.models.registry import load_model
from septet.weights.load import open_source

if TYPE_CHECKING:
    from septet.config import EngineConfig, ModelConfig
    from septet.engine.forward import Forward
    from septet.engine.rehearsal import Rehearsal
    from septet.kernels.ops import LayerKV, Ops
    from septet.models.registry import Model
    from septet.weights.source import Source

__all__ = ["build_executor"]

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_executor(config: EngineConfig) -> tuple[LocalExecutor, EngineInfo]:
    """Load the model and allocate everything; after this nothing large is allocated again. Raises SeptetError:
    ModelFileError, UnsupportedModel, OutOfMemory, InvalidRequest (a bad setting)."""
    phases = Phases()
    model_config = read_model_config(Path(config.model))
    device, why_device = _device(config)
    ops, why_ops = _ops(config, device)
    native = ops.name == "native"
    dtype, why_dtype = _dtype(config, model_config, device, native)
    kv_dtype = "float16" if native and config.dtype == "auto" else dtype
    overlap = config.overlap == "on" or (config.overlap == "auto" and device.type == "cuda")
    captured = (native or (device.type == "cuda" and ops.name != "reference")) and not config.enforce_eager
    weights = _weight_bytes(config, model_config, dtype, native)
    sizes = _sizes(config, model_config, device, weights, kv_dtype)
    phases.done("device")
    rehearsal = _rehearse(model_config, ops, DTYPES[dtype], sizes) if captured and not native else None
    with torch.inference_mode():
        source = _source(config, model_config, ops, device, DTYPES[dtype])
        build = Build(model_config, ops, source, device, DTYPES[dtype], max_len=sizes.max_model_len + 1)
        model = load_model(build)
        phases.done("weights")
        kv = allocate_pool(model_config, sizes.num_kv_slots, DTYPES[kv_dtype], device)
        rows = Rows(sizes.max_num_seqs, sizes.max_model_len, device)
        forward, runner_ops = _forward(model, ops, kv)
    runner = Runner(forward, runner_ops, kv, rows, Staging(device))
    phases.done("memory")
    if rehearsal is not None:
        phases.done(f"{rehearsal.finish()} kernels more")
    why_eager = _capture(runner, model, sizes, rehearsal) if captured else "eager steps"
    phases.done("first steps")
    del model  # of a tape, only the packed weights stay
    choices: tuple[Choice, ...] = (
        ("device", str(device), why_device),
        ("dtype", dtype, why_dtype),
        ("kv_dtype", kv_dtype, "half the bytes to hold and to read" if kv_dtype != dtype else "as dtype"),
        ("kernels", ops.name, why_ops),
        _overlap_words(config, overlap, device),
        ("captured_steps", *_captured_words(runner.graphs is not None, native, why_eager)),
        *sizes.choices,
        ("load", f"{phases.seconds:.2f} s", phases.words),
    )
    info = EngineInfo(
        model=config.model,
        vocab_size=model_config.vocab_size,
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        num_kv_slots=sizes.num_kv_slots,
        kv_bytes_per_token=kv_bytes_per_token(model_config, kv_dtype),
        weight_bytes=weights,
        device=str(device),
        dtype=dtype,
        kernels=ops.name,
        pid=0,
        load_s=phases.seconds,
        choices=choices,
    )
    executor = LocalExecutor(runner, 2 if overlap else 1, rehearsal.cancel if rehearsal is not None else lambda: None)
    return executor, info


def _overlap_words(config: EngineConfig, overlap: bool, device: torch.device) -> Choice:
    return (
        "overlap",
        "on" if overlap else "off",
        "as asked" if config.overlap != "auto" else f"default for {device.type}",
    )


def _captured_words(captured: bool, native: bool, why_eager: str) -> tuple[str, str]:
    if not captured:
        return "off", why_eager
    return "on", "decode steps are one native call" if native else "decode steps and small chunks are CUDA graphs"


def _device(config: EngineConfig) -> tuple[torch.device, str]:
    if config.device == "cpu":
        return torch.device("cpu"), "as asked"
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise InvalidRequest(
            "device cuda was asked for, but PyTorch sees no GPU here; use --device cpu", param="device"
        )
    if config.device not in ("auto", "cuda"):
        raise InvalidRequest(f"device must be auto, cpu or cuda, not {config.device!r}", param="device")
    if config.device == "cuda":
        return torch.device("cuda"), "as asked"
    return (torch.device("cuda"), "a GPU is there") if there else (torch.device("cpu"), "no GPU is there")


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device, native: bool) -> tuple[str, str]:
    if config.dtype != "auto":
        if config.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}", param="dtype")
        return config.dtype, "as asked"
    if native and Path(config.model).is_dir():
        return model.dtype, "the checkpoint's own for its weights; activations are float32"
    if native:
        return "float32", "of activations; weights stay as the file has them"
    if device.type == "cpu":
        return "float32", "the reference kernels on a CPU are fastest and most exact in float32"
    if model.dtype == "float32":
        return "bfloat16", "float32 checkpoints are served in bfloat16 on a GPU; ask for float32 to keep it"
    return model.dtype, "the checkpoint's own"


def _ops(config: EngineConfig, device: torch.device) -> tuple[Ops, str]:
    """The table of kernels: the fastest that the device has, unless another is asked for."""
    wanted, why = config.kernels, "as asked"
    if wanted == "auto":
        wanted, why = _default_kernels(device)
    if wanted == "triton":
        from septet.kernels.triton import TritonOps

        return TritonOps(), why
    if wanted == "reference":
        from septet.kernels.reference import ReferenceOps

        return ReferenceOps(), why
    if wanted == "native":
        if device.type != "cpu":
            raise InvalidRequest(f"kernels native run on the CPU, not on {device.type}", param="kernels")
        return _native_ops(why)
    raise InvalidRequest(f"kernels must be auto, reference, triton or native, not {config.kernels!r}", param="kernels")


def _default_kernels(device: torch.device) -> tuple[str, str]:
    """(table, why): Triton on a GPU, the native library on a CPU, the reference where that is not there."""
    from septet.kernels.native.library import NativeUnavailable, load

    if device.type == "cuda":
        return "triton", "default for cuda"
    try:
        load()
    except NativeUnavailable as error:
        return "reference", f"the native library can't be used: {error}"
    return "native", "default for cpu"


def _native_ops(why: str) -> tuple[Ops, str]:
    from septet.kernels.native.library import Pool, load
    from septet.kernels.native.record import TapeOps

    library = load()
    ops = TapeOps(library, Pool(library))
    return ops, f"{why}; path {ops.packer.path} ({ops.packer.reason}), {ops.pool.threads} threads"


def _forward(model: Model, ops: Ops, kv: list[LayerKV]) -> tuple[Forward, Ops]:
    """How the runner computes logits, and with which ops it chooses tokens."""
    if ops.name != "native":
        return EagerForward(model, ops), ops
    from septet.kernels.native.ops import NativeOps
    from septet.kernels.native.record import TapeOps

    assert isinstance(ops, TapeOps)
    return TapeForward(record(model, ops, kv)), NativeOps(ops.library, ops.pool, ops.packer.path)


def _weight_bytes(config: EngineConfig, model: ModelConfig, dtype: str, native: bool) -> int:
    """What the weights will take; dummy ones are dense, as no file holds them."""
    return loaded_bytes(config.model, model, dtype, native and config.load_format == "auto")


def _sizes(config: EngineConfig, model: ModelConfig, device: torch.device, weights: int, kv_dtype: str) -> Sizes:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = available_memory()
    if weights > free:
        raise OutOfMemory(
            f"the weights need {weights >> 20} MiB, but {free >> 20} MiB are free on {device.type}: close other "
            "programs, or choose a smaller model, a smaller --dtype or a GGUF file of fewer bits"
        )
    return resolve_sizes(config, model, device=device.type, dtype=kv_dtype, weights=weights, free=free)


def _source(config: EngineConfig, model: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> Source:
    if config.load_format == "dummy":
        from septet.weights.dummy import DummySource

        return DummySource(model, device, dtype, config.seed)
    if config.load_format != "auto":
        raise InvalidRequest(f"load_format must be auto or dummy, not {config.load_format!r}", param="load_format")
    source = open_source(Path(config.model), model, ops, device, dtype)
    if ops.name == "native":
        from septet.weights.separate import SeparateSource

        return SeparateSource(source)
    return source


def _rehearse(model: ModelConfig, ops: Ops, dtype: torch.dtype, sizes: Sizes) -> Rehearsal:
    """Compile the kernels of the first steps while the weights are loaded."""
    from septet.engine.buckets import Shapes
    from septet.engine.rehearsal import Rehearsal, kernel_directory

    major, minor = torch.cuda.get_device_capability()
    shapes = Shapes.of(sizes.max_num_seqs, sizes.max_model_len, sizes.max_num_batched_tokens)
    return Rehearsal(model, ops, dtype, shapes, kernel_directory(f"sm{major}{minor}"))


def _capture(runner: Runner, model: Model, sizes: Sizes, rehearsal: Rehearsal | None) -> str:
    """Steps as CUDA graphs or one native call -> "", or why not: then every step is launched kernel by kernel."""
    if isinstance(runner.forward, TapeForward):
        runner.graphs = runner.taped = TapedDecode(runner.forward.tape, runner.rows, sizes.max_num_seqs)
        return ""
    from septet.engine.buckets import Shapes
    from septet.engine.graphs import CudaCapture, StepGraphs

    shapes = Shapes.of(sizes.max_num_seqs, sizes.max_model_len, sizes.max_num_batched_tokens)
    graphs = StepGraphs(runner, model, shapes, CudaCapture())
    if rehearsal is not None:
        graphs.compiled = rehearsal.over
    try:
        graphs.capture_first()
    except RuntimeError as error:
        log.warning("this device or driver can't capture steps", exc_info=error)
        if rehearsal is not None:
            rehearsal.cancel()
        return f"steps could not be captured: {type(error).__name__}"
    runner.graphs = graphs
    if rehearsal is not None:
        rehearsal.go_on()
    return ""
