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
import sys
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
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from septet.config import ModelConfig
    from septet.engine.buckets import Shapes
    from septet.kernels.ops import Ops

__all__ = ["Rehearsal", "kernel_directory", "needed_kernels"]

MAX_THREADS = 16
SWITCH_S = 0.0003  # seconds a thread that compiles may keep the interpreter while one that loads or serves wants it
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
    """Two parts: what the first steps need, at work from the constructor on until `finish`, and what the other captured
    steps will need, behind traffic after `go_on`. A part that has ended once leaves a stamp in `directory` and is left
    out from then on: its kernels are read from there when they are launched."""

    def __init__(
        self, config: ModelConfig, ops: Ops, dtype: torch.dtype, shapes: Shapes, directory: Path | None
    ) -> None:
        self._what = (config, ops, dtype, shapes)
        self._stamp = directory / f"rehearsed-{_digest(config, dtype, shapes)}" if directory else None
        self._cancelled = False
        self._pool = ThreadPoolExecutor(max(2, min(usable_cpus(), MAX_THREADS)), thread_name_prefix="kernels")
        prompts = [Shape(False, tokens, n_rows, tokens) for tokens, n_rows in PROMPTS]
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._libraries = self._pool.submit(_wake_libraries, config, dtype)
        self._first = self._begin("first", [*shapes.first(), *prompts])
        self._later: Future[int] | None = None

    def _begin(self, part: str, steps: Sequence[Shape]) -> Future[int] | None:
        if self._done(part):
            return None
        return self._pool.submit(self._compile, part, steps)

    def _done(self, part: str) -> bool:
        return self._stamp is not None and self._stamp.with_name(f"{self._stamp.name}-{part}").exists()

    def _compile(self, part: str, steps: Sequence[Shape]) -> int:
        """-> kernels that are ready. One that can't be compiled is left to its first launch."""
        ready = 0
        try:
            needed = needed_kernels(*self._what, steps)
            if part == "first":
                ready = sum(map(Future.result, [self._pool.submit(self._preload, *one) for one in needed]))
            else:  # one thread: the engine is serving
                ready = sum(self._preload(*one) for one in needed)
            if self._stamp is not None and not self._cancelled:
                self._stamp.with_name(f"{self._stamp.name}-{part}").touch()
        except Exception as error:
            log.warning("not all kernels could be compiled ahead: %s: %s", type(error).__name__, error)
        return ready

    def _preload(self, kernel: Any, data: str) -> bool:
        if not self._cancelled:
            kernel.preload(data)
        return not self._cancelled

    def finish(self) -> int:
        """Wait for the first part -> its kernels."""
        self._libraries.result()
        return self._first.result() if self._first is not None else 0

    def go_on(self) -> None:
        """The first steps are captured: now the rest."""
        self._later = self._begin("all", self._what[-1].usual())
        if self._later is None:
            self._end()
        else:
            self._later.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        sys.setswitchinterval(self._switch_s)
        self._pool.shutdown(wait=False)

    def over(self) -> bool:
        """Whether nothing is left to be compiled."""
        return self._later.done() if self._later is not None else self._done("all")

    def cancel(self) -> None:
        """Nobody needs the rest any more."""
        self._cancelled = True
        self._end()


@torch.inference_mode()
def _wake_libraries(config: ModelConfig, dtype: torch.dtype) -> None:
    """What the first launches would wait for, whatever they are: Triton's hash over its own files (0.4 GB of them), and
    the library of matrix products with its first kernel."""
    with suppress(Exception):  # then they do it themselves, or say why not
        from triton.runtime.cache import triton_key

        triton_key()
        if torch.cuda.is_available():
            x = torch.zeros(256, config.hidden_size, dtype=dtype, device="cuda")
            torch.nn.functional.linear(
                x, torch.zeros(config.hidden_size, config.hidden_size, dtype=dtype, device="cuda")
            )


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
    """This thread's launches of Triton kernels are skipped, and what is not compiled yet is noted: {what to compile:
    function}."""
    from triton import knobs
    from triton.runtime import JITFunction

    notes: dict[str, Any] = {}
    here = threading.get_ident()
    run = JITFunction.run

    def note(*, fn: Any, compile: dict[str, Any], **more: object) -> bool:
        if threading.get_ident() != here:
            return False
        notes[compile["specialization_data"]] = fn.jit_function
        return True

    def without_launch(self: Any, *args: object, warmup: bool, **more: object) -> object:
        return run(self, *args, warmup=warmup or threading.get_ident() == here, **more)

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    JITFunction.run = without_launch  # a kernel that is compiled by now would otherwise run, on tensors without memory
    try:
        yield notes
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = before, run


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
