"""Kernels compiled ahead and in parallel: which ones the first steps need is found by running them on no data.

Called by `build.py` before the weights are loaded, on a GPU. A model of the same shape, with as many layers as there
are kinds of them, lives on torch's meta device: no memory, no values. Its steps run with a hook that notes each kernel
that Triton would compile and skips the launch; the notes are then compiled by threads while the weights arrive. What is
missed here is compiled at its first launch, as ever. Knows no kernel by name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from septet import kernels
from septet.engine.buckets import Shape
from septet.engine.masked import MaskBuffers
from septet.engine.rows import Rows
from septet.engine.static import Machine, input_length, static_step
from septet.hub.store import home_directory
from septet.kernels.ops import LayerKV
from septet.layers.build import Build
from septet.machine import usable_cpus
from septet.models.registry import load_model
from septet.quant.none import Dense
from septet.quant.scheme import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torch import Tensor

    from septet.config import ModelConfig
    from septet.engine.buckets import Shapes
    from septet.kernels.ops import Ops

__all__ = ["Rehearsal", "kernel_directory", "needed_kernels"]

MAX_THREADS = 16
PROMPTS = (
    (1024, 1),
    (8192, 16),
)  # (tokens, rows) of eager steps that come early: one long prompt, a full batch of them
META = torch.device("meta")

log = logging.getLogger(__name__)


def kernel_directory(card: str) -> Path | None:
    """Where compiled kernels stay, by Triton's version and card: in our store, unless the user has said where. None:
    nowhere that can be written."""
    import triton

    given = os.environ.get("TRITON_CACHE_DIR")
    directory = Path(given) if given else home_directory() / "kernels" / f"triton-{triton.__version__}-{card}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.info("compiled kernels stay where Triton keeps them: %s", error.strerror)
        return None
    os.environ["TRITON_CACHE_DIR"] = str(directory)
    return directory


class Rehearsal:
    """At work from the constructor on; `finish` waits for what the first steps need, the rest goes on behind traffic.
    With a `directory` in which the same rehearsal has ended once, there is nothing to do: the kernels are read from
    there when they are launched."""

    def __init__(
        self, config: ModelConfig, ops: Ops, dtype: torch.dtype, shapes: Shapes, directory: Path | None
    ) -> None:
        self._stamp = directory / f"rehearsed-{_digest(config, dtype, shapes)}" if directory else None
        self._cancelled = False
        self._known: list[str] = []
        self._first: Future[list[Future[bool]]] | None = None
        self._later: Future[None] | None = None
        self._pool = ThreadPoolExecutor(max(2, min(usable_cpus(), MAX_THREADS)), thread_name_prefix="kernels")
        if self._stamp is None or not self._stamp.exists():
            prompts = [Shape(False, tokens, n_rows, tokens) for tokens, n_rows in PROMPTS]
            first, later = [*shapes.first(), *prompts], [s for s in shapes.usual() if s not in shapes.first()]
            self._first = self._pool.submit(self._compile, config, ops, dtype, shapes, first, {})
            self._later = self._pool.submit(self._finish_later, config, ops, dtype, shapes, later)

    def _compile(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype,
        shapes: Shapes,
        steps: Sequence[Shape],
        known: Container[str],
    ) -> list[Future[bool]]:
        """Start compiling what these steps need beside what is `known`."""
        needed = needed_kernels(config, ops, dtype, shapes, steps)
        self._known = [data for _, data in needed]
        return [self._pool.submit(self._preload, kernel, data) for kernel, data in needed if data not in known]

    def _preload(self, kernel: Any, data: str) -> bool:
        if not self._cancelled:
            kernel.preload(data)
        return not self._cancelled

    def _finish_later(
        self, config: ModelConfig, ops: Ops, dtype: torch.dtype, shapes: Shapes, steps: Sequence[Shape]
    ) -> None:
        """After the first steps' kernels: those of the steps that are captured behind traffic, then the stamp."""
        assert self._first is not None
        try:
            first = self._first.result()
            later = self._compile(config, ops, dtype, shapes, steps, {*self._known})
            whole = all(map(Future.result, (*first, *later)))
            if self._stamp is not None and whole:
                self._stamp.touch()
        except Exception as error:
            log.warning("not all kernels could be compiled ahead: %s: %s", type(error).__name__, error)
        self._pool.shutdown(wait=False)

    def finish(self) -> int:
        """-> kernels that were compiled for the first steps. One that could not be is left to its first launch."""
        ready = 0
        with suppress(Exception):  # told by `_finish_later`
            for future in self._first.result() if self._first is not None else []:
                ready += future.result()
        return ready

    def over(self) -> bool:
        """Whether nothing is being compiled any more."""
        return self._later is None or self._later.done()

    def cancel(self) -> None:
        """Nobody needs the rest any more."""
        self._cancelled = True


def _digest(*what: object) -> str:
    """Of these values and the kernels' sources."""
    digest = hashlib.sha256(repr(what).encode())
    for file in sorted(Path(kernels.__file__).parent.glob("triton/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def needed_kernels(
    config: ModelConfig, ops: Ops, dtype: torch.dtype, shapes: Shapes, steps: Sequence[Shape]
) -> list[tuple[Any, str]]:
    """[(Triton function, what to compile it for)] of these steps, each once."""
    windows = config.windows
    n_layers = max(windows.index(window) for window in set(windows)) + 1
    config = replace(config, num_layers=n_layers, layer_windows=windows[:n_layers] if config.layer_windows else ())
    ops = copy(ops)  # what it keeps between calls must not mix with the engine's
    model = load_model(Build(config, ops, _Hollow(config, dtype), META, dtype, max_len=64))
    rows = Rows(shapes.max_rows, shapes.max_len, META)
    kv_shape = (1 << 16, config.num_kv_heads, config.head_dim)
    pool = [LayerKV(torch.empty(kv_shape, dtype=dtype, device=META), torch.empty(kv_shape, dtype=dtype, device=META))]
    inputs = torch.empty(max(map(input_length, steps)), dtype=torch.int64, device=META)
    tokens = torch.empty(max(shape.rows for shape in steps), dtype=torch.int64, device=META)
    machine = Machine(model, ops, pool * n_layers, rows, inputs, tokens, MaskBuffers(len(tokens), META))
    with _noted() as notes:
        for shape in steps:
            step = static_step(machine, shape)
            step.forward()
            step.draw()
    return [(kernel, data) for data, kernel in notes.items()]


@contextmanager
def _noted() -> Iterator[dict[str, Any]]:
    """Launches of Triton kernels that are not compiled yet are skipped and noted: {what to compile: function}."""
    from triton import knobs

    notes: dict[str, Any] = {}
    here = threading.get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **more: object) -> bool:
        if threading.get_ident() != here:
            return False
        notes[compile["specialization_data"]] = fn.jit_function
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield notes
    finally:
        knobs.runtime.jit_cache_hook = before


class _NoValues(Dense):
    """Stacked without `torch.cat`, whose meta version would import torch's compiler: seconds."""

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        first = weights[0].tensors["weight"]
        shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
        return PackedWeight(self, {"weight": first.new_empty(shape)}, shape)


class _Hollow:
    """A `Source` of tensors without values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(_NoValues(), {"weight": torch.empty(shape, dtype=self.dtype, device=META)}, shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=META)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None

    def has(self, name: str) -> bool:
        return not (name == "lm_head.weight" and self.config.tie_embeddings) and name != "rope_freqs.weight"

    def finish(self) -> None:
        """Nothing can be left over."""
