"""From settings to a running executor: what is decided before anything is allocated. torch only where a GPU may be.

Called by the engine process (`engine/__main__.py`) and by tests. Resolves each "auto" with a reason that is printed.
The executor is made by `build_native.py` (the tape, in numpy) or `build_torch.py` (the reference, or a GPU): these two
alone know models, weights and kernels at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from septet.engine.messages import EngineInfo
from septet.engine.phases import Phases
from septet.engine.sizing import Choice, Sizes, resolve_sizes
from septet.engine.wake import gpu_driver
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import kv_bytes_per_token
from septet.hub.footprint import loaded_bytes
from septet.hub.model_config import read_model_config
from septet.machine import available_memory

if TYPE_CHECKING:
    from septet.config import EngineConfig, ModelConfig
    from septet.engine.local import LocalExecutor
    from septet.engine.native import NativeExecutor
    from septet.kernels.native.record import TapeOps

__all__ = ["Decisions", "build_executor", "import_libraries"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(slots=True)
class Decisions:
    """What the executor is made from."""

    config: EngineConfig
    model: ModelConfig
    device: str  # "cpu" or "cuda"
    kernels: str  # "native", "reference" or "triton"
    dtype: str  # compute dtype
    kv_dtype: str
    sizes: Sizes
    overlap: bool
    phases: Phases
    ops: TapeOps | None  # native


def build_executor(config: EngineConfig) -> tuple[LocalExecutor | NativeExecutor, EngineInfo]:
    """Load the model and allocate everything; after this nothing large is allocated again. Raises SeptetError:
    ModelFileError, UnsupportedModel, OutOfMemory, InvalidRequest (a bad setting)."""
    phases = Phases()
    model = read_model_config(Path(config.model))
    device, why_device = _device(config)
    kernels, why_kernels = _kernels(config, device)
    native = kernels == "native"
    ops = _native_ops() if native else None
    if ops is not None:
        why_kernels += f"; path {ops.packer.path} ({ops.packer.reason}), {ops.pool.threads} threads"
    dtype, why_dtype = _dtype(config, model, device, native)
    kv_dtype = "float16" if native and config.dtype == "auto" else dtype
    overlap = config.overlap == "on" or (config.overlap == "auto" and device == "cuda")
    weights = loaded_bytes(config.model, model, dtype, native and config.load_format == "auto")  # dummy ones are dense
    sizes = _sizes(config, model, device, weights, kv_dtype)
    if config.load_format not in ("auto", "dummy"):
        raise InvalidRequest(f"load_format must be auto or dummy, not {config.load_format!r}", param="load_format")
    phases.done("device")
    executor, captured = _build(Decisions(config, model, device, kernels, dtype, kv_dtype, sizes, overlap, phases, ops))
    choices: tuple[Choice, ...] = (
        ("device", device, why_device),
        ("dtype", dtype, why_dtype),
        ("kv_dtype", kv_dtype, "half the bytes to hold and to read" if kv_dtype != dtype else "as dtype"),
        ("kernels", kernels, why_kernels),
        _overlap_words(config, overlap, device),
        ("captured_steps", *captured),
        *sizes.choices,
        ("load", f"{phases.seconds:.2f} s", phases.words),
    )
    info = EngineInfo(
        model=config.model,
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        num_kv_slots=sizes.num_kv_slots,
        kv_bytes_per_token=kv_bytes_per_token(model, kv_dtype),
        weight_bytes=weights,
        device=device,
        dtype=dtype,
        kernels=kernels,
        pid=0,
        load_s=phases.seconds,
        choices=choices,
    )
    return executor, info


def _build(decisions: Decisions) -> tuple[LocalExecutor | NativeExecutor, tuple[str, str]]:
    """-> the executor; whether steps are captured, and what that means."""
    if decisions.kernels == "native":
        from septet.engine.build_native import build_native

        return build_native(decisions)
    from septet.engine.build_torch import build_torch

    return build_torch(decisions)


def import_libraries(config: EngineConfig | None) -> None:
    """What `build_executor` will import, before it is asked to; without a configuration: what it may need."""
    if config is None or _on_host(config):
        import_module("septet.engine.build_native")
    if gpu_driver() if config is None else not _on_host(config):
        import_module("septet.engine.build_torch")


def _on_host(config: EngineConfig) -> bool:
    """Whether the native kernels are wanted, and weights that need no torch."""
    cpu = config.device == "cpu" or not gpu_driver()
    file = config.load_format == "auto" and not Path(config.model).is_dir()
    return cpu and file and config.kernels in ("auto", "native")


def _overlap_words(config: EngineConfig, overlap: bool, device: str) -> Choice:
    why = "as asked" if config.overlap != "auto" else f"default for {device}"
    return "overlap", "on" if overlap else "off", why


def _device(config: EngineConfig) -> tuple[str, str]:
    if config.device == "cpu":
        return "cpu", "as asked"
    there = _gpu_there()
    if config.device == "cuda" and not there:
        raise InvalidRequest(
            "device cuda was asked for, but PyTorch sees no GPU here; use --device cpu", param="device"
        )
    if config.device not in ("auto", "cuda"):
        raise InvalidRequest(f"device must be auto, cpu or cuda, not {config.device!r}", param="device")
    if config.device == "cuda":
        return "cuda", "as asked"
    return ("cuda", "a GPU is there") if there else ("cpu", "no GPU is there")


def _gpu_there() -> bool:
    if not gpu_driver():
        return False
    import torch

    return torch.cuda.is_available()


def _dtype(config: EngineConfig, model: ModelConfig, device: str, native: bool) -> tuple[str, str]:
    if config.dtype != "auto":
        if config.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}", param="dtype")
        return config.dtype, "as asked"
    if native and Path(config.model).is_dir():
        return model.dtype, "the checkpoint's own for its weights; activations are float32"
    if native:
        return "float32", "of activations; weights stay as the file has them"
    if device == "cpu":
        return "float32", "the reference kernels on a CPU are fastest and most exact in float32"
    if model.dtype == "float32":
        return "bfloat16", "float32 checkpoints are served in bfloat16 on a GPU; ask for float32 to keep it"
    return model.dtype, "the checkpoint's own"


def _kernels(config: EngineConfig, device: str) -> tuple[str, str]:
    """The table of kernels: the fastest that the device has, unless another is asked for."""
    if config.kernels == "auto":
        return _default_kernels(device)
    if config.kernels not in ("reference", "triton", "native"):
        raise InvalidRequest(
            f"kernels must be auto, reference, triton or native, not {config.kernels!r}", param="kernels"
        )
    if config.kernels == "native" and device != "cpu":
        raise InvalidRequest(f"kernels native run on the CPU, not on {device}", param="kernels")
    return config.kernels, "as asked"


def _default_kernels(device: str) -> tuple[str, str]:
    """(table, why): Triton on a GPU, the native library on a CPU, the reference where that is not there."""
    from septet.kernels.native.library import NativeUnavailable, load

    if device == "cuda":
        return "triton", "default for cuda"
    try:
        load()
    except NativeUnavailable as error:
        return "reference", f"the native library can't be used: {error}"
    return "native", "default for cpu"


def _native_ops() -> TapeOps:
    from septet.kernels.native.library import Pool, load
    from septet.kernels.native.record import TapeOps

    library = load()
    return TapeOps(library, Pool(library))


def _sizes(config: EngineConfig, model: ModelConfig, device: str, weights: int, kv_dtype: str) -> Sizes:
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
    else:
        free = available_memory()
    if weights > free:
        raise OutOfMemory(
            f"the weights need {weights >> 20} MiB, but {free >> 20} MiB are free on {device}: close other "
            "programs, or choose a smaller model, a smaller --dtype or a GGUF file of fewer bits"
        )
    return resolve_sizes(config, model, device=device, dtype=kv_dtype, weights=weights, free=free)
