"""How large each thing is made, by arithmetic alone: no profiling run, and a refusal that shows its sums.

Called by `engine/build.py` before anything is allocated. Standard library and the base room only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.engine.buckets import Shapes
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import DTYPE_BYTES, activation_bytes, kv_bytes_per_token, row_state_bytes

if TYPE_CHECKING:
    from septet.config import EngineConfig, ModelConfig

__all__ = ["Choice", "Sizes", "captured_bytes", "resolve_sizes"]

MIB = 1 << 20
Choice = tuple[str, str, str]  # (setting, value, reason)

CPU_SEQS, GPU_SEQS = 64, 256
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 512, 8192
CPU_KV_SHARE = 0.25  # of the memory that is available: the rest belongs to the machine's other work
GPU_RESERVE = 640 * MIB  # library workspaces, kernels, what the allocator rounds up
GRAPH_BYTES = 4 * MIB  # one captured step: its kernels' arguments, on the device


@dataclass(frozen=True, slots=True)
class Sizes:
    max_model_len: int  # tokens of one request, prompt and output
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_slots: int  # tokens, the padding slot not counted
    choices: tuple[Choice, ...]


def resolve_sizes(
    engine: EngineConfig, model: ModelConfig, *, device: str, dtype: str, weights: int, free: int
) -> Sizes:
    """`weights`: bytes the weights take; `free`: bytes of device memory that are free before they are loaded.

    Raises OutOfMemory with needed, free and what to change; InvalidRequest for a setting that can't be.
    """
    gpu = device == "cuda"
    choices: list[Choice] = []
    seqs = engine.max_num_seqs or (GPU_SEQS if gpu else CPU_SEQS)
    step = engine.max_num_batched_tokens or (GPU_STEP_TOKENS if gpu else CPU_STEP_TOKENS)
    _check(engine, model)
    step = max(step, seqs)
    for name, value, given in (
        ("max_num_seqs", seqs, engine.max_num_seqs),
        ("max_num_batched_tokens", step, engine.max_num_batched_tokens),
    ):
        choices.append((name, str(value), "as asked" if given == value else f"default for {device}"))
    length = engine.max_model_len or model.max_position
    per_token = kv_bytes_per_token(model, dtype)
    budget, budget_reason = _kv_budget(engine, model, gpu, dtype, weights, free, seqs, step, length)
    slots = engine.num_kv_slots or min(budget // per_token, seqs * length)
    if not engine.max_model_len and 16 <= slots < length:
        choices.append(("max_model_len", str(slots), f"the model's {length} reduced to what the KV pool holds"))
        length = slots
    else:
        choices.append(("max_model_len", str(length), "as asked" if engine.max_model_len else "the model's own"))
    if slots < max(length, 16):
        raise OutOfMemory(
            f"the KV pool would hold {slots} tokens ({budget // MIB} MiB at {per_token} bytes a token), but one "
            f"request of max_model_len {length} needs {length * per_token // MIB} MiB. {budget_reason}. "
            "Lower --max-model-len, or raise --kv-cache-memory or --gpu-memory-utilization"
        )
    choices.append(("num_kv_slots", str(slots), budget_reason if not engine.num_kv_slots else "as asked"))
    return Sizes(length, seqs, step, slots, tuple(choices))


def _check(engine: EngineConfig, model: ModelConfig) -> None:
    if engine.max_model_len > model.max_position:
        raise InvalidRequest(
            f"max_model_len {engine.max_model_len} is beyond the {model.max_position} tokens the model was made for",
            param="max_model_len",
        )
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_slots", "kv_cache_memory"):
        if getattr(engine, name) < 0:
            raise InvalidRequest(f"{name} must be positive, or 0 for automatic", param=name)
    if not 0.0 < engine.memory_utilization <= 1.0:
        given = f"{engine.memory_utilization:g}"
        raise InvalidRequest(f"memory_utilization must be in (0, 1], not {given}", param="memory_utilization")


def _kv_budget(
    engine: EngineConfig,
    model: ModelConfig,
    gpu: bool,
    dtype: str,
    weights: int,
    free: int,
    seqs: int,
    step: int,
    length: int,
) -> tuple[int, str]:
    """Bytes for keys and values, and the sum behind it."""
    if engine.kv_cache_memory:
        return engine.kv_cache_memory, f"{engine.kv_cache_memory // MIB} MiB as asked"
    rows = row_state_bytes(seqs, length)
    if not gpu:
        budget = int((free - weights) * CPU_KV_SHARE) - rows
        return max(budget, 0), f"a quarter of {max(free - weights, 0) // MIB} MiB free after the weights"
    temporaries = activation_bytes(model, step, seqs, dtype)
    graphs = 0 if engine.enforce_eager else captured_bytes(model, Shapes.of(seqs, length, step), dtype)
    budget = int(free * engine.memory_utilization) - weights - temporaries - rows - graphs - GPU_RESERVE
    return max(budget, 0), (
        f"{free // MIB} MiB free x {engine.memory_utilization:g} - weights {weights // MIB} - activations "
        f"{temporaries // MIB} - row tables {rows // MIB} - captured steps {graphs // MIB} - reserve "
        f"{GPU_RESERVE // MIB} = {max(budget, 0) // MIB} MiB"
    )


def captured_bytes(model: ModelConfig, shapes: Shapes, dtype: str) -> int:
    """The memory of captured steps: one pool, as large as the largest of them needs, and each graph's own."""
    tokens, logits = max(shapes.max_tokens, shapes.max_rows), shapes.max_rows * model.vocab_size * DTYPE_BYTES[dtype]
    return activation_bytes(model, tokens, 0, dtype) + logits + shapes.max_graphs * GRAPH_BYTES
